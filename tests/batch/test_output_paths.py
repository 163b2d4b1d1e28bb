"""Test that each track has its own files, inside the output folder, for any name."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demucs_infer.audio.filenames import FIELDS, _component
from demucs_infer.batch.output_paths import (
    OutputPaths,
    find_collisions,
    model_folder,
    resolve_collisions,
)

STEMS = ["drums", "vocals"]
OUT = Path("/out/htdemucs")


def paths_of(track: str, **more: str) -> OutputPaths:
    return OutputPaths(folder=OUT, track=track, **more)


def files_of(track: str) -> list[Path]:
    return list(paths_of(track).stems(STEMS).values())


@pytest.mark.parametrize(
    ("track", "template", "stem", "manifest"),
    [
        ("song.flac", "{track}/{stem}.{ext}", "song/drums.wav", "song/stems.json"),
        ("a.b.flac", "{track}_{stem}.{ext}", "a.b_drums.wav", "a.b_stems.json"),
        (
            "song.mp3",
            "{stem}/{track}.{trackext}.{ext}",
            "drums/song.mp3.wav",
            "stems/song.mp3.json",
        ),
        ("歌 🎵.ogg", "{track}/{stem}.{ext}", "歌 🎵/drums.wav", "歌 🎵/stems.json"),
        ("...mp3", "{track}/{stem}.{ext}", "__/drums.wav", "__/stems.json"),
        (".flac", "{track}/{stem}.{ext}", "_/drums.wav", "_/stems.json"),
        ("x", "{stem}.wav", "drums.wav", "stems.json"),
        ("a.1.wav", "{stem}/{track}", "drums/a.1", "stems/a.1.json"),
        ("a.b.wav", "{stem}/{track}.{trackext}", "drums/a.b.wav", "stems/a.b.wav.json"),
        ("a.1.wav", "{stem}/{track}-x", "drums/a.1-x", "stems/a.1-x.json"),
    ],
)
def test_paths_follow_the_template(track: str, template: str, stem: str, manifest: str) -> None:
    paths = paths_of(track, template=template)
    assert paths.stems(["drums"]) == {"drums": OUT / stem}
    assert paths.manifest == OUT / manifest


@given(track=st.text(min_size=1, max_size=400), stem=st.text(min_size=1, max_size=40))
def test_paths_stay_in_the_folder_and_are_short_enough(track: str, stem: str) -> None:
    path = paths_of(track).stems([stem])[stem]
    relative = path.relative_to(OUT)
    assert ".." not in relative.parts
    assert len(relative.parts) == 2
    # The limit of common file systems.
    assert all(len(part.encode(errors="surrogatepass")) <= 255 for part in relative.parts)


@pytest.mark.parametrize(
    "template",
    ["{track}.{ext}", "../{stem}", "/tmp/{stem}", "{stem.__class__}", "{stem!r}", "{nope}{stem}",
     "{stem", "a/../../{stem}", "C:\\{stem}", "..\\{stem}", "{stem}/"],
)  # fmt: skip
def test_invalid_templates_are_rejected(template: str) -> None:
    with pytest.raises(ValueError):
        paths_of("song.wav", template=template)


def test_collisions_with_inputs_and_between_tracks_are_found() -> None:
    outputs = [("x/song.wav", files_of("song.wav")), ("y/song.mp3", files_of("song.mp3"))]
    problems = find_collisions(["x/song.wav"], outputs)
    assert list(problems) == [1]
    assert "x/song.wav" in problems[1] and "y/song.mp3" in problems[1]
    outputs = [("1", files_of("a/song.wav")), ("2", files_of("b.wav"))]
    assert find_collisions([], outputs) == {}
    overwritten = find_collisions(["/out/htdemucs/song/drums.wav"], [("s", files_of("song.wav"))])
    assert "overwrite" in overwritten[0]


def test_colliding_tracks_are_numbered() -> None:
    targets = {"a/song.wav": paths_of("song.wav"), "b/song.mp3": paths_of("song.mp3")}
    targets |= {"c/song-2.wav": paths_of("song-2.wav"), "d/song": paths_of("song")}
    resolved = resolve_collisions(targets, targets, STEMS)
    names = [paths.stems(STEMS)["drums"].parent.name for paths in resolved.values()]
    assert names == ["song", "song-2", "song-2-2", "song-3"]
    hidden = {"a/.wav": paths_of(".wav"), "a/.mp3": paths_of(".mp3")}  # names that are all suffix
    resolved = resolve_collisions(hidden, hidden, STEMS)
    names = [paths.stems(STEMS)["drums"].parent.name for paths in resolved.values()]
    assert names == ["_", "-2"]


def test_numbering_needs_the_track_in_the_template() -> None:
    targets = {name: paths_of(name, template="{stem}.{ext}") for name in ("a.wav", "b.wav")}
    with pytest.raises(ValueError, match="{track}"):
        resolve_collisions(targets, targets, STEMS)


def test_model_folder_is_one_safe_name() -> None:
    assert model_folder("hf://user/name") == "user_name"
    assert model_folder("..") == "__"
    assert model_folder("../x") == ".._x"


def test_template_fields_are_those_of_upstream() -> None:
    assert FIELDS == ("track", "trackext", "stem", "ext")
    assert [field.name for field in dataclasses.fields(OutputPaths)][:2] == ["folder", "track"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nul", "_nul"), ("COM1.wav", "_COM1.wav"), ("console", "console"), ("a. .", "a___"),
        ('what? "yes"', "what_ _yes_"), ("a:b", "a_b"), ("...", "___"),
    ],
)  # fmt: skip
def test_names_reserved_on_windows_are_changed(name: str, expected: str) -> None:
    assert _component(name, windows=True) == expected
