"""Many tracks: skipped, resumed, killed, interrupted, and never half a file."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.spool import Spool
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.runner import BatchRunner
from demucs_infer.batch.workdir import PARTIAL, WorkDir
from demucs_infer.errors import AudioWriteError, is_disk_full
from demucs_infer.events import ChunkProcessed
from demucs_infer.options import Request
from demucs_infer.system.checksum import sha256_file
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, environment, load, make_repo, save, tree, write_song
from tests.helpers.networks import RecordingModel
from tests.helpers.requests import make_request

STEMS = ["bass", "drums"]


class Ramp(RecordingModel):
    """Its answer depends on where in a window a sample lies."""

    def forward(self, mix: Tensor) -> Tensor:
        return super().forward(mix * torch.linspace(0.5, 1.5, mix.shape[-1]))


class Stage:
    """A network, a folder, and batches of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Ramp()

    def batch(self, request: Request | None = None, **more: object) -> BatchRunner:
        request = request or make_request()
        separator = Separator.from_model(self.network, options=request.separation, device="cpu")
        return BatchRunner(separator, ModelSpec(name="ramp"), request, weights=("w",), **more)  # type: ignore[arg-type]

    def job(self, path: Path) -> TrackJob:
        return TrackJob(
            source=path,
            target=OutputPaths(folder=self.folder / "out", track=path.name),
            track=path.name,
        )

    def results(self, batch: BatchRunner, paths: list[Path]) -> list[TrackResult]:
        items = batch.run([self.job(path) for path in paths])
        return [item for _, item in items if isinstance(item, TrackResult)]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_hundred_tracks_with_three_that_are_broken(stage: Stage) -> None:
    paths = [
        write_song(stage.folder / f"in/{n:03}.wav", 0.2 + 0.01 * n, seed=n) for n in range(100)
    ]
    for n in (0, 50, 99):
        paths[n].write_bytes(b"RIFF" + os.urandom(1000))
    results = stage.results(stage.batch(), paths)
    assert [result.track for result in results] == [path.name for path in paths]
    bad = [result for result in results if not result.ok]
    assert [result.track for result in bad] == ["000.wav", "050.wav", "099.wav"]
    assert {result.fault for result in bad} == {"input"}
    assert len(tree(stage.folder / "out")) == 97 * 3

    seen = len(stage.network.seen)
    again = stage.results(stage.batch(), paths)
    assert len(stage.network.seen) == seen, "what is done was done again"
    assert [result.status for result in again].count("skipped") == 97
    redone = stage.results(stage.batch(make_request(overlap=0.5)), paths)
    assert [result.status for result in redone].count("done") == 97


def test_order_of_tracks_changes_nothing(stage: Stage) -> None:
    paths = [write_song(stage.folder / f"in/{n}.wav", 1.5, seed=n) for n in range(4)]
    stage.results(stage.batch(), paths)
    first = {name: (stage.folder / "out" / name).read_bytes() for name in tree(stage.folder / "out")
             if name.endswith("wav")}  # fmt: skip
    stage.results(stage.batch(skip="nothing"), paths[::-1])
    assert all((stage.folder / "out" / name).read_bytes() == was for name, was in first.items())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.8, 0.99])
