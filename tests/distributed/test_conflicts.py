"""No row of a catalogue writes over the stems of another one, or over anybody's input."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demucs_infer.cli.main import main
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import TrackRow
from tests.helpers.cli_process import environment, make_repo, write_song

MODEL = "9d0a6f1c"
STEMS = ("drums", "bass", "other", "vocals")
CLAIMS = OutputConflicts(model_folder="m", extension="wav", template="{track}/{stem}.{ext}")


def row(path: str) -> TrackRow:
    return TrackRow(path=path, source=f"/music/{path}")


SAME = [
    ["../t1.wav", "__/t1.wav"],
    ["same.wav", "same.flac"],
    ["a:b.wav", "a/b.wav"],
    ["s3://b/x.wav", "gs://b/x.wav", "b/x.wav"],
    ["a\x01.wav", "a_.wav"],
]


@pytest.mark.parametrize("paths", SAME, ids=str)
def test_rows_that_would_share_their_files_are_found(paths: list[str]) -> None:
    rows = [row(path) for path in [*paths, "another.wav", "another.wav"]]
    conflicting, count = CLAIMS.find(rows)
    assert len(conflicting) == 1 and count == len(rows)
    [told] = CLAIMS.describe_conflicts(rows, conflicting)
    assert all(path in told for path in paths) and "another" not in told


def test_a_stem_in_a_name_may_be_part_of_another_name() -> None:
    claims = replace(CLAIMS, template="{track}_{stem}.{ext}", stems=("vocals", "no_vocals"))
    rows = [row("tone.wav"), row("tone_no.wav"), row("calm.wav")]
    conflicting, _ = claims.find(rows)
    assert claims.describe_conflicts(rows, conflicting) == [
        "tone.wav and tone_no.wav would all become m/tone_no_vocals.wav"
    ]


def test_of_many_quarrels_some_are_told() -> None:
    rows = [row(f"{folder}{n}.wav") for folder in ("a/", "a:") for n in range(50)]
    conflicting, _ = CLAIMS.find(rows)
    told = CLAIMS.describe_conflicts(rows, conflicting)
    assert len(conflicting) == 50 and len(told) == 10
    assert all(" and " in one for one in told)


def test_inputs_are_known_by_other_names(tmp_path: Path) -> None:
    """By a link to their folder, as URIs, and as true stems."""
    folder = tmp_path / "real/m/song"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    song = TrackRow(path="song.wav", source=str(tmp_path / "song.wav"))
    for source in (tmp_path / "link/m/song/drums.wav", folder / "drums.wav"):
        for out in (tmp_path / "real", tmp_path / "link", f"file://{tmp_path}/link"):
            rows = [song, TrackRow(path="x", source=str(source))]
            assert list(CLAIMS.overwritten(rows, str(out))), (source, out)
    assert list(CLAIMS.overwritten(rows, f"local://{tmp_path}/real"))
    scored = TrackRow(path="song.wav", source=song.source, references=str(folder))
    assert list(CLAIMS.overwritten([scored], str(tmp_path / "real")))


NAMES = st.text("aAäé.:/\\_~-0\x01\ud800", min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1, max_size=12))
@example(["a/b", "a//b", "a:b", "./a/b"])
@example([".", "..", "...", "/"])
def test_with_digests_every_file_has_one_row(paths: list[str]) -> None:
    rows = [row(path) for path in paths]
    conflicting, _ = CLAIMS.find(rows)
    claims = replace(CLAIMS, conflicting=conflicting)
    owners: dict[Path, set[str]] = {}
    for one in rows:
        for file in claims.target(one).stems(STEMS).values():
            owners.setdefault(file, set()).add(one.source)
    for sources in owners.values():
        # "a/b" and "./a/b" are one file that is listed twice.
        assert len({Path(source).as_posix() for source in sources}) == 1
    plain = {one.path: CLAIMS.target(one).stems(STEMS) for one in rows}
    for one in rows:  # and nobody is called another name without need
        if claims.target(one).stems(STEMS) != plain[one.path]:
            others = [path for path, files in plain.items() if files == plain[one.path]]
            assert len(others) > 1


def test_a_million_rows_would_take_a_few_megabytes() -> None:
    """16 bytes a row and as many to sort them, 8 for their order, 16 in order: below 100.

    In a process of its own: what other tests left behind grows in its own time.
    """
    code = "from tests.distributed.test_conflicts import peak; print(peak(5_000), peak(50_000))"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, check=True
    ).stdout
    low, high = map(int, told.split())
    assert high - low < 100 * 45_000


def peak(count: int) -> int:
    """The most memory that it takes to look at so many rows."""
    tracemalloc.start()
    assert CLAIMS.find(Rows(count)) == (frozenset(), count)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


class Rows:
    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[TrackRow]:
        return (row(f"{n % 99}/{n}.wav") for n in range(self._count))


@pytest.mark.parametrize(
    ("template", "inside", "is_lost"),
    [
        ("{stem}.{ext}", "m/drums.wav", True),
        ("{track}/{stem}.{ext}", "m/drums.wav", False),
        ("{track}/{stem}.{ext}", "m/song/drums.wav", True),
        ("{track}/{stem}.{ext}", "m/song/deeper/drums.wav", True),
        ("{track}/{stem}.{ext}", "m/other/drums.wav", False),
        ("{stem}/{track}.{ext}", "m/drums/song.wav", True),
        ("{track}/{stem}.{ext}", "n/song/drums.wav", False),
        ("{track}/{stem}.{ext}", "memory://out/m/song/drums.wav", False),
    ],
)
def test_inputs_that_would_be_overwritten(template: str, inside: str, is_lost: bool) -> None:
    source = inside if "://" in inside else f"/out/{inside}"
    rows = [TrackRow(path="song.wav", source="/music/song.wav"), TrackRow(path="x", source=source)]
    claims = replace(CLAIMS, template=template)
    assert list(claims.overwritten(rows, "/out")) == ([source] if is_lost else [])


# ── from the command line ──


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repo(tmp_path_factory.mktemp("claims") / "repo")


def words_for(repo: Path, folder: Path, *paths: str) -> list[str]:
    manifest = folder / "list.jsonl"
    manifest.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    words = ["batch", str(manifest), "--repo", str(repo), "-n", MODEL, "-d", "cpu", "-q"]
    return [*words, "-o", str(folder / "out")]


def test_two_songs_with_one_output(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before any work; or both are made, in every shard under the same names."""
    write_song(tmp_path / "t1.wav", 1, seed=1)
    write_song(tmp_path / "in/__/t1.wav", 1, seed=2)
    write_song(tmp_path / "in/calm.wav", 1, seed=3)
    words = words_for(repo, tmp_path / "in", "../t1.wav", "__/t1.wav", "calm.wav")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "../t1.wav and __/t1.wav" in told and "--collisions digest" in told
    assert not (tmp_path / "in/out").exists()

    for shard in range(3):
        assert main([*words, "--collisions", "digest", "--shard", f"{shard}/3"]) == 0
    made = list((tmp_path / "in/out").rglob("drums.wav"))
    assert len(made) == len({hashlib.sha256(path.read_bytes()).digest() for path in made}) == 3
    assert tmp_path / f"in/out/{MODEL}/calm-wav/drums.wav" in made
    assert main([*words, "--collisions", "digest", "--results", str(tmp_path / "t.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [one["status"] for one in rows] == ["skipped"] * 3

    no_track = [*words, "--collisions", "digest", "--filename", "{stem}.{ext}"]
    assert main(no_track) == 2 and "{track} in --filename" in capsys.readouterr().err


def test_stems_never_replace_the_song(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song = write_song(tmp_path / f"out/{MODEL}/drums.wav", 1)
    before = song.read_bytes()
    words = words_for(repo, song.parent, "drums.wav")
    words[-1] = str(tmp_path / "out")
    assert main([*words, "--filename", "{stem}.{ext}"]) == 2
    assert "drums.wav" in capsys.readouterr().err
    assert song.read_bytes() == before
    assert main(words) == 0
    assert song.read_bytes() == before
