"""Every flag of the command line does what it says, end to end, with real checkpoints."""

import errno
import io
import json
import os
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
    save,
    shell,
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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_the_plain_command_in_a_process_of_its_own(repo: Path, here: Path) -> None:
    done = shell(["song.wav", "--repo", repo, "-n", "bag"], cwd=here)
    assert done.returncode == 0 and done.stdout == b""
    files = [f"bag/song/{stem}.wav" for stem in STEMS] + ["bag/song/stems.json"]
    assert tree(here / "separated") == sorted(files)
    for wav in stems(here / "separated/bag/song").values():
        assert wav.shape == (3 * RATE, 2)
    # Not a terminal: a line for the track, and no bar.
    assert b"\r" not in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["models", "ls"], ["--nonsense"], ["--list-models"], []],
)
def test_words_need_no_torch(words: list[str], tmp_path: Path) -> None:
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


def test_both_ways_in_are_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("demucs-infer")
    if not script.exists():
        skip_or_fail("the command demucs-infer is not installed")
    for words in (["--help"], ["--version"]):
        once = subprocess.run([script, *words], capture_output=True, env=environment())
        assert once.stdout == shell(words, cwd=tmp_path).stdout != b""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"demucs-infer {__version__}\n"


def test_every_flag_of_upstream_is_here_with_its_default() -> None:
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


def test_name_and_signature(run: Command, here: Path) -> None:
    run("song.wav")
    assert (here / "separated/9d0a6f1c/song/drums.wav").exists()
    assert main(["-s", "4f2b8e3d", "--repo", str(run.repo), "song.wav", "-q"]) == 0
    assert (here / "separated/4f2b8e3d/song/drums.wav").exists()


def test_a_checkpoint_by_its_path(run: Command, here: Path) -> None:
    path = next(run.repo.glob("9d0a6f1c*"))
    assert main(["-n", str(path), "song.wav", "-q"]) == 0
    assert len(list(here.glob("separated/*/song/*.wav"))) == 4


def test_list_models(run: Command, capsys: pytest.CaptureFixture[str]) -> None:
    run("--list-models")
    assert run.out.splitlines() == [
        "Bag of models:", "    bag", "Single models:",
        "    1c7e5a90", "    4f2b8e3d", "    9d0a6f1c",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["-n nosuch song.wav", "song.wav --offline --cache-dir empty"])
def test_a_model_that_cannot_be_had(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(line)) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "sha256" in err or "no model named" in err
    assert not (here / "separated").exists()


def test_a_track_that_is_not_there_fetches_no_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no song.wav", "modls", "--offline", "--cache-dir", "empty"]) == 3
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: no song.wav: cannot be read: No such file or directory",
        "error: modls: cannot be read: No such file or directory "
        "(was the command `demucs-infer models` meant?)",
    ]


def test_trust_is_asked_for_by_name(run: Command, here: Path) -> None:
    import torch

    class Foreign:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    folder = here / "evil"
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
def test_how_to_separate(run: Command, here: Path, line: str, changes: bool | None) -> None:
    run("song.wav -o plain --float32")
    run(f"song.wav -o other --float32 {line}")
    plain, other = stems(here / "plain/9d0a6f1c/song"), stems(here / "other/9d0a6f1c/song")
    error = max(float(np.abs(plain[stem] - other[stem]).max()) for stem in STEMS)
    scale = max(float(np.abs(wav).max()) for wav in plain.values())
    if changes is None:  # whatever is fastest on this processor: bf16 promises 40 dB
        assert error < 0.1 * scale
    elif changes:
        assert error > 1e-5
    else:  # the same sums in another order
        assert error <= 1e-5 * max(scale, 1)


def test_precision_that_this_machine_does_not_have(run: Command, here: Path) -> None:
    run("song.wav --precision fp16", expect=2)
    assert "GPU" in run.err and "auto" in run.err


def test_same_seed_same_bytes(run: Command, here: Path) -> None:
    run("song.wav -o one --shifts 3")
    run("song.wav -o two --shifts 3")
    for stem in STEMS:
        name = f"9d0a6f1c/song/{stem}.wav"
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()


