"""Test every flag of the command line end to end, with small real checkpoints."""

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from demucs.htdemucs import HTDemucs

from demucs_infer import __version__
from demucs_infer.audio.spool import Spool
from demucs_infer.cli.main import main
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import (
    RATE,
    environment,
    load,
    make_repo,
    run_process,
    save,
    tree,
    write_song,
)
from tests.helpers.networks import TINY
from tests.helpers.oracles import skip_or_fail

STEMS = ["bass", "drums", "other", "vocals"]


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("models") / "repo")


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "song.wav")
    return tmp_path


class Command:
    """`demucs-infer` with the small models, in this process."""

    def __init__(self, repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.repo, self._capsys = repo, capsys
        self.out = self.err = ""

    def __call__(self, line: str, expect: int = 0, model: str = "9d0a6f1c") -> Any:
        words = ["--repo", str(self.repo), "-n", model, "-d", "cpu", *shlex.split(line)]
        code = main(words)
        self.out, self.err = self._capsys.readouterr()
        assert code == expect, self.err
        return json.loads(self.out) if "--json" in words else None


@pytest.fixture
def run(repo: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(repo, capsys)


def stems(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.stem: load(path) for path in sorted(folder.glob("*.wav"))}


def test_process_writes_stems_and_one_line_per_track(repo: Path, work_folder: Path) -> None:
    done = run_process(["song.wav", "--repo", repo, "-n", "bag"], cwd=work_folder)
    assert done.returncode == 0 and done.stdout == b""
    files = [f"bag/song/{stem}.wav" for stem in STEMS] + ["bag/song/stems.json"]
    assert tree(work_folder / "separated") == sorted(files)
    for wav in stems(work_folder / "separated/bag/song").values():
        assert wav.shape == (3 * RATE, 2)
    # Not a terminal: a line for the track, and no bar.
    assert b"\r" not in done.stderr and done.stderr.count(b"\n") == 1


def test_finished_track_does_not_import_torch(repo: Path, work_folder: Path) -> None:
    """Importing torch takes a second, and the command tunes the allocator before it does."""
    words = ["song.wav", "--repo", str(repo), "-n", "bag", "-o", "once"]
    for _ in range(2):
        code = (
            "import sys\nfrom demucs_infer.cli.main import main\n"
            f"assert main({words!r}) == 0\nprint('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=work_folder,
            capture_output=True,
            env=environment(),
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["models", "ls"], ["--nonsense"], ["--list-models"], []],
)
def test_help_and_lists_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom demucs_infer.cli.main import main\n"
        f"try: main({words!r})\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        env=environment(),
        text=True,
    )
    assert "torch was imported" not in done.stderr
    assert done.returncode == (0 if words and words != ["--nonsense"] else 2), done.stderr


def test_script_and_module_print_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("demucs-infer")
    if not script.exists():
        skip_or_fail("the command demucs-infer is not installed")
    for words in (["--help"], ["--version"]):
        script_run = subprocess.run([script, *words], capture_output=True, env=environment())
        assert script_run.stdout == run_process(words, cwd=tmp_path).stdout != b""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"demucs-infer {__version__}\n"


def test_upstream_flags_have_the_same_defaults() -> None:
    from demucs.separate import get_parser

    from demucs_infer.cli.parser import make_parser

    ours = {word: action for action in make_parser()._actions for word in action.option_strings}
    for action in get_parser()._actions:
        for word in action.option_strings:
            assert word in ours, word
            if word in ("-h", "--help"):
                continue
            assert ours[word].nargs == action.nargs, word
            # On purpose: any device, one gain for all stems, the codec's own bit rate and effort,
            # --flac and its like as ways to say --format.
            if word not in ("-d", "--device", "--clip-mode", "--mp3-bitrate", "--mp3-preset",
                            "--flac", "--mp3", "--int24", "--float32"):  # fmt: skip
                assert ours[word].default == action.default, word
    from demucs_infer.audio.formats import FORMATS

    assert (FORMATS["mp3"].bitrate, FORMATS["mp3"].default_preset) == (320, 2)


# ── model ──


def test_model_by_name_and_by_signature(run: Command, work_folder: Path) -> None:
    run("song.wav")
    assert (work_folder / "separated/9d0a6f1c/song/drums.wav").exists()
    assert main(["-s", "4f2b8e3d", "--repo", str(run.repo), "song.wav", "-q"]) == 0
    assert (work_folder / "separated/4f2b8e3d/song/drums.wav").exists()


def test_model_by_path_of_checkpoint(run: Command, work_folder: Path) -> None:
    path = next(run.repo.glob("9d0a6f1c*"))
    assert main(["-n", str(path), "song.wav", "-q"]) == 0
    assert len(list(work_folder.glob("separated/*/song/*.wav"))) == 4