def test_what_was_interrupted_goes_on_with_the_same_bytes(stage: Stage, share: float) -> None:
    path = write_song(stage.folder / "long.wav", 40)
    whole = Stage(stage.folder / "whole")
    whole.results(whole.batch(), [path])
    num_all = len(whole.network.seen)

    run = stage.batch().run([stage.job(path)])
    for _, item in run:
        if isinstance(item, ChunkProcessed) and item.fraction >= share:
            run.close()
            break
    assert not list((stage.folder / "out").glob("*/*.wav"))
    done = len(stage.network.seen)
    result = stage.results(stage.batch(), [path])[0]
    assert result.status == "done"
    # What is run twice: the chunks that reach beyond the last final sample, three at most.
    assert len(stage.network.seen) <= num_all + 3
    assert len(stage.network.seen) - done <= num_all - done + 3
    if share == 0.8:
        assert result.resumed_seconds >= 0.75 * 40
    assert tree(stage.folder / "out") == tree(whole.folder / "out")
    for stem in STEMS:
        name = f"out/long/{stem}.wav"
        assert (stage.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_other_settings_do_not_go_on_with_what_was_interrupted(stage: Stage) -> None:
    path = write_song(stage.folder / "long.wav", 20)
    run = stage.batch().run([stage.job(path)])
    next(item for _, item in run if isinstance(item, ChunkProcessed) and item.fraction > 0.5)
    run.close()
    result = stage.results(stage.batch(make_request(overlap=0.5)), [path])[0]
    assert (result.status, result.resumed_seconds) == ("done", 0)
    assert not (stage.folder / "out" / PARTIAL).exists()


def test_a_network_that_fails_is_a_result_and_leaves_nothing(stage: Stage) -> None:
    class Broken(Ramp):
        def forward(self, mix: Tensor) -> Tensor:
            if len(self.seen) == 2:
                raise RuntimeError("the network broke")
            return super().forward(mix)

    stage.network = Broken()
    path = write_song(stage.folder / "song.wav", 5)
    result = stage.batch().run_one(stage.job(path))
    assert (result.status, result.fault) == ("failed", "other") and "broke" in result.error
    assert tree(stage.folder / "out") == []


def test_a_disk_that_cannot_be_written_to_is_a_result(stage: Stage) -> None:
    path = write_song(stage.folder / "song.wav")
    (stage.folder / "out/song").parent.mkdir()
    (stage.folder / "out/song").write_text("a file where the folder should be")
    result = stage.batch().run_one(stage.job(path))
    assert result.status == "failed" and "cannot write" in result.error
    assert tree(stage.folder / "out") == ["song"]


def test_a_full_disk_is_known_by_its_cause_however_that_is_told() -> None:
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    told = AudioWriteError("cannot write")
    told.__cause__ = full
    assert is_disk_full(full) and is_disk_full(told)
    told.__cause__ = told  # `raise error from error`
    assert not is_disk_full(told) and not is_disk_full(OSError(errno.EIO, "no"))


def test_what_a_full_disk_ended_goes_on_once_it_has_room(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(stage.folder / "long.wav", 40)
    whole = Stage(stage.folder / "whole")
    whole.results(whole.batch(), [path])
    appended, append = 0, Spool.append

    def full(spool: Spool, block: Tensor) -> None:
        nonlocal appended
        appended += 1
        if appended > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(spool, block)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", full)
        result = stage.batch(keeps_when_full=False).run_one(stage.job(path))
        assert "No space left" in result.error and "goes on" not in result.error
        assert result.fault == "disk"
        assert tree(stage.folder / "out") == []
        appended = 0
        result = stage.batch().run_one(stage.job(path))
    assert (result.status, result.fault) == ("failed", "disk")
    assert "No space left" in result.error and "goes on from here" in result.error
    files = {file.name for file in (stage.folder / "out" / PARTIAL).glob("*/*")}
    assert files == {"lock", "key", "journal", "samples.f32"}, "what cannot be used takes no room"
    result = stage.batch().run_one(stage.job(path))
    assert result.status == "done" and result.resumed_seconds > 10
    assert tree(stage.folder / "out") == tree(whole.folder / "out")
    for stem in STEMS:
        name = f"out/long/{stem}.wav"
        assert (stage.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("name", ["drums.wav", "stems.json"])
def test_a_folder_in_the_place_of_a_file_is_found_before_any_work(stage: Stage, name: str) -> None:
    path = write_song(stage.folder / "song.wav")
    target = stage.job(path).target
    taken = {**{p.name: p for p in target.stems(STEMS).values()}, "stems.json": target.manifest}
    assert stage.batch().run_one(stage.job(path)).status == "done"
    out = stage.folder / "out"
    before = {file: (out / file).read_bytes() for file in tree(out)}
    before.pop(str(taken[name].relative_to(out)))
    taken[name].unlink()
    taken[name].mkdir()
    seen = len(stage.network.seen)
    result = stage.batch(make_request(shifts=3)).run_one(stage.job(path))
    assert result.status == "failed" and f"cannot write {taken[name]}" in result.error
    assert len(stage.network.seen) == seen
    assert before == {file: (out / file).read_bytes() for file in before}


def test_a_file_that_changes_while_it_is_read_is_not_vouched_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(stage.folder / "song.wav", 3)

    def replaced(path: Path, *more: Any) -> str:
        digest = sha256_file(path, *more)
        write_song(path, 2, seed=1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr("demucs_infer.batch.prepare.sha256_file", replaced)
        result = stage.batch().run_one(stage.job(path))
    assert (result.status, result.fault) == ("failed", "input") and "changed" in result.error
    assert tree(stage.folder / "out") == []
    assert stage.batch().run_one(stage.job(path)).status == "done"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_or_a_device_does_not_hang(stage: Stage) -> None:
    os.mkfifo(stage.folder / "pipe.wav")
    for path in (stage.folder / "pipe.wav", Path("/dev/zero")):
        result = stage.batch().run_one(stage.job(path))
        assert (result.status, result.fault) == ("failed", "input")
        assert "a pipe or a device" in result.error


SHARED = make_request(shifts=0, batch_size=16)


def test_tracks_that_share_batches_come_out_as_they_do_alone(stage: Stage) -> None:
    """Songs of all lengths, broken ones among them, in memory for a few at a time."""
    lengths = [0.3, 0.8, 7.0, 0.5, 0.4, 30.0, 0.2, 0.6, 0.9, 2.0, 0.7, 0.3]
    paths = [write_song(stage.folder / f"{n}.wav", s, seed=n) for n, s in enumerate(lengths)]
    paths[3].write_bytes(b"RIFF0000WAVE")
    paths[7].unlink()
    stage.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    alone = Stage(stage.folder / "alone")
    alone.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    expected = alone.results(alone.batch(SHARED), paths)

    spools = stage.folder / "out" / PARTIAL
    found, most = [], 0
    for _, item in stage.batch(SHARED, max_tracks_per_batch=3).run(
        [stage.job(path) for path in paths]
    ):
        most = max(most, len(list(spools.glob("*/attempts"))))
        found += [item] if isinstance(item, TrackResult) else []
    assert [(one.track, one.status) for one in found] == [
        (one.track, one.status) for one in expected
    ]
    assert len(stage.network.seen) < len(alone.network.seen), "nothing was shared"
    # Three that share, one about to, one read ahead, and two that are being written.
    assert most <= 3 + 1 + 1 + 2
    for name in tree(alone.folder / "out"):
        if name.endswith("wav"):
            assert (stage.folder / "out" / name).read_bytes() == (
                alone.folder / "out" / name
            ).read_bytes()


def test_a_network_that_fails_on_one_of_those_that_share(stage: Stage) -> None:
    class Picky(Ramp):
        def forward(self, mix: Tensor) -> Tensor:
            if mix.shape[-1] == RATE and float(mix.abs().max()) > 50:
                raise RuntimeError("too loud")
            return super().forward(mix)

    stage.network = Picky()
    stage.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    paths = [write_song(stage.folder / f"{n}.wav", 0.9, seed=n) for n in range(4)]
    click = torch.zeros(2, 7200)
    click[:, 100] = 0.9
    save(paths[1], click)
    results = stage.results(stage.batch(SHARED, max_tracks_per_batch=4), paths)
    assert [result.status for result in results] == ["done", "failed", "done", "done"]
    assert "too loud" in results[1].error
    assert len(tree(stage.folder / "out")) == 3 * 3


def test_files_of_one_that_cannot_be_written(stage: Stage) -> None:
    """The network goes on to the others, and stops with the one."""
    paths = [write_song(stage.folder / f"{n}.wav", 20, seed=n) for n in range(3)]
    (stage.folder / "out").mkdir()
    (stage.folder / "out/1").write_text("a file where the folder should be")
    results = stage.results(stage.batch(SHARED, max_tracks_per_batch=3), paths)
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert "cannot write" in results[1].error


@pytest.mark.parametrize("max_tracks_per_batch", [1, 3])
def test_the_same_track_more_than_once(stage: Stage, max_tracks_per_batch: int) -> None:
    one, other = (write_song(stage.folder / f"{n}.wav", 3, seed=n) for n in range(2))
    results = stage.results(
        stage.batch(SHARED, max_tracks_per_batch=max_tracks_per_batch), [one, one, other, one, one]
    )
    assert Counter((result.track, result.status) for result in results) == {
        ("0.wav", "done"): 1, ("0.wav", "skipped"): 3, ("1.wav", "done"): 1,
    }  # fmt: skip
    assert len({str(result.stems) for result in results if result.track == "0.wav"}) == 1
    # Three seconds are four windows of a second, once for each of the two.
    assert sum(shape[0] for shape in stage.network.seen) == 2 * 4


def test_two_at_work_on_one_track(stage: Stage) -> None:
    path = write_song(stage.folder / "song.wav")
    other = WorkDir(stage.folder / "out", stage.job(path).target.manifest)
    assert other.acquire("key")
    result = stage.batch().run_one(stage.job(path))
    assert result.status == "failed" and "another process" in result.error
    other.release()
    assert stage.batch().run_one(stage.job(path)).status == "done"


def test_a_track_that_kills_its_process_is_left_out(stage: Stage) -> None:
    path = write_song(stage.folder / "song.wav")
    job = stage.job(path)

    def die() -> None:
        """What a killed process leaves: an attempt in the journal, some sound, and no lock."""
        run = stage.batch(max_crashes=2).run([job])
        next(run)
        attempts = next((stage.folder / "out").glob(f"{PARTIAL}/*/attempts"))
        text = attempts.read_text()
        run.close()
        attempts.write_text(text)
        attempts.with_name("decoded.f32").write_bytes(b"some sound")

    die()
    die()
    result = stage.batch(max_crashes=2).run_one(job)
    assert result.status == "quarantined" and "2 times" in result.error
    left = next((stage.folder / "out").glob(f"{PARTIAL}/*"))
    assert f"to try it again, remove {left}" in result.error
    assert not list((stage.folder / "out").glob(f"{PARTIAL}/*/decoded.f32")), "of no use any more"
    assert stage.batch(max_crashes=2).run_one(job).status == "quarantined", "tried once more"
    assert stage.batch().run_one(job).status == "done"


def test_crashes_before_a_forced_run_do_not_count(stage: Stage) -> None:
    path = write_song(stage.folder / "song.wav")
    job = stage.job(path)

    def crash(run_id: str) -> None:
        run = stage.batch(max_crashes=2, run_id=run_id).run([job])
        next(run)
        attempts = next((stage.folder / "out").glob(f"{PARTIAL}/*/attempts"))
        text = attempts.read_text()
        run.close()
        attempts.write_text(text)

    for run_id in ("", ""):
        crash(run_id)
    assert stage.batch(max_crashes=2).run_one(job).status == "quarantined"
    for run_id in ("forced", "forced"):
        crash(run_id)
    assert stage.batch(max_crashes=2, run_id="forced").run_one(job).status == "quarantined"
    assert stage.batch(max_crashes=2).run_one(job).status == "quarantined", "counted from any run"
    assert stage.batch(max_crashes=2, run_id="forced again").run_one(job).status == "done"


@pytest.mark.parametrize(("max_tracks_per_batch", "died_with"), [(1, 2), (3, 3)])
def test_tracks_beside_one_that_kills_are_not_to_blame(
    stage: Stage, max_tracks_per_batch: int, died_with: int
) -> None:
    """Some are being read, or share its batch, when the process dies; later each is tried alone."""
    order = SHARED if max_tracks_per_batch > 1 else make_request()
    stage.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    more: dict[str, Any] = {"max_crashes": 2, "max_tracks_per_batch": max_tracks_per_batch}
    paths = [write_song(stage.folder / f"{n}.wav", 3, seed=n) for n in range(3)]
    spools = stage.folder / "out" / PARTIAL

    def die_of(track: str, begun: int) -> None:
        """The process ends at the first windows of that track, with so many tracks begun."""
        run = stage.batch(order, **more).run([stage.job(path) for path in paths])
        next(job for job, item in run if job.track == track and isinstance(item, ChunkProcessed))
        deadline = time.monotonic() + 10
        while len(list(spools.glob("*/attempts"))) < begun and time.monotonic() < deadline:
            time.sleep(0.01)
        kept = {path: path.read_text() for path in spools.glob("*/attempts")}
        run.close()
        for path, text in kept.items():
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)

    die_of("0.wav", begun=died_with)
    die_of("0.wav", begun=died_with)
    results = stage.results(stage.batch(order, **more), paths)
    assert {result.track: result.status for result in results} == {
        "0.wav": "quarantined",
        "1.wav": "done",
        "2.wav": "skipped" if max_tracks_per_batch == 1 else "done",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("order", "rate", "is_warned"),
    [
        (make_request(format="mp3", rate=10_000), 11_025, True),
        (make_request(format="opus"), 48_000, False),
        (make_request(format="flac", rate=8000), 8000, False),
    ],
    ids=str,
)
def test_the_manifest_tells_the_rate_of_the_files(
    stage: Stage, order: Request, rate: int, is_warned: bool
) -> None:
    [result] = stage.results(stage.batch(order), [write_song(stage.folder / "song.wav", 1)])
    assert result.manifest
    assert json.loads(result.manifest.read_text())["sample_rate"] == rate
    assert {soundfile.info(path).samplerate for path in result.stems.values()} == {rate}
    assert [f"{rate} Hz" in one for one in result.warnings] == [True] * is_warned


def test_the_next_track_is_read_while_one_is_separated(stage: Stage) -> None:
    """And its level is taken: the network has nothing to wait for."""
    paths = [write_song(stage.folder / f"{n}.wav", 3, seed=n) for n in range(2)]
    spools = stage.folder / "out" / PARTIAL
    found = []
    for job, item in stage.batch().run([stage.job(path) for path in paths]):
        if isinstance(item, ChunkProcessed) and job.track == "0.wav" and item.fraction < 1:
            deadline = time.monotonic() + 10
            while len(list(spools.glob("*/journal"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(len(list(spools.glob("*/journal"))))
    assert found and set(found) == {2}


def test_a_track_is_decoded_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Counter[str]()
    decode = AudioReader.blocks

    def counted(reader: AudioReader) -> Iterator[Tensor]:
        passes[reader.name] += 1
        return decode(reader)

    monkeypatch.setattr(AudioReader, "blocks", counted)
    paths = [write_song(stage.folder / f"{n}.wav", 20, seed=n) for n in range(2)]
    stage.results(stage.batch(), paths)
    assert sorted(passes.values()) == [1, 1]


def test_what_was_decoded_does_not_outlast_an_interruption(stage: Stage) -> None:
    """Only what the network made is worth its room on the disk."""
    paths = [write_song(stage.folder / f"{n}.wav", 20, seed=n) for n in range(2)]
    run = stage.batch().run([stage.job(path) for path in paths])
    next(item for _, item in run if isinstance(item, ChunkProcessed))
    held = [path.name for path in (stage.folder / "out" / PARTIAL).glob("*/*")]
    assert "decoded.f32" in held
    run.close()
    left = {path.name for path in (stage.folder / "out" / PARTIAL).glob("*/*")}
    assert "samples.f32" in left and "decoded.f32" not in left


def test_threads_end_with_the_run(stage: Stage) -> None:
    before = threading.active_count()
    path = write_song(stage.folder / "song.wav", 10)
    run = stage.batch().run([stage.job(path)])
    next(run)
    run.close()
    assert threading.active_count() == before


# ── processes ──


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("batch") / "repo")


def start(repo: Path, folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "demucs_infer", "in", "--repo", str(repo), "-n", "9d0a6f1c"]
    return subprocess.Popen(
        [*command, "-d", "cpu", "--progress", "json", *words],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        # A shell's background jobs ignore the interrupt, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def whole_files(folder: Path, expected: dict[str, int]) -> Iterator[str]:
    """The stems that are seen under their names, each of which must be whole."""
    for path in folder.glob("separated/9d0a6f1c/*/*.wav"):
        assert soundfile.info(path).frames == expected[path.parent.name], path
        yield str(path)


def kill_again_and_again(repo: Path, folder: Path, times: int) -> None:
    lengths = {}
    for n in range(6):
        write_song(folder / f"in/{n}.wav", 20 + n, seed=n)
        lengths[str(n)] = (20 + n) * RATE
    chance = random.Random(0)
    for _ in range(times):
        process = start(repo, folder)
        assert process.stderr
        for _ in range(chance.randrange(1, 40)):  # lines of progress, so that it is at work
            process.stderr.readline()
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate()
        list(whole_files(folder, lengths))
        for manifest in folder.glob("separated/9d0a6f1c/*/stems.json"):
            json.loads(manifest.read_text())
    process = start(repo, folder)
    process.communicate()
    assert process.returncode == 0
    assert len(list(whole_files(folder, lengths))) == 6 * 4
    assert len(tree(folder / "separated")) == 6 * 5  # and nothing else


def test_killed_at_random_moments(repo: Path, tmp_path: Path) -> None:
    kill_again_and_again(repo, tmp_path, 4)


@pytest.mark.slow
def test_killed_at_many_random_moments(repo: Path, tmp_path: Path) -> None:
    kill_again_and_again(repo, tmp_path, 30)


def test_interrupted_from_the_keyboard(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "in/long.wav", 600)
    process = start(repo, tmp_path)
    assert process.stderr
    while b"ChunkProcessed" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)  # tests/test_interrupt.py tells how soon it ends
    assert process.returncode == 130
    assert b"Traceback" not in said and b"interrupted" in said
    assert all(PARTIAL in name for name in tree(tmp_path / "separated"))


def test_what_a_death_after_the_last_rename_left_is_cleared(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "in/song.wav", 3)
    start(repo, tmp_path).communicate()
    expected = tree(tmp_path / "separated")
    target = tmp_path / "separated/9d0a6f1c"
    left = WorkDir(target, target / "song/stems.json").folder
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "draft.part").touch()
    start(repo, tmp_path).communicate()
    assert tree(tmp_path / "separated") == expected


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_five_minutes(tmp_path: Path) -> None:
    """`VmHWM`, the highest memory of the process as Linux counts it."""
    repo = make_repo(tmp_path / "repo")
    code = (
        "import sys, json\nfrom demucs_infer.cli.main import main\nmain(sys.argv[1:])\n"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])"
    )
    peaks = []
    for minutes in (5, 60):
        song = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(song, "w", RATE, 2, "PCM_16") as file:
            for n in range(minutes):
                file.write(make_noise(2, 60 * RATE, n).T.numpy())
        words = [str(song), "--repo", str(repo), "-n", "9d0a6f1c", "-q", "-o", str(tmp_path / "o")]
        words += ["--segment", "7.8"]  # as real networks have; the plan grows with windows
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, env=environment(), check=True
        )
        peaks.append(int(done.stdout))
        assert load(tmp_path / f"o/9d0a6f1c/{minutes}/drums.wav").shape[0] == minutes * 60 * RATE
    # One copy of the longer mix is 220 MB, one of its stems 880. Five in a hundred are promised.
    assert peaks[1] <= 1.05 * peaks[0], peaks


def test_names_that_are_hostile(stage: Stage) -> None:
    names = [
        "歌 🎵.wav",
        "...wav",
        "-q.wav",
        "a" * 250 + ".wav",
        "e\u0301.wav",
        "nul.wav",
        "a\nb.wav",
    ]
    paths = []
    for n, name in enumerate(names):
        path = stage.folder / "in" / name
        path.parent.mkdir(exist_ok=True)
        save(stage.folder / "x.wav", make_noise(2, RATE, n))
        (stage.folder / "x.wav").rename(path)
        paths.append(path)
    results = stage.results(stage.batch(), paths)
    assert [result.status for result in results] == ["done"] * len(names)
    assert len(tree(stage.folder / "out")) == 3 * len(names)


def test_a_folder_that_no_stem_came_into_goes_and_others_stay(stage: Stage) -> None:
    bad = [stage.folder / name for name in ("a.wav", "b.wav", "c.wav")]
    for path in bad:
        path.write_bytes(b"no sound")
    out = stage.folder / "out"
    assert not any(result.ok for result in stage.results(stage.batch(), bad))
    assert not out.exists()
    out.mkdir()  # somebody else's
    stage.results(stage.batch(), bad)
    assert out.is_dir() and not list(out.iterdir())
    out.rmdir()
    good = write_song(stage.folder / "good.wav", 1)
    assert stage.results(stage.batch(), [bad[0], good, bad[1]])[1].ok
    assert {path.name for path in out.iterdir()} == {"good"}
