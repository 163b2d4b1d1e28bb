"""No row of a manifest overwrites the stems of another one, or an input."""

import hashlib
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demucs_infer.batch.request import ModelSpec
from demucs_infer.cli.main import main
from demucs_infer.distributed.conflicts import OutputConflicts
from demucs_infer.distributed.manifest import TrackRow
from demucs_infer.options import Request
from tests.helpers.batch_runs import MODEL, STEMS, batch_words, read_table, write_manifest
from tests.helpers.cli_process import environment, write_song

OUTPUTS = OutputConflicts(model_folder="m", extension="wav", template="{track}/{stem}.{ext}")


def row(path: str) -> TrackRow:
    return TrackRow(path=path, source=f"/music/{path}")


CONFLICTS = [
    ["../t1.wav", "__/t1.wav"],
    ["same.wav", "same.flac"],
    ["a:b.wav", "a/b.wav"],
    ["s3://b/x.wav", "gs://b/x.wav", "b/x.wav"],
    ["a\x01.wav", "a_.wav"],
]


@pytest.mark.parametrize("paths", CONFLICTS, ids=ascii)
def test_rows_with_the_same_outputs_are_in_conflict(paths: list[str]) -> None:
    rows = [row(path) for path in [*paths, "another.wav", "another.wav"]]
    shared_path_digests, count = OUTPUTS.find(rows)
    assert len(shared_path_digests) == 1 and count == len(rows)
    [text] = OUTPUTS.describe(rows, shared_path_digests)
    assert all(path in text for path in paths) and "another" not in text


def test_stems_of_a_part_have_a_folder_of_their_own() -> None:
    request = Request().replace(
        {"start": 10.0, "duration": 5.0, "template": "{track}/{stem}.{ext}"}
    )
    outputs = OutputConflicts.from_request(ModelSpec(name="tiny"), request)
    path = outputs.output_paths(row("song.wav")).stems(["drums"])["drums"]
    assert path == Path("tiny/song [10-15 s]/drums.wav")


def test_track_and_stem_in_one_name_may_be_in_conflict() -> None:
    outputs = replace(OUTPUTS, template="{track}_{stem}.{ext}", stems=("vocals", "no_vocals"))
    rows = [row("tone.wav"), row("tone_no.wav"), row("calm.wav")]
    shared_path_digests, _ = outputs.find(rows)
    assert outputs.describe(rows, shared_path_digests) == [
        "tone.wav and tone_no.wav would all become m/tone_no_vocals.wav"
    ]


def test_only_some_of_many_conflicts_are_described() -> None:
    rows = [row(f"{folder}{n}.wav") for folder in ("a/", "a:") for n in range(50)]
    shared_path_digests, _ = OUTPUTS.find(rows)
    texts = OUTPUTS.describe(rows, shared_path_digests)
    assert len(shared_path_digests) == 50 and len(texts) == 10
    assert all(" and " in text for text in texts)


def test_overwritten_inputs_are_found_under_other_names(tmp_path: Path) -> None:
    """By a link to their folder, as URIs, and as references."""
    folder = tmp_path / "real/m/song"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    song = TrackRow(path="song.wav", source=str(tmp_path / "song.wav"))
    for source in (tmp_path / "link/m/song/drums.wav", folder / "drums.wav"):
        for out in (tmp_path / "real", tmp_path / "link", f"file://{tmp_path}/link"):
            rows = [song, TrackRow(path="x", source=str(source))]
            assert list(OUTPUTS.find_overwritten_inputs(rows, str(out))), (source, out)
    assert list(OUTPUTS.find_overwritten_inputs(rows, f"local://{tmp_path}/real"))
    scored = TrackRow(path="song.wav", source=song.source, references=str(folder))
    assert list(OUTPUTS.find_overwritten_inputs([scored], str(tmp_path / "real")))