def test_bag_on_the_spot_has_its_own_folder_and_manifest(run: Command, work_folder: Path) -> None:
    run("-d cpu,cpu --gate --max-memory 100GB song.wav", model="bag+4f2b8e3d@0.5")
    folder = work_folder / "separated" / "bag+4f2b8e3d@0.5" / "song"
    assert len(stems(folder)) == 4
    manifest = json.loads((folder / "stems.json").read_text())
    assert len(manifest["recipe"]["weights"]) == 4 and manifest["device"] == "cpu,cpu"
    assert manifest["recipe"]["settings"]["gate"] is True
    assert "max_memory" not in manifest["recipe"]["settings"]
    run("-d cpu --gate song.wav", model="bag+4f2b8e3d@0.5")  # done before, by more devices
    run("-d cpu song.wav", model="bag+nosuch@0.5", expect=4)


def test_list_models_prints_as_upstream(run: Command, capsys: pytest.CaptureFixture[str]) -> None:
    run("--list-models")
    assert run.out.splitlines() == [
        "Bag of models:", "    bag", "Single models:",
        "    1c7e5a90", "    4f2b8e3d", "    9d0a6f1c",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["-n nosuch song.wav", "song.wav --offline --cache-dir empty"])
def test_unavailable_model_exits_with_4_and_one_line(
    line: str, work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(line)) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "models pull htdemucs --to" in err or "no model named" in err
    assert not (work_folder / "separated").exists()


def test_missing_tracks_are_reported_without_download(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no song.wav", "modls", "--offline", "--cache-dir", "empty"]) == 3
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "error: no song.wav: cannot be read: No such file or directory; did you mean song.wav?",
        "error: modls: cannot be read: No such file or directory "
        "(was the command `demucs-infer models` meant?)",
    ]


def test_checkpoint_with_code_is_not_executed(run: Command, work_folder: Path) -> None:
    import torch

    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    folder = work_folder / "evil"
    folder.mkdir()
    torch.save({"klass": Foreign(), "args": (), "kwargs": {}, "state": {}}, folder / "evil.th")
    assert main(["-n", "evil", "--repo", str(folder), "song.wav", "-q"]) == 4
    assert "executed" not in run._capsys.readouterr().out


# ── separation ──


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("--shifts 2", True), ("--overlap 0.5", True), ("--segment 0.7", True), ("--seed 5", True),
        ("--no-split", True), ("--batch-size 4", False), ("-j 2", False), ("-d cpu", False),
        ("--precision auto", None), ("--precision fp32", False),
    ],
)  # fmt: skip
def test_separation_flags_change_stems_or_not(
    run: Command, work_folder: Path, line: str, changes: bool | None
) -> None:
    run("song.wav -o plain --float32")
    run(f"song.wav -o other --float32 {line}")
    plain, other = (
        stems(work_folder / "plain/9d0a6f1c/song"),
        stems(work_folder / "other/9d0a6f1c/song"),
    )
    error = max(float(np.abs(plain[stem] - other[stem]).max()) for stem in STEMS)
    scale = max(float(np.abs(wav).max()) for wav in plain.values())
    if changes is None:  # the fastest of this processor: bf16 is within 40 dB
        assert error < 0.1 * scale
    elif changes:
        assert error > 1e-5
    else:  # the same sums in another order
        assert error <= 1e-5 * max(scale, 1)


def test_unsupported_precision_is_usage_error(run: Command, work_folder: Path) -> None:
    run("song.wav --precision fp16", expect=2)
    assert "GPU" in run.err and "auto" in run.err


def test_same_seed_gives_same_bytes(run: Command, work_folder: Path) -> None:
    run("song.wav -o one --shifts 3")
    run("song.wav -o two --shifts 3")
    for stem in STEMS:
        name = f"9d0a6f1c/song/{stem}.wav"
        assert (work_folder / "one" / name).read_bytes() == (
            work_folder / "two" / name
        ).read_bytes()


# ── stems ──


def test_two_stems_by_every_method(run: Command, work_folder: Path) -> None:
    run("song.wav -o all --float32", model="bag")
    everything = stems(work_folder / "all/bag/song")
    for method, names in (
        ("add", ["drums", "no_drums"]), ("minus", ["drums", "minus_drums"]), ("none", ["drums"]),
    ):  # fmt: skip
        run(
            f"song.wav -o {method} --float32 --two-stems drums --other-method {method}", model="bag"
        )
        written = stems(work_folder / method / "bag/song")
        assert sorted(written) == sorted(names)
        assert np.array_equal(written["drums"], everything["drums"])
        # Sums of float32 in another order: a few units of the last of 24 bits.
        if method == "add":
            rest = sum(everything[stem] for stem in STEMS if stem != "drums")
            assert np.abs(written["no_drums"] - rest).max() < 1e-6
        if method == "minus":
            rest = load(work_folder / "song.wav") - everything["drums"]
            assert np.abs(written["minus_drums"] - rest).max() < 1e-6


def test_stems_and_derive_flags(run: Command, work_folder: Path) -> None:
    run("song.wav -o all --float32")
    everything = stems(work_folder / "all/9d0a6f1c/song")
    run(
        "song.wav -o some --float32 --stems vocals,band "
        "--derive band=bass+other --derive karaoke=mixture-vocals"
    )
    written = stems(work_folder / "some/9d0a6f1c/song")
    assert sorted(written) == ["band", "vocals"]
    assert np.abs(written["band"] - everything["bass"] - everything["other"]).max() < 1e-6


