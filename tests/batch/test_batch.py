"""Test batch runs: skipped, resumed, killed and interrupted tracks, and no incomplete files."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.spool import Spool
from demucs_infer.batch.attempts import Run
from demucs_infer.batch.job import TrackJob
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import TrackResult
from demucs_infer.batch.runner import BatchRunner
from demucs_infer.batch.workdir import PARTIAL, WorkDir
from demucs_infer.errors import AudioWriteError, is_disk_full
from demucs_infer.events import ChunkProcessed
from demucs_infer.options import Request
from demucs_infer.system import process_lock
from demucs_infer.system.checksum import sha256_file
from demucs_infer.system.cores import count_cores
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE, environment, load, make_repo, save, tree, write_song
from tests.helpers.networks import RecordingModel
from tests.helpers.requests import make_request

STEMS = ["bass", "drums"]


class RampModel(RecordingModel):
    """A network whose output depends on the position of a sample in the window."""

    def forward(self, mix: Tensor) -> Tensor:
        return super().forward(mix * torch.linspace(0.5, 1.5, mix.shape[-1]))


class Workspace:
    """A network, a folder, and batch runs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network: RecordingModel = RampModel()

    def runner(self, request: Request | None = None, **more: object) -> BatchRunner:
        request = request or make_request()
        separator = Separator.from_model(self.network, options=request.separation, device="cpu")
        return BatchRunner(separator, ModelSpec(name="ramp"), request, weights=("w",), **more)  # type: ignore[arg-type]

    def make_job(self, path: Path) -> TrackJob:
        return TrackJob(
            source=path,
            target=OutputPaths(folder=self.folder / "out", track=path.name),
            track=path.name,
        )

    def run(self, runner: BatchRunner, paths: list[Path]) -> list[TrackResult]:
        items = runner.run([self.make_job(path) for path in paths])
        return [item for _, item in items if isinstance(item, TrackResult)]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def test_corrupt_tracks_fail_alone_and_finished_ones_are_skipped(workspace: Workspace) -> None:
    paths = [
        write_song(workspace.folder / f"in/{n:03}.wav", 0.2 + 0.01 * n, seed=n) for n in range(100)
    ]
    for n in (0, 50, 99):
        paths[n].write_bytes(b"RIFF" + os.urandom(1000))
    results = workspace.run(workspace.runner(), paths)
    assert [result.track for result in results] == [path.name for path in paths]
    failed = [result for result in results if not result.ok]
    assert [result.track for result in failed] == ["000.wav", "050.wav", "099.wav"]
    assert {result.fault for result in failed} == {"input"}
    assert len(tree(workspace.folder / "out")) == 97 * 3

    seen = len(workspace.network.seen)
    again = workspace.run(workspace.runner(), paths)
    assert len(workspace.network.seen) == seen, "finished tracks were separated again"
    assert [result.status for result in again].count("skipped") == 97
    redone = workspace.run(workspace.runner(make_request(overlap=0.5)), paths)
    assert [result.status for result in redone].count("done") == 97


