"""Test that mistakes get one line of advice, in the words of the flags that were typed."""

import io
import json
import shlex
from pathlib import Path

import pytest

from demucs_infer.batch.workdir import WorkDir
from demucs_infer.cli import doctor
from demucs_infer.cli.main import main
from demucs_infer.cli.progress import make_reporter
from demucs_infer.options import OPTIONS
from tests.helpers.cli_process import write_song


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path / "song.wav", 1)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("song.wav --model htdemucs", "use --name instead of --model"),
        ("song.wav --model=htdemucs", "use --name instead of --model"),
        ("song.wav --ogg", "use --format ogg instead of --ogg"),
        ("song.wav --twostems vocals", "use --two-stems instead of --twostems"),
        (
            "song.wav -o out other.wav",
            "name all tracks in one place, before the flags or after them",
        ),
        ("song.wav --cuda", "use --device cuda instead of --cuda"),
        ("song.wav --end 0:10", "use --duration (seconds after --start) instead of --end"),
        ("song.wav --to=0:10", "use --duration (seconds after --start) instead of --to"),
        ("song.wav --stop 10", "use --duration (seconds after --start) instead of --stop"),
        ("song.wav --config nope.yaml", "--config nope.yaml: no such file"),
        ("song.wav --start 1:90", "or a time as m:ss or h:mm:ss, with ss below 60"),
        ("song.wav --format aif", "; did you mean aiff?"),
        ("song.wav --format oga", "; did you mean ogg?"),
        ("song.wav --format mpeg", "; did you mean mp3?"),
        ("song.wav --format aac", "; did you mean m4a?"),
        ("song.wav --format mp33", "; did you mean mp3?"),
        ("song.wav --format .MPEG", "; did you mean mp3?"),
        ("song.wav --format xyz", "m4a, stem.mp4, alac, aiff, caf"),
        ("song.wav --window han", "; did you mean hann?"),
        ("separate song.mp3", "no command is needed: demucs-infer song.mp3"),
        ("seperate", "no command is needed: demucs-infer song.mp3"),
        ("serve --modles tiny", "use --models instead of --modles"),
        ("serve tiny", "error: unrecognized arguments: tiny"),
        ("serve --port web", "argument --port: 'web': expected a whole number"),
        ("serve --job-seconds soon", "argument --job-seconds: 'soon': expected a number"),
        ("batch list.txt --model htdemucs", "use --name instead of --model"),
    ],
)
def test_unknown_flag_suggests_the_right_one(
    line: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(advice)


@pytest.mark.parametrize(
    ("line", "code", "advice"),
    [
        ("song.wav -n tiny -d nosuch", 2, "error: --device 'nosuch' is not a device; use"),
        ("song.wav --filename {track}.{ext}", 2, "error: invalid --filename '{track}.{ext}'"),
        ("https://host/song.mp3", 3, "is a URL: download it, and name the file"),
        ("*.flac", 3, "No such file or directory, and no file matches it as a pattern"),
        (
            "empty",
            2,
            "no audio files in empty: give files such as wav, flac, mp3 or m4a, or a folder",
        ),
        ("sogn.wav", 3, "error: sogn.wav: cannot be read: No such file or directory; did you mean"),
        ("./sogn.wav", 3, "; did you mean song.wav?"),
        ("silent.wav -n tiny -q", 3, "error: cannot read silent.wav: the file is empty"),
        ("batch empty", 2, "for a folder or a song: demucs-infer empty"),
        ("batch song.wav", 2, "for a folder or a song: demucs-infer song.wav"),
        (
            "song.wav --mp3 --bitrate 9",
            2,
            "error: unsupported --bitrate 9 for mp3: use 8 or 16",
        ),
        (
            "song.wav -n tiny -q --mp3 --mp3-bitrate 16",
            2,
            "error: unsupported --mp3-bitrate 16 for mp3 of 44100 Hz and 2 channels: use 32",
        ),
        (
            "song.wav -n tiny -q --format opus --channels 1 --bitrate 300",
            2,
            "error: unsupported --bitrate 300 for opus of 48000 Hz and 1 channel: use 6 to 256",
        ),
        (
            "song.wav --format stem.mp4 --stems vocals",
            2,
            "error: a stem.mp4 file has 4 stems, and --stems vocals gives 1: omit that flag",
        ),
        (
            "batch list --format stem.mp4 --two-stems vocals",
            2,
            "error: a stem.mp4 file has 4 stems, and --two-stems vocals gives two: omit that flag",
        ),
        (
            "song.wav -n tiny -q --format stem.mp4 --derive rest=bass+other",
            2,
            "error: a stem file has 4 stems, not 5",
        ),
        (
            "song.wav -n tiny -q --max-memory 2",
            2,
            "error: --max-memory 2 bytes is too little: a size",
        ),
    ],
)
@pytest.mark.usefixtures("work_folder")
def test_mistake_is_one_line_with_advice(
    line: str, code: int, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("silent.wav").touch()
    assert main(shlex.split(line)) == code
    error = capsys.readouterr().err
    assert advice in error and error.count("\n") == 1


def test_unquoted_name_with_spaces_is_recognized(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work_folder / "a long tune.wav").touch()
    assert main(["gone.wav", "./a", "long", "tune.wav", "--offline"]) == 3
    errors = capsys.readouterr().err.splitlines()
    advice = "No such file or directory; put quotes around the name: './a long tune.wav'"
    assert [error.endswith(advice) for error in errors] == [False, True, True, True]


def test_similar_names_are_not_sought_in_a_missing_folder(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(work_folder / "nowhere" / "song.wav"), "--offline"]) == 3
    assert capsys.readouterr().err.endswith("No such file or directory\n")


def test_unknown_device_is_an_error_before_any_download(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(work_folder / "cache")
    assert main(["song.wav", "-d", "nosuch", "--cache-dir", cache, "--offline"]) == 2
    assert "--device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("--mp3 --bits 24", "warning: --bits 24 has no effect on mp3 files"),
        ("--bitrate 9", "warning: --bitrate 9 has no effect on wav files"),
        ("--mp3-bitrate 128", "warning: --mp3-bitrate 128 has no effect on wav files"),
        (
            "--mp3-bitrate 128 --mp3-preset 3",
            "warning: --mp3-bitrate 128 and --mp3-preset 3 have no effect on wav files",
        ),
    ],
)
@pytest.mark.usefixtures("work_folder")
def test_flags_without_effect_are_one_warning(
    line: str, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", *shlex.split(line)]) == 0
    assert capsys.readouterr().err.splitlines()[0] == warning
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", "-q", *shlex.split(line)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("work_folder")
def test_bar_is_preceded_by_what_takes_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", "--progress", "bar"]) == 0
    first, note, second = capsys.readouterr().err.splitlines()[:3]
    assert [first, second] == ["loading tiny", "reading song.wav"]
    assert note.startswith("note: tiny is a small model, trained on synthetic music")


def test_track_in_progress_elsewhere_is_skipped_without_an_error(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path("separated/tiny/song/stems.json")
    other = WorkDir(manifest.parents[1], manifest)
    assert other.acquire("key")
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "song.wav: skipped: in progress elsewhere" in err and "error:" not in err
    summary = json.loads(out)
    assert (summary["skipped"], summary["failed"], summary["tracks"][0]["stems"]) == (1, 0, {})
    other.release()


@pytest.mark.parametrize(
    ("progress", "quiet"), [("bar", True), ("auto", False), ("json", False), ("none", False)]
)
def test_stages_are_not_printed_without_a_bar(progress: str, quiet: bool) -> None:
    stream = io.StringIO()
    make_reporter(progress, quiet=quiet, stream=stream).show_stage("loading tiny")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("start", "1:30", 90),
        ("start", "1:02:03.5", 3723.5),
        ("duration", "0:15", 15),
        ("duration", "90", 90),
        ("overlap", "25%", 0.25),
        ("overlap", "0.1", 0.1),
    ],
)
def test_times_and_percentages_are_parsed(name: str, text: str, value: float) -> None:
    assert OPTIONS[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("start", "1:60"),
        ("start", "-1:30"),
        ("start", "1:2:3:4"),
        ("start", "1:"),
        ("start", "1:nan"),
        ("duration", "0:00"),
        ("overlap", "100%"),
        ("overlap", "%"),
        ("segment", "1:30"),
    ],
)
def test_invalid_times_and_percentages_are_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        OPTIONS[name].parse(text)