# ── stems ──


def test_two_stems(run: Command, here: Path) -> None:
    run("song.wav -o all --float32", model="bag")
    everything = stems(here / "all/bag/song")
    for method, names in (
        ("add", ["drums", "no_drums"]), ("minus", ["drums", "minus_drums"]), ("none", ["drums"]),
    ):  # fmt: skip
        run(
            f"song.wav -o {method} --float32 --two-stems drums --other-method {method}", model="bag"
        )
        found = stems(here / method / "bag/song")
        assert sorted(found) == sorted(names)
        assert np.array_equal(found["drums"], everything["drums"])
        # Sums of float32 in another order: a few units of the last of 24 bits.
        if method == "add":
            rest = sum(everything[stem] for stem in STEMS if stem != "drums")
            assert np.abs(found["no_drums"] - rest).max() < 1e-6
        if method == "minus":
            rest = load(here / "song.wav") - everything["drums"]
            assert np.abs(found["minus_drums"] - rest).max() < 1e-6


def test_stems_and_rules(run: Command, here: Path) -> None:
    run("song.wav -o all --float32")
    everything = stems(here / "all/9d0a6f1c/song")
    run(
        "song.wav -o some --float32 --stems vocals,band "
        "--derive band=bass+other --derive karaoke=mixture-vocals"
    )
    found = stems(here / "some/9d0a6f1c/song")
    assert sorted(found) == ["band", "vocals"]
    assert np.abs(found["band"] - everything["bass"] - everything["other"]).max() < 1e-6


def test_stems_that_do_not_exist(run: Command, here: Path) -> None:
    run("song.wav --stems violin --derive x=nothing", expect=2)
    assert "violin" in run.err and "nothing" in run.err and "drums" in run.err


# ── input ──


def test_a_part_of_a_track(run: Command, here: Path) -> None:
    run("song.wav --start 0.5 --duration 1.25")
    assert len(load(here / "separated/9d0a6f1c/song/drums.wav")) == 1.25 * RATE