def test_unknown_stems_are_usage_error(run: Command, work_folder: Path) -> None:
    run("song.wav --stems violin --derive x=nothing", expect=2)
    assert "violin" in run.err and "nothing" in run.err and "drums" in run.err


# ── input ──


def test_start_and_duration_select_a_part(run: Command, work_folder: Path) -> None:
    run("song.wav --start 0.5 --duration 1.25")
    part = work_folder / "separated/9d0a6f1c/song [0.5-1.75 s]"
    assert len(load(part / "drums.wav")) == 1.25 * RATE
    run("song.wav --start 0:01")
    assert len(load(work_folder / "separated/9d0a6f1c/song [1- s]/drums.wav")) == 2 * RATE


def test_stems_of_a_part_do_not_replace_those_of_the_track(run: Command, work_folder: Path) -> None:
    run("song.wav")
    whole = (work_folder / "separated/9d0a6f1c/song/drums.wav").read_bytes()
    run("song.wav --duration 1")
    assert (work_folder / "separated/9d0a6f1c/song/drums.wav").read_bytes() == whole


def test_files_of_an_earlier_run_are_listed_and_removed_on_request(
    run: Command, work_folder: Path
) -> None:
    folder = work_folder / "separated/9d0a6f1c/song"
    run("song.wav --page")
    (folder / "notes.txt").write_text("mine")
    run("song.wav --stems vocals")
    left = "bass.wav, other.wav, stems.html"
    assert f"left from earlier runs: drums.wav, {left}" in run.err
    assert len(list(folder.glob("*.wav"))) == 4
    run("song.wav")
    run("song.wav --stems vocals --clean")
    assert "removed: drums.wav, bass.wav, other.wav, stems.html" in run.err
    assert tree(folder) == ["notes.txt", "stems.json", "vocals.wav"]


def test_files_of_earlier_runs_can_be_removed_after_they_were_listed(
    run: Command, work_folder: Path
) -> None:
    folder = work_folder / "separated/9d0a6f1c/song"
    run("song.wav --derive band=bass+other --page")
    run("song.wav --stems drums,bass --flac")
    run("song.wav --stems vocals")
    older = "drums.flac, bass.flac, drums.wav, bass.wav, other.wav, band.wav, stems.html"
    assert f"left from earlier runs: {older} (--clean" in run.err
    run("song.wav --stems vocals")
    assert "done before, skipped" in run.err and "left" not in run.err
    run("song.wav --stems vocals --page")  # the page is one of this run now
    run("song.wav --stems vocals --clean")
    assert "done before, skipped" in run.err
    assert f"removed: {older.removesuffix(', stems.html')}" in run.err
    assert tree(folder) == ["stems.html", "stems.json", "vocals.wav"]
    assert "older_files" not in (folder / "stems.json").read_text("utf-8")


@pytest.mark.parametrize("flags", ["", "--clean", "--skip-existing"])
def test_stems_of_another_file_are_replaced_only_by_force(
    run: Command, work_folder: Path, flags: str
) -> None:
    write_song(work_folder / "x/01.wav", seed=1)
    write_song(work_folder / "y/01.wav", seed=2)
    write_song(work_folder / "z/02.wav", seed=3)
    folder = work_folder / "coll/9d0a6f1c/01"
    run("x/01.wav -o coll")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    run(f"y/01.wav z/02.wav -o coll --flac {flags}", expect=1)
    assert f"{Path('coll/9d0a6f1c/01')} has the stems of {Path('x/01.wav')}: choose" in run.err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert (work_folder / "coll/9d0a6f1c/02/drums.flac").is_file(), "other tracks go on"
    assert run("y/01.wav -o coll --dry-run --json")["tracks"][0]["state"] == "refused"
    run("y/01.wav -o coll --flac --stems vocals --force")
    assert f"replaces the stems of {Path('x/01.wav')}" in run.err
    assert "left from earlier runs: drums.wav" in run.err
    assert sorted(json.loads((folder / "stems.json").read_text("utf-8"))["stems"]) == ["vocals"]


def test_stems_of_another_type_of_the_same_name_are_not_replaced(
    run: Command, work_folder: Path
) -> None:
    samples, _ = soundfile.read(work_folder / "song.wav")
    soundfile.write(work_folder / "song.flac", samples, RATE)
    run("song.flac")
    run("song.wav --stems vocals", expect=1)
    assert "has the stems of song.flac" in run.err