def test_help_has_examples_and_says_what_is_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n  demucs-infer song.mp3") == 3
    assert "htdemucs is downloaded at first use" in text and "tiny" in text


def test_message_has_the_path_of_its_track_once(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["song.wav", "-n", "tiny", "-d", "cpu", "--start", "1:30"]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: song.wav ends at 1.00 s, before the requested start at 90 s"


def test_doctor_lists_a_format_either_as_there_or_as_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_version = doctor._find_version
    monkeypatch.setattr(
        doctor, "_find_version", lambda name: None if name == "soundfile" else find_version(name)
    )
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "ogg" not in report["formats"] and "opus" in report["formats"]
    assert report["missing_encoders"] == ["libsndfile, for ogg (pip install soundfile)"]


def test_models_ls_marks_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lines_of = {line.split()[0]: line for line in lines if line.strip()}
    assert "(default: start here)" in lines_of["htdemucs"]
    assert "(to try the program; trained on synthetic music)" in lines_of["tiny"]
    assert sum("start here" in line for line in lines) == 1


def test_invalid_yaml_is_reported_with_its_place_on_one_line(
    work_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work_folder / "bad.yaml").write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(SystemExit) as caught:
        main(["song.wav", "--config", "bad.yaml", "--checkpoint", "x.ckpt"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "bad.yaml: not valid YAML: expected ',' or ']'" in last and ", line 2, column" in last


@pytest.mark.parametrize("line", ["models", "models list"])
def test_models_are_listed_without_the_exact_action(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "ls"]) == 0
    listing = capsys.readouterr().out
    assert main(line.split()) == 0
    assert capsys.readouterr().out == listing


def test_help_as_a_word_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: demucs-infer [options] TRACK")


def test_track_with_the_name_of_a_verb_is_a_track(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("separate").mkdir()
    assert main(["separate"]) == 2
    assert "no audio files in separate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "usage"),
    [("--modles tiny", "usage: demucs-infer serve [options]"), ("--port 99999", "argument --port")],
)
def test_serve_refuses_a_mistake_in_two_lines(
    line: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *line.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and usage in error and error.count("\n") == 2


def test_config_schema_is_that_of_config(capsys: pytest.CaptureFixture[str]) -> None:
    from demucs_infer.custom.config import Config

    assert main(["config-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Config.json_schema()