NAMES = st.text("aAäé.:/\\_~-0\x01\ud800", min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1, max_size=12))
@example(["a/b", "a//b", "a:b", "./a/b"])
@example([".", "..", "...", "/"])
def test_digests_in_names_resolve_all_conflicts(paths: list[str]) -> None:
    rows = [row(path) for path in paths]
    shared_path_digests, _ = OUTPUTS.find(rows)
    outputs = replace(OUTPUTS, shared_path_digests=shared_path_digests)
    owners: dict[Path, set[str]] = {}
    for track in rows:
        for file in outputs.output_paths(track).stems(STEMS).values():
            owners.setdefault(file, set()).add(track.source)
    for sources in owners.values():
        # "a/b" and "./a/b" are one file that is listed twice.
        assert len({Path(source).as_posix() for source in sources}) == 1
    plain = {track.path: OUTPUTS.output_paths(track).stems(STEMS) for track in rows}
    for track in rows:  # names change only where they must
        if outputs.output_paths(track).stems(STEMS) != plain[track.path]:
            others = [path for path, files in plain.items() if files == plain[track.path]]
            assert len(others) > 1


def test_memory_is_less_than_100_bytes_per_row() -> None:
    """16 bytes per row and as many to sort them, 8 for their order, 16 in order.

    In a process of its own, without the garbage of other tests.
    """
    code = "from tests.distributed.test_conflicts import peak; print(peak(5_000), peak(25_000))"
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, check=True
    ).stdout
    low, high = map(int, output.split())
    assert high - low < 100 * 20_000


def peak(count: int) -> int:
    """Return the peak of memory for so many rows.

    Without Python's table of interned strings: `pathlib` enters every part of a path, and the table
    doubles at times of its own.
    """
    with mock.patch.object(sys, "intern", str):
        tracemalloc.start()
        assert OUTPUTS.find(LazyRows(count)) == (frozenset(), count)
        _, num_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return num_bytes


class LazyRows:
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
def test_overwritten_inputs_are_found(template: str, inside: str, is_lost: bool) -> None:
    source = inside if "://" in inside else f"/out/{inside}"
    rows = [TrackRow(path="song.wav", source="/music/song.wav"), TrackRow(path="x", source=source)]
    outputs = replace(OUTPUTS, template=template)
    assert list(outputs.find_overwritten_inputs(rows, "/out")) == ([source] if is_lost else [])


# ── from the command line ──


def words_for(repo: Path, folder: Path, *paths: str) -> list[str]:
    manifest = write_manifest(folder / "list.jsonl", [{"path": path} for path in paths])
    return batch_words(manifest, repo, folder / "out")


@pytest.fixture
def conflicting_words(repo: Path, tmp_path: Path) -> list[str]:
    """Return the command line for two songs with the same output, and a third one."""
    write_song(tmp_path / "t1.wav", 1, seed=1)
    write_song(tmp_path / "in/__/t1.wav", 1, seed=2)
    write_song(tmp_path / "in/calm.wav", 1, seed=3)
    return words_for(repo, tmp_path / "in", "../t1.wav", "__/t1.wav", "calm.wav")


def test_conflicts_are_errors_before_any_work(
    conflicting_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(conflicting_words) == 2
    error = capsys.readouterr().err
    assert "../t1.wav and __/t1.wav" in error and "--collisions digest" in error
    assert not (tmp_path / "in/out").exists()


def test_all_shards_give_conflicting_tracks_the_same_names(
    conflicting_words: list[str], tmp_path: Path
) -> None:
    words = [*conflicting_words, "--collisions", "digest"]
    for shard in range(3):
        assert main([*words, "--shard", f"{shard}/3"]) == 0
    stems = list((tmp_path / "in/out").rglob("drums.wav"))
    assert len(stems) == len({hashlib.sha256(path.read_bytes()).digest() for path in stems}) == 3
    assert tmp_path / f"in/out/{MODEL}/calm-wav/drums.wav" in stems
    assert main([*words, "--results", str(tmp_path / "t.jsonl")]) == 0
    assert [row["status"] for row in read_table(tmp_path / "t.jsonl")] == ["skipped"] * 3


def test_digest_needs_the_track_in_the_file_name(
    conflicting_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*conflicting_words, "--collisions", "digest", "--filename", "{stem}.{ext}"]
    assert main(words) == 2 and "{track} in --filename" in capsys.readouterr().err


def test_stems_never_overwrite_their_input(
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