def test_input_is_read_once_to_compare_it_with_earlier_runs(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("song.wav")
    write_song(work_folder / "song.wav", seed=1)
    opened = []
    open_path = Path.open

    def record(path: Path, *rest: Any, **options: Any) -> Any:
        opened.append(path.name)
        return open_path(path, *rest, **options)

    monkeypatch.setattr(Path, "open", record)
    run("song.wav --skip-existing")
    assert opened.count("song.wav") == 1


def test_edited_file_is_separated_again(run: Command, work_folder: Path) -> None:
    song = work_folder / "song.wav"
    run(f"{song} --page")
    write_song(song, seed=1)
    run(f"{song} --stems vocals --clean")
    assert "replaces" not in run.err and "removed: drums.wav" in run.err


def test_relative_path_that_may_be_of_another_folder_is_replaced_with_a_note(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_song(work_folder / "x/01.wav", seed=1)
    write_song(work_folder / "y/01.wav", seed=2)
    monkeypatch.chdir(work_folder / "x")
    run("01.wav -o ../coll")
    monkeypatch.chdir(work_folder / "y")
    run("01.wav -o ../coll --stems vocals --clean")
    assert "replaces the stems of 01.wav, which had other content" in run.err
    kept = "kept, as they may be stems of another input: drums.wav, bass.wav, other.wav (to remove"
    assert kept in run.err
    folder = work_folder / "coll/9d0a6f1c/01"
    assert (folder / "drums.wav").is_file()
    run("01.wav -o ../coll --stems vocals --clean")
    assert tree(folder) == ["stems.json", "vocals.wav"]


def test_moved_file_is_done(run: Command, work_folder: Path) -> None:
    run("song.wav -o coll")
    (work_folder / "moved").mkdir()
    (work_folder / "song.wav").rename(work_folder / "moved/song.wav")
    run("moved/song.wav -o coll")
    assert "done before, skipped" in run.err


def test_other_format_is_encoded_from_exact_stems_of_an_earlier_run(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = 0.05 * make_noise(2, 2 * RATE)  # so that no stem clips
    save(work_folder / "quiet.wav", quiet, subtype="FLOAT")
    run("quiet.wav -o direct --flac --stems drums")
    run("quiet.wav -o reused --float32 --stems drums")
    with monkeypatch.context() as patch:
        patch.setattr("demucs_infer.engine.runner.Runner.infer", None)  # it must not run
        rows = run("quiet.wav -o reused --flac --stems drums --json")["tracks"]
    assert (
        rows[0]["status"] == "done" and rows[0]["resumed_seconds"] == 2 and not rows[0]["warnings"]
    )
    direct, reused = (
        (work_folder / f"{out}/9d0a6f1c/quiet/drums.flac").read_bytes()
        for out in ("direct", "reused")
    )
    assert direct == reused, "as if it had been separated again"


def test_rounded_stems_are_encoded_again_only_on_request(run: Command, work_folder: Path) -> None:
    run("song.wav")
    rows = run("song.wav --flac --json")["tracks"]
    assert rows[0]["resumed_seconds"] == 0 and not rows[0]["warnings"]
    run("song.wav")
    stems_before = stems(work_folder / "separated/9d0a6f1c/song")
    rows = run("song.wav --format aiff --reuse --json")["tracks"]
    assert rows[0]["resumed_seconds"] == 3
    assert rows[0]["warnings"] == ["encoded from the 16-bit stems of an earlier run"]
    for name, before in stems_before.items():
        again = load(work_folder / f"separated/9d0a6f1c/song/{name}.aiff")
        # Rounded once before, and once after the gain was undone and applied again.
        assert np.abs(again - before).max() <= 1.5 / 2**15
    # Damaged files are not used.
    run("song.wav")
    path = work_folder / "separated/9d0a6f1c/song/drums.wav"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    assert run("song.wav --flac --reuse --json")["tracks"][0]["resumed_seconds"] == 0


def test_page_of_a_file_that_browsers_cannot_split_is_refused(
    run: Command, work_folder: Path
) -> None:
    run("song.wav --page --format stem.mp4", expect=2)
    assert "--page cannot play stem.mp4 files" in run.err
    assert not (work_folder / "separated").exists()


def test_manifest_cannot_make_clean_remove_files_elsewhere(run: Command, work_folder: Path) -> None:
    run("song.wav")
    manifest = work_folder / "separated/9d0a6f1c/song/stems.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"drums.wav"', '"../../../song.wav"'))
    run("song.wav --stems vocals --clean")
    assert (work_folder / "song.wav").exists()
    text = manifest.read_text("utf-8")
    manifest.write_text(text.replace("{", '{"older_files": ["../../../song.wav", 3],', 1))
    run("song.wav --stems vocals --clean")
    assert (work_folder / "song.wav").exists()


def test_strict_fails_truncated_track(run: Command, work_folder: Path) -> None:
    whole = (work_folder / "song.wav").read_bytes()
    (work_folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    rows = run("cut.wav --json")["tracks"]
    assert "missing" in rows[0]["warnings"][0]
    run("cut.wav -o strict --strict", expect=3)
    assert not list(work_folder.glob("strict/**/*.wav"))


def test_folders_are_mirrored_and_run_continues_after_bad_file(
    run: Command, work_folder: Path
) -> None:
    write_song(work_folder / "music/a/one.wav", seed=1)
    write_song(work_folder / "music/b/one.flac", seed=2)
    (work_folder / "music/notes.txt").write_text("not a song")
    (work_folder / "music/bad.wav").write_bytes(b"RIFF....WAVEnonsense")
    summary = run("music --json --progress none", expect=1)
    assert (summary["done"], summary["failed"]) == (2, 1)
    bad = [row for row in summary["tracks"] if row["status"] == "failed"]
    assert [row["track"] for row in bad] == ["music/bad.wav"]
    assert "bad.wav" in run.err and "Traceback" not in run.err
    folder = work_folder / "separated/9d0a6f1c"
    assert (folder / "a/one/drums.wav").exists() and (folder / "b/one/drums.wav").exists()
    # What was written is not taken for music in the next run.
    assert len(run(". --json", expect=1)["tracks"]) == 4


def test_pattern_selects_tracks(run: Command, work_folder: Path) -> None:
    write_song(work_folder / "x1.wav")
    write_song(work_folder / "x2.wav")
    assert len(run("'x*.wav' --json")["tracks"]) == 2


@pytest.mark.usefixtures("one_thread")
def test_standard_input_to_standard_output(repo: Path, work_folder: Path) -> None:
    words = ["-", "-o", "-", "--stems", "vocals", "--repo", repo, "-n", "9d0a6f1c", "--flac"]
    done = run_process(words, cwd=work_folder, stdin=(work_folder / "song.wav").read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"-: vocals to standard output (")
    piped, rate = soundfile.read(io.BytesIO(done.stdout), always_2d=True)
    assert rate == RATE and main(["song.wav", *map(str, words[3:])]) == 0
    expected = soundfile.read(work_folder / "separated/9d0a6f1c/song/vocals.flac", always_2d=True)[
        0
    ]
    assert np.array_equal(piped, expected)
    assert tree(work_folder) == sorted(
        ["song.wav", "separated/9d0a6f1c/song/vocals.flac", "separated/9d0a6f1c/song/stems.json"]
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_gives_same_stems_as_file(run: Command, work_folder: Path) -> None:
    os.mkfifo(work_folder / "pipe")
    writer = threading.Thread(
        target=lambda: (work_folder / "pipe").write_bytes((work_folder / "song.wav").read_bytes())
    )
    writer.start()
    run("pipe song.wav")
    writer.join()
    piped, plain = (stems(work_folder / f"separated/9d0a6f1c/{name}") for name in ("pipe", "song"))
    assert piped and all(np.array_equal(piped[name], plain[name]) for name in STEMS)


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(
    ("closed", "line", "code", "message"),
    [
        ("<&-", "-", 2, b"standard input, which is closed"),
        (">&-", "song.wav -o - --stems drums", 2, b"standard output, which is closed"),
        ("2>&-", "song.wav", 0, b""),
        ("<&- >&- 2>&-", "song.wav", 0, b""),
    ],
)
def test_closed_standard_streams(
    repo: Path, work_folder: Path, closed: str, line: str, code: int, message: bytes
) -> None:
    words = [sys.executable, "-m", "demucs_infer", "--repo", repo, "-n", "9d0a6f1c"]
    command = f"{shlex.join(map(str, words))} {line} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment())
    assert done.returncode == code, done.stderr
    assert (
        message in done.stderr and b"Traceback" not in done.stderr and b"report" not in done.stderr
    )
    files = stems(work_folder / "separated/9d0a6f1c/song") if code == 0 else {}
    assert code or sorted(files) == STEMS


@pytest.mark.parametrize("line", ["song.wav -o -", "song.wav - -o - --stems drums"])
def test_standard_output_takes_one_stem_of_one_track(
    run: Command, work_folder: Path, line: str
) -> None:
    run(line, expect=2)
    assert "--out -" in run.err


# ── output ──


def test_out_and_filename_place_files(run: Command, work_folder: Path) -> None:
    run("song.wav -o elsewhere --filename '{stem}/{track}.{trackext}.{ext}'")
    assert (work_folder / "elsewhere/9d0a6f1c/drums/song.wav.wav").exists()
    for bad in ("{track}.{ext}", "../{stem}.{ext}", "{stem}/{nope}"):
        run(f"song.wav --filename '{bad}'", expect=2)
        assert run.err.startswith("error: invalid --filename ")


@pytest.mark.parametrize(
    ("line", "suffix", "subtype"),
    [
        ("", "wav", "PCM_16"), ("--int24", "wav", "PCM_24"), ("--float32", "wav", "FLOAT"),
        ("--bits 24", "wav", "PCM_24"), ("--bits source", "wav", "PCM_24"),
        ("--flac", "flac", "PCM_16"),
        ("--format flac --bits 24", "flac", "PCM_24"), ("--mp3", "mp3", "MPEG_LAYER_III"),
        ("--mp3 --mp3-bitrate 64 --mp3-preset 7", "mp3", "MPEG_LAYER_III"),
        ("--format ogg", "ogg", "VORBIS"), ("--format aiff", "aiff", "PCM_16"),
        ("--mp3-bitrate 200 --mp3-preset 3", "wav", "PCM_16"),
    ],
)  # fmt: skip
def test_format_flags(
    run: Command, work_folder: Path, line: str, suffix: str, subtype: str
) -> None:
    save(work_folder / "deep.wav", make_noise(2, RATE), subtype="PCM_24")
    run(f"deep.wav {line}")
    info = soundfile.info(work_folder / f"separated/9d0a6f1c/deep/drums.{suffix}")
    assert (info.subtype, info.samplerate, info.channels) == (subtype, RATE, 2)
    assert info.frames == RATE


def test_lower_bitrate_gives_smaller_files(run: Command, work_folder: Path) -> None:
    sizes = []
    for rate in (32, 64):
        run(f"song.wav -o {rate} --mp3 --mp3-bitrate {rate}")
        sizes.append((work_folder / f"{rate}/9d0a6f1c/song/drums.mp3").stat().st_size)
    assert sizes[0] < 0.6 * sizes[1]


def test_rate_and_channels_of_the_source(run: Command, work_folder: Path) -> None:
    write_song(work_folder / "mono.wav", 1.0001, rate=11025, channels=1)
    run("mono.wav --rate source --channels source")
    info = soundfile.info(work_folder / "separated/9d0a6f1c/mono/drums.wav")
    assert (info.samplerate, info.channels, info.frames) == (11025, 1, round(1.0001 * 11025))
    run("mono.wav -o other --rate 22050 --channels 2")
    info = soundfile.info(work_folder / "other/9d0a6f1c/mono/drums.wav")
    assert (info.samplerate, info.channels) == (22050, 2)


def test_clip_modes(run: Command, work_folder: Path) -> None:
    save(work_folder / "loud.wav", 30 * make_noise(2, RATE), subtype="FLOAT")
    run("loud.wav -o none --clip-mode none --float32")
    truth = stems(work_folder / "none/9d0a6f1c/loud")
    peaks = {stem: float(np.abs(wav).max()) for stem, wav in truth.items()}
    assert max(peaks.values()) > 1  # otherwise nothing is tested

    row = run("loud.wav -o track --json")["tracks"][0]
    top = 1 - 2.0**-15
    assert row["gain"] == pytest.approx(top / max(peaks.values()))
    shared = stems(work_folder / "track/9d0a6f1c/loud")
    for stem in STEMS:
        # Rounded together, each stem is within a step of its own value.
        assert np.abs(shared[stem] - row["gain"] * truth[stem]).max() <= 1.0001 * 2.0**-15
    run("loud.wav -o each --clip-mode rescale --float32")
    for stem, wav in stems(work_folder / "each/9d0a6f1c/loud").items():
        expected = truth[stem] / max(1.01 * peaks[stem], 1)
        assert np.abs(wav - expected).max() < 1e-6 * max(peaks.values())
    run("loud.wav -o clamp --clip-mode clamp --float32")
    for stem, wav in stems(work_folder / "clamp/9d0a6f1c/loud").items():
        assert np.abs(wav - truth[stem].clip(-0.99, 0.99)).max() < 1e-6


def test_tags_are_copied_unless_disabled(run: Command, work_folder: Path) -> None:
    from demucs_infer.audio.reader import probe
    from demucs_infer.audio.writer import AudioWriter

    with AudioWriter(
        work_folder / "tagged.flac", RATE, 2, tags={"title": "A", "artist": "B"}
    ) as out:
        out.write(make_noise(2, RATE))
    run("tagged.flac --flac")
    tags = probe(work_folder / "separated/9d0a6f1c/tagged/drums.flac").tags
    assert (tags["title"], tags["artist"]) == ("A (drums)", "B")
    run("tagged.flac --flac --no-tags -o bare")
    assert "artist" not in probe(work_folder / "bare/9d0a6f1c/tagged/drums.flac").tags


def test_manifest_describes_run(run: Command, work_folder: Path) -> None:
    from demucs_infer.system.checksum import sha256_file

    run("song.wav --overlap 0.1 --seed 3")
    folder = work_folder / "separated/9d0a6f1c/song"
    manifest = json.loads((folder / "stems.json").read_text())
    recipe = manifest["recipe"]
    assert recipe["input_sha256"] == sha256_file(work_folder / "song.wav")
    assert recipe["weights"] == [sha256_file(next(run.repo.glob("9d0a6f1c*")))]
    assert (recipe["settings"]["overlap"], recipe["settings"]["seed"]) == (0.1, 3)
    assert set(recipe["versions"]) == {"demucs-infer", "torch"}
    assert (manifest["sample_rate"], manifest["gain"], manifest["duration_seconds"]) == (
        RATE,
        1.0,
        3.0,
    )
    for stem, entry in manifest["stems"].items():
        assert entry["sha256"] == sha256_file(folder / entry["file"]), stem
    run("song.wav -o bare --no-manifest")
    assert tree(work_folder / "bare") == [f"9d0a6f1c/song/{stem}.wav" for stem in STEMS]


# ── run and report ──


def test_finished_track_is_skipped_until_anything_changes(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status() -> str:
        return run("song.wav --json")["tracks"][0]["status"]

    assert [status(), status()] == ["done", "skipped"]
    assert run("song.wav --json --force")["tracks"][0]["status"] == "done"
    drums = work_folder / "separated/9d0a6f1c/song/drums.wav"
    drums.write_bytes(drums.read_bytes()[:-2])
    assert [status(), status()] == ["done", "skipped"]
    write_song(work_folder / "song.wav", seed=9)
    assert [status(), status()] == ["done", "skipped"]
    assert run("song.wav --json --overlap 0.3")["tracks"][0]["status"] == "done"
    assert run("song.wav --json --skip-existing")["tracks"][0]["status"] == "skipped"
    monkeypatch.setattr("demucs_infer.batch.request.__version__", "0.0")
    assert status() == "done"


def test_collisions_are_refused_or_numbered(run: Command, work_folder: Path) -> None:
    write_song(work_folder / "a/song.wav", seed=1)
    write_song(work_folder / "b/song.wav", seed=2)
    run("a/song.wav b/song.wav", expect=2)
    assert "a/song.wav" in run.err and "b/song.wav" in run.err
    assert not (work_folder / "separated").exists()
    write_song(work_folder / "c/song.wav", seed=3)
    write_song(work_folder / "c/song.flac", seed=4)
    run("c -o types --collisions error", expect=2)
    run("c -o types")
    folders = {path.parent.name for path in (work_folder / "types").glob("*/*/drums.wav")}
    assert folders == {"song-flac", "song-wav"}
    assert "c/song.flac: another track has this name, so it is song-flac" in run.err
    run("a/song.wav b/song.wav --collisions number")
    assert (work_folder / "separated/9d0a6f1c/song-2/drums.wav").exists()
    # Stems that would lie on top of a track.
    write_song(work_folder / "out/9d0a6f1c/drums.wav")
    before = (work_folder / "out/9d0a6f1c/drums.wav").read_bytes()
    run("out/9d0a6f1c/drums.wav -o out --filename '{stem}.{ext}'", expect=2)
    assert (work_folder / "out/9d0a6f1c/drums.wav").read_bytes() == before


def test_dry_run_estimates_without_writing(run: Command, work_folder: Path) -> None:
    report = run("song.wav gone.wav --dry-run --json", model="bag")
    assert [track["state"] for track in report["tracks"]] == ["to do", "cannot be read"]
    assert report["audio_seconds"] == 3 and report["stems"] == ["drums", "bass", "other", "vocals"]
    # Four 16-bit stereo files, and their samples and those of the track as floats.
    assert report["disk_bytes"] == 3 * RATE * 2 * (4 * (2 + 4) + 4)
    assert report["run_seconds"] >= 0 and report["memory_bytes"] > 1 << 20
    assert report["precision"] == "fp32" and report["window_bytes"] > 0
    assert not (work_folder / "separated").exists()
    run("song.wav --dry-run", model="bag")
    assert "song.wav: 3 s, to do" in run.out
    assert re.search(r"each window that runs at a time takes about \d+\.\d\d GB of it", run.out)
    run("song.wav --dry-run --precision auto", model="bag")
    auto = r"precision: (bf16 .*has instructions for bf16|fp32 .*would be slower in bf16)"
    assert re.search(auto, run.out)
    assert main(["song.wav", "--dry-run", "--json", "--cache-dir", str(work_folder / "none")]) == 0
    report = json.loads(run._capsys.readouterr().out)
    assert report["to_download"][0]["file"].startswith("955717e8")


def test_progress_json_prints_every_event(run: Command, work_folder: Path) -> None:
    summary = run("song.wav --progress json --json")
    lines = [json.loads(line) for line in run.err.splitlines()]
    names = [line["event"] for line in lines]
    assert names[0] == "Stage.Started" and names[-1] == "InferenceOutput"
    fractions = [line["fraction"] for line in lines if line["event"] == "ChunkProcessed"]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    assert lines[-1]["stems"] == summary["tracks"][0]["stems"]
    assert set(summary["tracks"][0]) >= {"track", "model", "stems", "seconds", "gain", "status"}
    for path in summary["tracks"][0]["stems"].values():
        assert Path(path).is_file()


def test_bar_fits_into_eighty_columns(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a song with a name that is much too long for a line of eighty columns.wav"
    (work_folder / "song.wav").rename(work_folder / name)
    run(f"'{name}' --progress bar")
    frames = [frame for frame in run.err.replace("\n", "\r").split("\r") if "%" in frame]
    assert "100%|" in frames[-1] and "| 3/3 [" in frames[-1]  # in a pipe, as upstream's
    assert all(len(frame.rstrip()) <= 80 for frame in frames)


@pytest.mark.parametrize(("line", "lines"), [("", 1), ("-q", 0), ("--progress none", 0)])
def test_number_of_lines_printed(run: Command, work_folder: Path, line: str, lines: int) -> None:
    run(f"song.wav {line}")
    assert (run.out, len(run.err.splitlines())) == ("", lines)
    run(f"gone.wav {line}", expect=3)
    assert run.err.splitlines()[-1].startswith("error: gone.wav")


def test_only_debug_shows_traceback(run: Command, work_folder: Path) -> None:
    (work_folder / "bad.wav").write_bytes(b"no sound")
    run("bad.wav -v", expect=3)
    assert "Traceback" not in run.err
    run("bad.wav --debug", expect=3)
    assert "Traceback" in run.err and "AudioReadError" in run.err
    run("bad.wav", expect=3)
    assert "Traceback" not in run.err


def test_demo_writes_stems_and_scores(run: Command, work_folder: Path) -> None:
    rows = run("--demo --json")["tracks"]
    assert [row["track"] for row in rows] == ["demo"]
    assert len(load(work_folder / "separated/9d0a6f1c/demo/drums.wav")) == 20 * RATE
    assert len(load(work_folder / "separated/9d0a6f1c/demo/mixture.wav")) == 20 * 44_100
    assert "sdr" in run.err.lower()


@pytest.mark.parametrize(
    "line",
    [
        "song.wav --overlap 1", "song.wav --overlap nan", "song.wav --shifts -1",
        "song.wav --segment 0", "song.wav --segment 1e-4",
        "song.wav --no-split --segment 2", "song.wav --mp3 --flac",
        "song.wav --bits 12", "song.wav --int24 --float32", "song.wav --batch-size 0",
        "song.wav --two-stems drums --stems bass", "song.wav --rate 0", "song.wav --start -1",
    ],
)  # fmt: skip
def test_invalid_flags_are_usage_errors(run: Command, work_folder: Path, line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(line)
    assert caught.value.code == 2
    err = run._capsys.readouterr().err
    assert "error: " in err and "Traceback" not in err


@pytest.mark.parametrize(
    "flag", ["-n htdemucs", "-s 9d0a6f1c"]
)  # the default, given explicitly, too
def test_named_and_custom_models_exclude_each_other(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["song.wav", *flag.split(), "--config", "a.json", "--checkpoint", "a.th"])
    assert caught.value.code == 2
    assert "--config: not allowed with argument -" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "song.wav --format flac --float32",
        "song.wav -d nosuchdevice",
        "song.wav -n a",
        "song.wav --rate 7",
        "song.wav --rate 99999999",
    ],
)
def test_impossible_settings_are_one_line_errors(
    run: Command, work_folder: Path, line: str
) -> None:
    try:
        code: object = main(["--repo", str(run.repo), "-n", "9d0a6f1c", *shlex.split(line)])
    except SystemExit as wrong_usage:
        code = wrong_usage.code
    err = run._capsys.readouterr().err
    assert code in (2, 4) and "error: " in err and "Traceback" not in err


def test_out_of_memory_error_suggests_shorter_segment(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = TINY["HTDemucs"] | {
        "use_train_segment": False
    }  # it pads to the length that is requested
    network = HTDemucs(**kwargs)
    package = {"klass": HTDemucs, "args": (), "kwargs": kwargs, "state": network.state_dict()}
    torch.save(package, work_folder / "free.th")
    assert main(["song.wav", "--repo", str(work_folder), "-n", "free", "--segment", "1e9"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: song.wav: out of memory: a shorter") and err.count("\n") == 1
    assert not tree(work_folder / "separated")


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_out_below_a_file_is_refused_before_any_work(
    run: Command, work_folder: Path, out: str
) -> None:
    (work_folder / "taken").write_text("not a folder")
    run(f"song.wav -o {out}", expect=2)
    assert "must be a folder, but taken is a file" in run.err
    assert (work_folder / "taken").read_text() == "not a folder"


def test_full_disk_error_names_files_and_suggests_freeing_space(
    run: Command, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Spool, "append", append)  # a full disk needs a mount, and that needs root
    run("song.wav -o out", expect=1)
    assert "song/drums.wav and 3 more: No space left on device; free some space" in run.err
    assert not list((work_folder / "out").rglob("*.wav"))


def test_collision_error_names_the_shared_file(run: Command, work_folder: Path) -> None:
    for folder in ("a", "b"):
        (work_folder / folder).mkdir()
        (work_folder / folder / "song.wav").write_bytes((work_folder / "song.wav").read_bytes())
    run("a/song.wav b/song.wav -o out", expect=2)
    assert "would both become out/9d0a6f1c/song/{stem}.wav" in run.err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that is not writable")
def test_output_folder_that_cannot_be_created_is_an_error(run: Command, work_folder: Path) -> None:
    run("song.wav -o /proc/nowhere", expect=1)
    assert "cannot write /proc/nowhere/9d0a6f1c: No such file or directory" in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
def test_file_name_that_is_not_utf_8_is_done_once(repo: Path, work_folder: Path) -> None:
    song = Path(os.fsdecode(os.fsencode(work_folder) + b"/lat\xe9.wav"))
    song.write_bytes((work_folder / "song.wav").read_bytes())
    words = [song, "--repo", repo, "-n", "9d0a6f1c", "-o", "out", "--json"]
    for outcome in ("done", "skipped"):
        summary = json.loads(run_process(words, cwd=work_folder).stdout)
        assert summary[outcome] == 1 and summary["tracks"][0]["track"] == str(song)
    manifest = next((work_folder / "out").rglob("stems.json"))
    assert json.loads(manifest.read_text("utf-8"))["input"] == str(song)