def test_damaged_stem_is_redone_only_with_verify(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav", 1)
    result = workspace.runner().run_one(workspace.make_job(path))
    stem = result.stems["drums"]
    expected = stem.read_bytes()
    assert workspace.runner(verify=True).run_one(workspace.make_job(path)).status == "skipped"
    stem.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert workspace.runner().run_one(workspace.make_job(path)).status == "skipped"
    assert workspace.runner(verify=True).run_one(workspace.make_job(path)).status == "done"
    assert stem.read_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to name descriptors")
def test_track_is_done_after_its_files_are_on_the_disk(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(workspace.folder / "song.wav", 1)
    workspace.runner().run_one(workspace.make_job(path))
    calls: list[tuple[str, str]] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def record_fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(("fsync folder" if target.is_dir() else "fsync file", target.name))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> Path:
        assert calls[-1] == ("fsync file", source.name), "renamed before its content was stored"
        calls.append(("rename", target.name))
        return replace(source, target)

    def record_unlink(file: Path, missing_ok: bool = False) -> None:
        if file.name == "stems.json":
            calls.append(("unlink", file.name))
        unlink(file, missing_ok)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    for _, item in workspace.runner(skip="nothing").run([workspace.make_job(path)]):
        calls += [("result", item.status)] if isinstance(item, TrackResult) else []
    names = [(call, name) for call, name in calls if call != "fsync file"]
    assert names == [
        ("unlink", "stems.json"),
        ("fsync folder", "song"),
        ("rename", "drums.wav"),
        ("fsync folder", "song"),
        ("rename", "bass.wav"),
        ("fsync folder", "song"),
        ("rename", "stems.json"),
        ("fsync folder", "song"),
        ("result", "done"),
    ]


def test_order_of_tracks_does_not_change_the_stems(workspace: Workspace) -> None:
    paths = [write_song(workspace.folder / f"in/{n}.wav", 1.5, seed=n) for n in range(4)]
    workspace.run(workspace.runner(), paths)
    out = workspace.folder / "out"
    expected = {path: path.read_bytes() for path in out.rglob("*.wav")}
    assert len(expected) == 4 * 2
    workspace.run(workspace.runner(skip="nothing"), paths[::-1])
    assert {path: path.read_bytes() for path in out.rglob("*.wav")} == expected


@pytest.mark.parametrize("share", [0.02, 0.5, 0.8, 0.99])
def test_interrupted_run_resumes_with_the_same_bytes(workspace: Workspace, share: float) -> None:
    path = write_song(workspace.folder / "long.wav", 40)
    whole = Workspace(workspace.folder / "whole")
    whole.run(whole.runner(), [path])
    num_all = len(whole.network.seen)

    run = workspace.runner().run([workspace.make_job(path)])
    for _, item in run:
        if isinstance(item, ChunkProcessed) and item.fraction >= share:
            run.close()
            break
    assert not list((workspace.folder / "out").glob("*/*.wav"))
    result = workspace.run(workspace.runner(), [path])[0]
    assert result.status == "done"
    # Chunks beyond the last final sample are repeated: three at most, and those that were running.
    assert len(workspace.network.seen) <= num_all + 3 + count_cores() + 1
    if share == 0.8:
        assert result.resumed_seconds >= 0.75 * 40
    assert tree(workspace.folder / "out") == tree(whole.folder / "out")
    for stem in STEMS:
        name = f"out/long/{stem}.wav"
        assert (workspace.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_other_settings_do_not_resume_an_interrupted_run(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "long.wav", 20)
    run = workspace.runner().run([workspace.make_job(path)])
    next(item for _, item in run if isinstance(item, ChunkProcessed) and item.fraction > 0.5)
    run.close()
    result = workspace.run(workspace.runner(make_request(overlap=0.5)), [path])[0]
    assert (result.status, result.resumed_seconds) == ("done", 0)
    assert not (workspace.folder / "out" / PARTIAL).exists()


def test_failing_network_is_a_result_and_leaves_no_files(workspace: Workspace) -> None:
    class Broken(RampModel):
        def forward(self, mix: Tensor) -> Tensor:
            if len(self.seen) >= 2:  # not ==: windows side by side may go from 1 to 3
                raise RuntimeError("the network broke")
            return super().forward(mix)

    workspace.network = Broken()
    path = write_song(workspace.folder / "song.wav", 5)
    result = workspace.runner().run_one(workspace.make_job(path))
    assert (result.status, result.fault) == ("failed", "other") and "broke" in result.error
    assert tree(workspace.folder / "out") == []


def test_write_error_is_a_result(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav")
    (workspace.folder / "out/song").parent.mkdir()
    (workspace.folder / "out/song").write_text("a file where the folder should be")
    result = workspace.runner().run_one(workspace.make_job(path))
    assert result.status == "failed" and "cannot write" in result.error
    assert tree(workspace.folder / "out") == ["song"]


def test_full_disk_is_recognized_by_the_cause_of_an_error() -> None:
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    error = AudioWriteError("cannot write")
    error.__cause__ = full
    assert is_disk_full(full) and is_disk_full(error)
    error.__cause__ = error  # `raise error from error`
    assert not is_disk_full(error) and not is_disk_full(OSError(errno.EIO, "no"))


def test_run_resumes_after_a_full_disk(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(workspace.folder / "long.wav", 40)
    whole = Workspace(workspace.folder / "whole")
    whole.run(whole.runner(), [path])
    appended, append = 0, Spool.append

    def full(spool: Spool, block: Tensor) -> None:
        nonlocal appended
        appended += 1
        if appended > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(spool, block)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "append", full)
        result = workspace.runner(keeps_when_full=False).run_one(workspace.make_job(path))
        assert "No space left" in result.error and "continues" not in result.error
        assert result.fault == "disk"
        assert tree(workspace.folder / "out") == []
        appended = 0
        result = workspace.runner().run_one(workspace.make_job(path))
    assert (result.status, result.fault) == ("failed", "disk")
    assert "No space left" in result.error and "continues from here" in result.error
    files = {file.name for file in (workspace.folder / "out" / PARTIAL).glob("*/*")}
    assert files == {"lock", "key", "journal", "samples.f32"}, "other files were kept"
    result = workspace.runner().run_one(workspace.make_job(path))
    assert result.status == "done" and result.resumed_seconds > 10
    assert tree(workspace.folder / "out") == tree(whole.folder / "out")
    for stem in STEMS:
        name = f"out/long/{stem}.wav"
        assert (workspace.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("name", ["drums.wav", "stems.json"])
def test_folder_in_place_of_a_file_is_an_error_before_any_work(
    workspace: Workspace, name: str
) -> None:
    path = write_song(workspace.folder / "song.wav")
    target = workspace.make_job(path).target
    outputs = {**{p.name: p for p in target.stems(STEMS).values()}, "stems.json": target.manifest}
    assert workspace.runner().run_one(workspace.make_job(path)).status == "done"
    out = workspace.folder / "out"
    before = {file: (out / file).read_bytes() for file in tree(out)}
    before.pop(str(outputs[name].relative_to(out)))
    outputs[name].unlink()
    outputs[name].mkdir()
    seen = len(workspace.network.seen)
    result = workspace.runner(make_request(shifts=3)).run_one(workspace.make_job(path))
    assert result.status == "failed" and f"cannot write {outputs[name]}" in result.error
    assert len(workspace.network.seen) == seen
    assert before == {file: (out / file).read_bytes() for file in before}


def test_input_that_changes_while_it_is_read_is_an_error(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(workspace.folder / "song.wav", 3)

    def replace_after_hashing(path: Path, *more: Any) -> str:
        digest = sha256_file(path, *more)
        write_song(path, 2, seed=1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr("demucs_infer.batch.prepare.sha256_file", replace_after_hashing)
        result = workspace.runner().run_one(workspace.make_job(path))
    assert (result.status, result.fault) == ("failed", "input") and "changed" in result.error
    assert tree(workspace.folder / "out") == []
    assert workspace.runner().run_one(workspace.make_job(path)).status == "done"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_pipe_or_device_is_an_error(workspace: Workspace) -> None:
    os.mkfifo(workspace.folder / "pipe.wav")
    for path in (workspace.folder / "pipe.wav", Path("/dev/zero")):
        result = workspace.runner().run_one(workspace.make_job(path))
        assert (result.status, result.fault) == ("failed", "input")
        assert "a pipe or a device" in result.error


SHARED = make_request(shifts=0, batch_size=16)


def test_tracks_that_share_batches_have_the_same_stems_as_alone(workspace: Workspace) -> None:
    """Tracks of various lengths, some of them corrupt; few are in progress at a time."""
    lengths = [0.3, 0.8, 7.0, 0.5, 0.4, 30.0, 0.2, 0.6, 0.9, 2.0, 0.7, 0.3]
    paths = [write_song(workspace.folder / f"{n}.wav", s, seed=n) for n, s in enumerate(lengths)]
    paths[3].write_bytes(b"RIFF0000WAVE")
    paths[7].unlink()
    workspace.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    alone = Workspace(workspace.folder / "alone")
    alone.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    expected = alone.run(alone.runner(SHARED), paths)

    spools = workspace.folder / "out" / PARTIAL
    results, most_in_progress = [], 0
    for _, item in workspace.runner(SHARED, max_tracks_per_batch=3).run(
        [workspace.make_job(path) for path in paths]
    ):
        most_in_progress = max(most_in_progress, len(list(spools.glob("*/attempts"))))
        results += [item] if isinstance(item, TrackResult) else []
    assert [(result.track, result.status) for result in results] == [
        (result.track, result.status) for result in expected
    ]
    assert len(workspace.network.seen) < len(alone.network.seen), "no batches were shared"
    # Three share batches, one is next, one is read ahead, and two are written.
    assert most_in_progress <= 3 + 1 + 1 + 2
    for name in tree(alone.folder / "out"):
        if name.endswith("wav"):
            assert (workspace.folder / "out" / name).read_bytes() == (
                alone.folder / "out" / name
            ).read_bytes()


def test_failing_network_fails_only_one_of_the_tracks_that_share_batches(
    workspace: Workspace,
) -> None:
    class LoudnessLimitedModel(RampModel):
        def forward(self, mix: Tensor) -> Tensor:
            if mix.shape[-1] == RATE and float(mix.abs().max()) > 50:
                raise RuntimeError("too loud")
            return super().forward(mix)

    workspace.network = LoudnessLimitedModel()
    workspace.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    paths = [write_song(workspace.folder / f"{n}.wav", 0.9, seed=n) for n in range(4)]
    click = torch.zeros(2, 7200)
    click[:, 100] = 0.9
    save(paths[1], click)
    results = workspace.run(workspace.runner(SHARED, max_tracks_per_batch=4), paths)
    assert [result.status for result in results] == ["done", "failed", "done", "done"]
    assert "too loud" in results[1].error
    assert len(tree(workspace.folder / "out")) == 3 * 3


def test_write_error_fails_only_one_of_the_tracks_that_share_batches(workspace: Workspace) -> None:
    paths = [write_song(workspace.folder / f"{n}.wav", 20, seed=n) for n in range(3)]
    (workspace.folder / "out").mkdir()
    (workspace.folder / "out/1").write_text("a file where the folder should be")
    results = workspace.run(workspace.runner(SHARED, max_tracks_per_batch=3), paths)
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert "cannot write" in results[1].error


@pytest.mark.parametrize("max_tracks_per_batch", [1, 3])
def test_repeated_track_is_separated_once(workspace: Workspace, max_tracks_per_batch: int) -> None:
    first, second = (write_song(workspace.folder / f"{n}.wav", 3, seed=n) for n in range(2))
    results = workspace.run(
        workspace.runner(SHARED, max_tracks_per_batch=max_tracks_per_batch),
        [first, first, second, first, first],
    )
    assert Counter((result.track, result.status) for result in results) == {
        ("0.wav", "done"): 1, ("0.wav", "skipped"): 3, ("1.wav", "done"): 1,
    }  # fmt: skip
    assert len({str(result.stems) for result in results if result.track == "0.wav"}) == 1
    # Three seconds are four windows of a second, once for each of the two.
    assert sum(shape[0] for shape in workspace.network.seen) == 2 * 4


def test_track_locked_by_another_process_is_skipped(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav")
    other = WorkDir(workspace.folder / "out", workspace.make_job(path).target.manifest)
    assert other.acquire("key")
    result = workspace.runner().run_one(workspace.make_job(path))
    assert result.status == "skipped" and "another process" in result.error
    assert not result.ok and not result.is_failure
    other.release()
    assert workspace.runner().run_one(workspace.make_job(path)).status == "done"


@pytest.fixture(params=["ENOLCK", "ENOTSUP"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every lock call, as some network file systems do."""
    number = getattr(errno, request.param)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)


@pytest.mark.usefixtures("no_locks")
def test_track_is_separated_on_a_file_system_without_locks(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav", 20)
    run = workspace.runner().run([workspace.make_job(path)])
    next(item for _, item in run if isinstance(item, ChunkProcessed))
    run.close()
    assert tree(workspace.folder / "out") == [], "files that no later run can use"
    result = workspace.runner().run_one(workspace.make_job(path))
    assert result.status == "done" and "no file locks" in result.warnings[-1]
    assert len(tree(workspace.folder / "out")) == 3
    assert workspace.runner().run_one(workspace.make_job(path)).status == "skipped"


@pytest.mark.usefixtures("no_locks")
def test_processes_without_locks_do_not_share_files(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_song(workspace.folder / "song.wav", 20)
    alone = Workspace(workspace.folder / "alone")
    alone.run(alone.runner(), [path])
    first = workspace.runner().run([workspace.make_job(path)])
    next(item for _, item in first if isinstance(item, ChunkProcessed))
    locked = workspace.runner().run_one(workspace.make_job(path))
    assert "another process" in locked.error, "threads of one process exclude each other"
    with monkeypatch.context() as patch:
        patch.setattr(process_lock, "_held_in_process", set[str]())  # as in another process
        assert workspace.runner().run_one(workspace.make_job(path)).status == "done"
    assert [item.status for _, item in first if isinstance(item, TrackResult)] == ["done"]
    assert tree(workspace.folder / "out") == tree(alone.folder / "out")
    for stem in STEMS:
        name = f"out/song/{stem}.wav"
        assert (workspace.folder / name).read_bytes() == (alone.folder / name).read_bytes()


@pytest.mark.usefixtures("no_locks")
def test_crashes_count_without_locks(workspace: Workspace) -> None:
    job = workspace.make_job(write_song(workspace.folder / "song.wav"))
    for _ in range(2):
        run = workspace.runner(max_crashes=2).run([job])
        next(run)
        attempts = next((workspace.folder / "out").glob(f"{PARTIAL}/*/attempts"))
        text = attempts.read_text()
        run.close()
        attempts.parent.mkdir(parents=True, exist_ok=True)
        attempts.write_text(text)
    assert workspace.runner(max_crashes=2).run_one(job).status == "quarantined"
    assert workspace.runner().run_one(job).status == "done"
    assert len(tree(workspace.folder / "out")) == 3


def test_workdir_is_exclusive_while_others_remove_it(tmp_path: Path) -> None:
    active, most_active, acquired = 0, 0, 0
    guard = threading.Lock()

    def acquire_and_remove() -> None:
        nonlocal active, most_active, acquired
        deadline = time.monotonic() + 30
        while acquired < 100 and time.monotonic() < deadline:
            workdir = WorkDir(tmp_path / "out", tmp_path / "out/song/stems.json")
            if not workdir.acquire("key"):
                continue
            with guard:
                acquired += 1
                active += 1
                most_active = max(most_active, active)
            assert (workdir.folder / "key").exists()
            with guard:
                active -= 1
            workdir.remove()

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(acquire_and_remove) for _ in range(4)]:
            future.result()
    assert most_active == 1 and acquired >= 100


def test_workdir_is_cleared_though_a_file_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process asks for the lock: its lock library makes a file for a moment."""
    workdir = WorkDir(tmp_path / "out", tmp_path / "out/song/stems.json")
    list_files = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*list_files(path), path / ".probe"])
    assert workdir.acquire("key")
    workdir.remove()
    assert not (tmp_path / "out").exists()


def test_track_that_crashes_its_process_is_quarantined(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav")
    job = workspace.make_job(path)

    def crash() -> None:
        """Leave what a killed process leaves: an attempt in the journal, samples and no lock."""
        run = workspace.runner(max_crashes=2).run([job])
        next(run)
        attempts = next((workspace.folder / "out").glob(f"{PARTIAL}/*/attempts"))
        text = attempts.read_text()
        run.close()
        attempts.write_text(text)
        attempts.with_name("decoded.f32").write_bytes(b"samples")

    crash()
    crash()
    result = workspace.runner(max_crashes=2).run_one(job)
    assert result.status == "quarantined" and "2 times" in result.error
    workdir = next((workspace.folder / "out").glob(f"{PARTIAL}/*"))
    assert f"to try it again, remove {workdir}" in result.error
    assert not list((workspace.folder / "out").glob(f"{PARTIAL}/*/decoded.f32")), "not removed"
    assert workspace.runner(max_crashes=2).run_one(job).status == "quarantined", "tried once more"
    assert workspace.runner().run_one(job).status == "done"


def test_crashes_before_a_forced_run_do_not_count(workspace: Workspace) -> None:
    path = write_song(workspace.folder / "song.wav")
    job = workspace.make_job(path)

    def forced(run_id: str) -> Run:
        return Run(id=run_id, ignores_earlier_crashes=True)

    def crash(run_id: str) -> None:
        run = workspace.runner(max_crashes=2, run=forced(run_id)).run([job])
        next(run)
        attempts = next((workspace.folder / "out").glob(f"{PARTIAL}/*/attempts"))
        text = attempts.read_text()
        run.close()
        attempts.write_text(text)

    for run_id in ("", ""):
        crash(run_id)
    assert workspace.runner(max_crashes=2).run_one(job).status == "quarantined"
    for run_id in ("forced", "forced"):
        crash(run_id)
    runner = workspace.runner(max_crashes=2, run=forced("forced"))
    assert runner.run_one(job).status == "quarantined"
    assert workspace.runner(max_crashes=2).run_one(job).status == "quarantined", (
        "counted from any run"
    )
    runner = workspace.runner(max_crashes=2, run=forced("forced again"))
    assert runner.run_one(job).status == "done"


@pytest.mark.parametrize(("max_tracks_per_batch", "in_progress"), [(1, 2), (3, 3)])
def test_tracks_in_progress_beside_one_that_crashes_are_not_quarantined(
    workspace: Workspace, max_tracks_per_batch: int, in_progress: int
) -> None:
    """Tracks that were read, or shared its batch, at the crash are retried alone."""
    order = SHARED if max_tracks_per_batch > 1 else make_request()
    workspace.network.valid_length = lambda length: RATE  # type: ignore[assignment]
    more: dict[str, Any] = {"max_crashes": 2, "max_tracks_per_batch": max_tracks_per_batch}
    paths = [write_song(workspace.folder / f"{n}.wav", 3, seed=n) for n in range(3)]
    spools = workspace.folder / "out" / PARTIAL

    def crash_in(track: str) -> None:
        """Crash at the first windows of that track, with `in_progress` tracks begun."""
        run = workspace.runner(order, **more).run([workspace.make_job(path) for path in paths])
        next(job for job, item in run if job.track == track and isinstance(item, ChunkProcessed))
        deadline = time.monotonic() + 10
        while len(list(spools.glob("*/attempts"))) < in_progress and time.monotonic() < deadline:
            time.sleep(0.01)
        kept = {path: path.read_text() for path in spools.glob("*/attempts")}
        run.close()
        for path, text in kept.items():
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)

    crash_in("0.wav")
    crash_in("0.wav")
    results = workspace.run(workspace.runner(order, **more), paths)
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
def test_manifest_has_the_sample_rate_of_the_files(
    workspace: Workspace, order: Request, rate: int, is_warned: bool
) -> None:
    [result] = workspace.run(
        workspace.runner(order), [write_song(workspace.folder / "song.wav", 1)]
    )
    assert result.manifest
    assert json.loads(result.manifest.read_text())["sample_rate"] == rate
    assert {soundfile.info(path).samplerate for path in result.stems.values()} == {rate}
    assert [f"{rate} Hz" in warning for warning in result.warnings] == [True] * is_warned


def test_next_track_is_decoded_and_measured_while_one_is_separated(workspace: Workspace) -> None:
    paths = [write_song(workspace.folder / f"{n}.wav", 3, seed=n) for n in range(2)]
    spools = workspace.folder / "out" / PARTIAL
    num_journals = []
    for job, item in workspace.runner().run([workspace.make_job(path) for path in paths]):
        if isinstance(item, ChunkProcessed) and job.track == "0.wav" and item.fraction < 1:
            deadline = time.monotonic() + 10
            while len(list(spools.glob("*/journal"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            num_journals.append(len(list(spools.glob("*/journal"))))
    assert num_journals and set(num_journals) == {2}


def test_track_is_decoded_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Counter[str]()
    decode = AudioReader.blocks

    def count_passes(reader: AudioReader) -> Iterator[Tensor]:
        passes[reader.name] += 1
        return decode(reader)

    monkeypatch.setattr(AudioReader, "blocks", count_passes)
    paths = [write_song(workspace.folder / f"{n}.wav", 20, seed=n) for n in range(2)]
    workspace.run(workspace.runner(), paths)
    assert sorted(passes.values()) == [1, 1]


def test_decoded_samples_are_removed_on_an_interruption(workspace: Workspace) -> None:
    paths = [write_song(workspace.folder / f"{n}.wav", 20, seed=n) for n in range(2)]
    run = workspace.runner().run([workspace.make_job(path) for path in paths])
    next(item for _, item in run if isinstance(item, ChunkProcessed))
    names = [path.name for path in (workspace.folder / "out" / PARTIAL).glob("*/*")]
    assert "decoded.f32" in names
    run.close()
    left = {path.name for path in (workspace.folder / "out" / PARTIAL).glob("*/*")}
    assert "samples.f32" in left and "decoded.f32" not in left


def test_threads_end_with_the_run(workspace: Workspace) -> None:
    before = threading.active_count()
    path = write_song(workspace.folder / "song.wav", 10)
    run = workspace.runner().run([workspace.make_job(path)])
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


def complete_stems(folder: Path, expected: dict[str, int]) -> Iterator[str]:
    """Yield the stems under their final names, and check that they are complete."""
    for path in folder.glob("separated/9d0a6f1c/*/*.wav"):
        assert soundfile.info(path).frames == expected[path.parent.name], path
        yield str(path)


def kill_repeatedly(repo: Path, folder: Path, times: int) -> None:
    lengths = {}
    for n in range(6):
        write_song(folder / f"in/{n}.wav", 20 + n, seed=n)
        lengths[str(n)] = (20 + n) * RATE
    rng = random.Random(0)
    for _ in range(times):
        process = start(repo, folder)
        assert process.stderr
        for _ in range(rng.randrange(1, 40)):  # lines of progress
            process.stderr.readline()
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        list(complete_stems(folder, lengths))
        for manifest in folder.glob("separated/9d0a6f1c/*/stems.json"):
            json.loads(manifest.read_text())
    process = start(repo, folder)
    process.communicate()
    assert process.returncode == 0
    assert len(list(complete_stems(folder, lengths))) == 6 * 4
    assert len(tree(folder / "separated")) == 6 * 5  # and nothing else


def test_run_completes_after_kills_at_random_moments(repo: Path, tmp_path: Path) -> None:
    kill_repeatedly(repo, tmp_path, 4)


@pytest.mark.slow
def test_run_completes_after_many_kills_at_random_moments(repo: Path, tmp_path: Path) -> None:
    kill_repeatedly(repo, tmp_path, 30)


def test_keyboard_interrupt_keeps_partial_results(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "in/long.wav", 600)
    process = start(repo, tmp_path)
    assert process.stderr
    while b"ChunkProcessed" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)  # tests/cli/test_signals.py limits the time
    assert process.returncode == 130
    assert b"Traceback" not in stderr and b"interrupted" in stderr
    assert all(PARTIAL in name for name in tree(tmp_path / "separated"))


def test_files_left_by_a_crash_after_the_last_rename_are_removed(
    repo: Path, tmp_path: Path
) -> None:
    write_song(tmp_path / "in/song.wav", 3)
    start(repo, tmp_path).communicate()
    expected = tree(tmp_path / "separated")
    target = tmp_path / "separated/9d0a6f1c"
    stale = WorkDir(target, target / "song/stems.json").folder
    stale.mkdir(parents=True)
    (stale / "lock").touch()
    (stale / "draft.part").touch()
    start(repo, tmp_path).communicate()
    assert tree(tmp_path / "separated") == expected


def test_crash_before_the_manifest_is_renamed_leaves_no_file(repo: Path, tmp_path: Path) -> None:
    write_song(tmp_path / "in/song.wav", 3)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from demucs_infer.cli.main import main\n"
        "replace = Path.replace\n"
        "def crash(source, target):\n"
        "    os._exit(9) if target.name == 'stems.json' else replace(source, target)\n"
        "Path.replace = crash\n"
        "main(sys.argv[1:])"
    )
    words = ["in", "--repo", str(repo), "-n", "9d0a6f1c", "-q"]
    process = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment(), check=False
    )
    assert process.returncode == 9
    folder = tmp_path / "separated/9d0a6f1c/song"
    assert {path.suffix for path in folder.iterdir()} == {".wav"}
    start(repo, tmp_path).communicate()
    assert len(tree(tmp_path / "separated")) == 4 + 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_duration(tmp_path: Path) -> None:
    """Compare `VmHWM`, the peak memory of the process on Linux."""
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
        run = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, env=environment(), check=True
        )
        peaks.append(int(run.stdout))
        assert load(tmp_path / f"o/9d0a6f1c/{minutes}/drums.wav").shape[0] == minutes * 60 * RATE
    # One copy of the longer mixture would be 220 MB, one of its stems 880 MB.
    assert peaks[1] <= 1.05 * peaks[0], peaks


def test_unusual_file_names(workspace: Workspace) -> None:
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
        path = workspace.folder / "in" / name
        path.parent.mkdir(exist_ok=True)
        save(workspace.folder / "x.wav", make_noise(2, RATE, n))
        (workspace.folder / "x.wav").rename(path)
        paths.append(path)
    results = workspace.run(workspace.runner(), paths)
    assert [result.status for result in results] == ["done"] * len(names)
    assert len(tree(workspace.folder / "out")) == 3 * len(names)


def test_only_empty_folders_made_by_the_run_are_removed(workspace: Workspace) -> None:
    corrupt = [workspace.folder / name for name in ("a.wav", "b.wav", "c.wav")]
    for path in corrupt:
        path.write_bytes(b"no sound")
    out = workspace.folder / "out"
    assert not any(result.ok for result in workspace.run(workspace.runner(), corrupt))
    assert not out.exists()
    out.mkdir()  # by another program
    workspace.run(workspace.runner(), corrupt)
    assert out.is_dir() and not list(out.iterdir())
    out.rmdir()
    good = write_song(workspace.folder / "good.wav", 1)
    assert workspace.run(workspace.runner(), [corrupt[0], good, corrupt[1]])[1].ok
    assert {path.name for path in out.iterdir()} == {"good"}