def test_strict(run: Command, here: Path) -> None:
    whole = (here / "song.wav").read_bytes()
    (here / "cut.wav").write_bytes(whole[: len(whole) // 2])
    rows = run("cut.wav --json")["tracks"]
    assert "missing" in rows[0]["warnings"][0]
    run("cut.wav -o strict --strict", expect=3)
    assert not list(here.glob("strict/**/*.wav"))


def test_folders_are_mirrored_and_one_bad_file_is_not_the_end(run: Command, here: Path) -> None:
    write_song(here / "music/a/one.wav", seed=1)
    write_song(here / "music/b/one.flac", seed=2)
    (here / "music/notes.txt").write_text("not a song")
    (here / "music/bad.wav").write_bytes(b"RIFF....WAVEnonsense")
    found = run("music --json --progress none", expect=1)
    assert (found["done"], found["failed"]) == (2, 1)
    bad = [row for row in found["tracks"] if row["status"] == "failed"]
    assert [row["track"] for row in bad] == ["music/bad.wav"]
    assert "bad.wav" in run.err and "Traceback" not in run.err
    folder = here / "separated/9d0a6f1c"
    assert (folder / "a/one/drums.wav").exists() and (folder / "b/one/drums.wav").exists()
    # What was written is not taken for music in the next run.
    assert len(run(". --json", expect=1)["tracks"]) == 4


def test_patterns(run: Command, here: Path) -> None:
    write_song(here / "x1.wav")
    write_song(here / "x2.wav")
    assert len(run("'x*.wav' --json")["tracks"]) == 2


@pytest.mark.usefixtures("one_thread")
def test_pipes(repo: Path, here: Path) -> None:
    words = ["-", "-o", "-", "--stems", "vocals", "--repo", repo, "-n", "9d0a6f1c", "--flac"]
    done = shell(words, cwd=here, given=(here / "song.wav").read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"-: vocals to standard output (")
    piped, rate = soundfile.read(io.BytesIO(done.stdout), always_2d=True)
    assert rate == RATE and main(["song.wav", *map(str, words[3:])]) == 0
    expected = soundfile.read(here / "separated/9d0a6f1c/song/vocals.flac", always_2d=True)[0]
    assert np.array_equal(piped, expected)
    assert tree(here) == sorted(
        ["song.wav", "separated/9d0a6f1c/song/vocals.flac", "separated/9d0a6f1c/song/stems.json"]
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_what_comes_through_a_pipe_with_a_name(run: Command, here: Path) -> None:
    os.mkfifo(here / "pipe")
    giver = threading.Thread(
        target=lambda: (here / "pipe").write_bytes((here / "song.wav").read_bytes())
    )
    giver.start()
    run("pipe song.wav")
    giver.join()
    piped, plain = (stems(here / f"separated/9d0a6f1c/{name}") for name in ("pipe", "song"))
    assert piped and all(np.array_equal(piped[name], plain[name]) for name in STEMS)


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(
    ("closed", "line", "code", "said"),
    [
        ("<&-", "-", 2, b"standard input, which is closed"),
        (">&-", "song.wav -o - --stems drums", 2, b"standard output, which is closed"),
        ("2>&-", "song.wav", 0, b""),
        ("<&- >&- 2>&-", "song.wav", 0, b""),
    ],
)
def test_streams_that_are_closed(
    repo: Path, here: Path, closed: str, line: str, code: int, said: bytes
) -> None:
    words = [sys.executable, "-m", "demucs_infer", "--repo", repo, "-n", "9d0a6f1c"]
    command = f"{shlex.join(map(str, words))} {line} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment())
    assert done.returncode == code, done.stderr
    assert said in done.stderr and b"Traceback" not in done.stderr and b"report" not in done.stderr
    files = stems(here / "separated/9d0a6f1c/song") if code == 0 else {}
    assert code or sorted(files) == STEMS


@pytest.mark.parametrize("line", ["song.wav -o -", "song.wav - -o - --stems drums"])
def test_one_stem_of_one_track_fits_through_a_pipe(run: Command, here: Path, line: str) -> None:
    run(line, expect=2)
    assert "--out -" in run.err


# ── output ──


def test_where_files_go(run: Command, here: Path) -> None:
    run("song.wav -o elsewhere --filename '{stem}/{track}.{trackext}.{ext}'")
    assert (here / "elsewhere/9d0a6f1c/drums/song.wav.wav").exists()
    for bad in ("{track}.{ext}", "../{stem}.{ext}", "{stem}/{nope}"):
        run(f"song.wav --filename '{bad}'", expect=2)
        assert run.err.startswith("error: template=")


@pytest.mark.parametrize(
    ("line", "suffix", "subtype"),
    [
        ("", "wav", "PCM_16"), ("--int24", "wav", "PCM_24"), ("--float32", "wav", "FLOAT"),
        ("--bits 24", "wav", "PCM_24"), ("--bits source", "wav", "PCM_24"),
        ("--flac", "flac", "PCM_16"),
        ("--format flac --bits 24", "flac", "PCM_24"), ("--mp3", "mp3", "MPEG_LAYER_III"),
        ("--mp3 --mp3-bitrate 128 --mp3-preset 7", "mp3", "MPEG_LAYER_III"),
        ("--format ogg", "ogg", "VORBIS"), ("--format aiff", "aiff", "PCM_16"),
        ("--mp3-bitrate 200 --mp3-preset 3", "wav", "PCM_16"),
    ],
)  # fmt: skip
def test_formats(run: Command, here: Path, line: str, suffix: str, subtype: str) -> None:
    save(here / "deep.wav", make_noise(2, RATE), subtype="PCM_24")
    run(f"deep.wav {line}")
    info = soundfile.info(here / f"separated/9d0a6f1c/deep/drums.{suffix}")
    assert (info.subtype, info.samplerate, info.channels) == (subtype, RATE, 2)
    assert info.frames == RATE


def test_bitrates_differ(run: Command, here: Path) -> None:
    sizes = []
    for rate in (32, 128):
        run(f"song.wav -o {rate} --mp3 --mp3-bitrate {rate}")
        sizes.append((here / f"{rate}/9d0a6f1c/song/drums.mp3").stat().st_size)
    assert sizes[0] < 0.6 * sizes[1]  # at 8 kHz the format ends at 64


def test_rate_and_channels_of_the_source(run: Command, here: Path) -> None:
    write_song(here / "mono.wav", 1.0001, rate=11025, channels=1)
    run("mono.wav --rate source --channels source")
    info = soundfile.info(here / "separated/9d0a6f1c/mono/drums.wav")
    assert (info.samplerate, info.channels, info.frames) == (11025, 1, round(1.0001 * 11025))
    run("mono.wav -o other --rate 22050 --channels 2")
    info = soundfile.info(here / "other/9d0a6f1c/mono/drums.wav")
    assert (info.samplerate, info.channels) == (22050, 2)


def test_clipping(run: Command, here: Path) -> None:
    save(here / "loud.wav", 30 * make_noise(2, RATE), subtype="FLOAT")
    run("loud.wav -o none --clip-mode none --float32")
    truth = stems(here / "none/9d0a6f1c/loud")
    peaks = {stem: float(np.abs(wav).max()) for stem, wav in truth.items()}
    assert max(peaks.values()) > 1  # or nothing here is tested

    row = run("loud.wav -o track --json")["tracks"][0]
    top = 1 - 2.0**-15
    assert row["gain"] == pytest.approx(top / max(peaks.values()))
    shared = stems(here / "track/9d0a6f1c/loud")
    for stem in STEMS:
        # Rounded together, each stem is within a step of its own value.
        assert np.abs(shared[stem] - row["gain"] * truth[stem]).max() <= 1.0001 * 2.0**-15
    run("loud.wav -o each --clip-mode rescale --float32")
    for stem, wav in stems(here / "each/9d0a6f1c/loud").items():
        expected = truth[stem] / max(1.01 * peaks[stem], 1)
        assert np.abs(wav - expected).max() < 1e-6 * max(peaks.values())
    run("loud.wav -o clamp --clip-mode clamp --float32")
    for stem, wav in stems(here / "clamp/9d0a6f1c/loud").items():
        assert np.abs(wav - truth[stem].clip(-0.99, 0.99)).max() < 1e-6


def test_tags_are_carried_unless_not(run: Command, here: Path) -> None:
    from demucs_infer.audio.reader import probe
    from demucs_infer.audio.writer import AudioWriter

    with AudioWriter(here / "tagged.flac", RATE, 2, tags={"title": "A", "artist": "B"}) as out:
        out.write(make_noise(2, RATE))
    run("tagged.flac --flac")
    tags = probe(here / "separated/9d0a6f1c/tagged/drums.flac").tags
    assert (tags["title"], tags["artist"]) == ("A (drums)", "B")
    run("tagged.flac --flac --no-tags -o bare")
    assert "artist" not in probe(here / "bare/9d0a6f1c/tagged/drums.flac").tags


def test_the_manifest(run: Command, here: Path) -> None:
    from demucs_infer.system.checksum import sha256_file

    run("song.wav --overlap 0.1 --seed 3")
    folder = here / "separated/9d0a6f1c/song"
    told = json.loads((folder / "stems.json").read_text())
    recipe = told["recipe"]
    assert recipe["input_sha256"] == sha256_file(here / "song.wav")
    assert recipe["weights"] == [sha256_file(next(run.repo.glob("9d0a6f1c*")))]
    assert (recipe["settings"]["overlap"], recipe["settings"]["seed"]) == (0.1, 3)
    assert set(recipe["versions"]) == {"demucs-infer", "torch"}
    assert (told["sample_rate"], told["gain"], told["duration_seconds"]) == (RATE, 1.0, 3.0)
    for stem, entry in told["stems"].items():
        assert entry["sha256"] == sha256_file(folder / entry["file"]), stem
    run("song.wav -o bare --no-manifest")
    assert tree(here / "bare") == [f"9d0a6f1c/song/{stem}.wav" for stem in STEMS]


# ── what to do, and what to say ──


def test_done_is_done(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = lambda: run("song.wav --json")["tracks"][0]["status"]  # noqa: E731 (said often)
    assert [state(), state()] == ["done", "skipped"]
    assert run("song.wav --json --force")["tracks"][0]["status"] == "done"
    drums = here / "separated/9d0a6f1c/song/drums.wav"
    drums.write_bytes(drums.read_bytes()[:-2])
    assert [state(), state()] == ["done", "skipped"]
    write_song(here / "song.wav", seed=9)
    assert [state(), state()] == ["done", "skipped"]
    assert run("song.wav --json --overlap 0.3")["tracks"][0]["status"] == "done"
    assert run("song.wav --json --skip-existing")["tracks"][0]["status"] == "skipped"
    monkeypatch.setattr("demucs_infer.batch.request.__version__", "0.0")
    assert state() == "done"


def test_collisions(run: Command, here: Path) -> None:
    write_song(here / "a/song.wav", seed=1)
    write_song(here / "b/song.wav", seed=2)
    run("a/song.wav b/song.wav", expect=2)
    assert "a/song.wav" in run.err and "b/song.wav" in run.err
    assert not (here / "separated").exists()
    run("a/song.wav b/song.wav --collisions number")
    assert (here / "separated/9d0a6f1c/song-2/drums.wav").exists()
    # Stems that would lie on top of a track.
    write_song(here / "out/9d0a6f1c/drums.wav")
    before = (here / "out/9d0a6f1c/drums.wav").read_bytes()
    run("out/9d0a6f1c/drums.wav -o out --filename '{stem}.{ext}'", expect=2)
    assert (here / "out/9d0a6f1c/drums.wav").read_bytes() == before


def test_dry_run(run: Command, here: Path) -> None:
    found = run("song.wav gone.wav --dry-run --json", model="bag")
    assert [track["state"] for track in found["tracks"]] == ["to do", "cannot be read"]
    assert found["audio_seconds"] == 3 and found["stems"] == ["drums", "bass", "other", "vocals"]
    # Four 16-bit stereo files, and their samples and those of the track as floats.
    assert found["disk_bytes"] == 3 * RATE * 2 * (4 * (2 + 4) + 4)
    assert found["run_seconds"] >= 0 and found["memory_bytes"] > 1 << 20
    assert not (here / "separated").exists()
    run("song.wav --dry-run", model="bag")
    assert "song.wav: 3 s, to do" in run.out
    assert main(["song.wav", "--dry-run", "--json", "--cache-dir", str(here / "none")]) == 0
    told = json.loads(run._capsys.readouterr().out)
    assert told["to_download"][0]["file"].startswith("955717e8")


def test_progress_as_json(run: Command, here: Path) -> None:
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


def test_a_bar_of_eighty_columns(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a song with a name that is much too long for a line of eighty columns.wav"
    (here / "song.wav").rename(here / name)
    run(f"'{name}' --progress bar")
    frames = [frame for frame in run.err.replace("\n", "\r").split("\r") if "%" in frame]
    assert "100%" in frames[-1] and "3/3 s" in frames[-1]
    assert all(len(frame.rstrip()) <= 80 for frame in frames)


@pytest.mark.parametrize(("line", "lines"), [("", 1), ("-q", 0), ("--progress none", 0)])
def test_how_much_is_said(run: Command, here: Path, line: str, lines: int) -> None:
    run(f"song.wav {line}")
    assert (run.out, len(run.err.splitlines())) == ("", lines)
    run(f"gone.wav {line}", expect=3)
    assert run.err.splitlines()[-1].startswith("error: gone.wav")


def test_debug_shows_where(run: Command, here: Path) -> None:
    (here / "bad.wav").write_bytes(b"no sound")
    run("bad.wav -v", expect=3)
    assert "Traceback" not in run.err
    run("bad.wav --debug", expect=3)
    assert "Traceback" in run.err and "AudioReadError" in run.err
    run("bad.wav", expect=3)
    assert "Traceback" not in run.err


def test_the_demo(run: Command, here: Path) -> None:
    rows = run("--demo --json")["tracks"]
    assert [row["track"] for row in rows] == ["demo"]
    assert len(load(here / "separated/9d0a6f1c/demo/drums.wav")) == 20 * RATE
    assert len(load(here / "separated/9d0a6f1c/demo/mixture.wav")) == 20 * 44_100
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
def test_wrong_usage(run: Command, here: Path, line: str) -> None:
    with pytest.raises(SystemExit) as left:
        run(line)
    assert left.value.code == 2
    err = run._capsys.readouterr().err
    assert "error: " in err and "Traceback" not in err


@pytest.mark.parametrize("flag", ["-n htdemucs", "-s 9d0a6f1c"])  # the default, said aloud, too
def test_a_known_network_and_one_of_your_own_exclude_each_other(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["song.wav", *flag.split(), "--config", "a.json", "--checkpoint", "a.th"])
    assert left.value.code == 2
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
def test_what_cannot_be_done_is_said_in_a_line(run: Command, here: Path, line: str) -> None:
    try:
        code: object = main(["--repo", str(run.repo), "-n", "9d0a6f1c", *shlex.split(line)])
    except SystemExit as wrong_usage:
        code = wrong_usage.code
    err = run._capsys.readouterr().err
    assert code in (2, 4) and "error: " in err and "Traceback" not in err


def test_more_memory_than_there_is_is_told_with_a_way_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = TINY["HTDemucs"] | {"use_train_segment": False}  # it pads to whatever it is told
    network = HTDemucs(**kwargs)
    package = {"klass": HTDemucs, "args": (), "kwargs": kwargs, "state": network.state_dict()}
    torch.save(package, here / "free.th")
    assert main(["song.wav", "--repo", str(here), "-n", "free", "--segment", "1e9"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: song.wav: out of memory: a shorter") and err.count("\n") == 1
    assert not tree(here / "separated")


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_an_output_folder_that_is_a_file_is_refused_before_any_work(
    run: Command, here: Path, out: str
) -> None:
    (here / "taken").write_text("not a folder")
    run(f"song.wav -o {out}", expect=2)
    assert "--out names a folder" in run.err
    assert (here / "taken").read_text() == "not a folder"


def test_a_disk_without_room_is_told_with_the_folder_and_the_way_out(
    run: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Spool, "append", append)  # a full disk needs a mount, and that needs root
    run("song.wav -o out", expect=1)
    assert "song/drums.wav and 3 more: No space left on device; free some space" in run.err
    assert not list((here / "out").rglob("*.wav"))


def test_two_tracks_of_one_name_are_told_by_what_they_would_become(
    run: Command, here: Path
) -> None:
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "song.wav").write_bytes((here / "song.wav").read_bytes())
    run("a/song.wav b/song.wav -o out", expect=2)
    assert "would both become out/9d0a6f1c/song/{stem}.wav" in run.err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which nothing can be made")
def test_a_folder_that_cannot_be_made_is_told_as_what_it_is(run: Command, here: Path) -> None:
    run("song.wav -o /proc/nowhere", expect=1)
    assert "cannot write /proc/nowhere/9d0a6f1c: No such file or directory" in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
def test_a_name_that_is_not_utf_8_has_a_manifest_and_is_done_once(repo: Path, here: Path) -> None:
    song = Path(os.fsdecode(os.fsencode(here) + b"/lat\xe9.wav"))
    song.write_bytes((here / "song.wav").read_bytes())
    words = [song, "--repo", repo, "-n", "9d0a6f1c", "-o", "out", "--json"]
    for outcome in ("done", "skipped"):
        told = json.loads(shell(words, cwd=here).stdout)
        assert told[outcome] == 1 and told["tracks"][0]["track"] == str(song)
    manifest = next((here / "out").rglob("stems.json"))
    assert json.loads(manifest.read_text("utf-8"))["input"] == str(song)
