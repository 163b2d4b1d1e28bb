"""Every track has files of its own, inside the folder, whatever it is called."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demucs_infer.audio.filenames import FIELDS, _component
from demucs_infer.batch.output_paths import (
    OutputPaths,
    collisions,
    model_folder,
    without_collisions,
)

STEMS = ["drums", "vocals"]
OUT = Path("/out/htdemucs")


def target(track: str, **more: str) -> OutputPaths:
    return OutputPaths(folder=OUT, track=track, **more)


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
def test_names(track: str, template: str, stem: str, manifest: str) -> None:
    found = target(track, template=template)
    assert found.stems(["drums"]) == {"drums": OUT / stem}
    assert found.manifest == OUT / manifest


@given(track=st.text(min_size=1, max_size=400), stem=st.text(min_size=1, max_size=40))
def test_no_name_leaves_the_folder_or_is_too_long(track: str, stem: str) -> None:
    path = target(track).stems([stem])[stem]
    relative = path.relative_to(OUT)
    assert ".." not in relative.parts
    assert len(relative.parts) == 2
    # What every common file system takes.
    assert all(len(part.encode(errors="surrogatepass")) <= 255 for part in relative.parts)


@pytest.mark.parametrize(
    "template",
    ["{track}.{ext}", "../{stem}", "/tmp/{stem}", "{stem.__class__}", "{stem!r}", "{nope}{stem}",
     "{stem", "a/../../{stem}", "C:\\{stem}", "..\\{stem}", "{stem}/"],
)  # fmt: skip
def test_templates_that_are_refused(template: str) -> None:
    with pytest.raises(ValueError):
        target("song.wav", template=template)


def test_collisions_are_found_with_inputs_and_between_tracks() -> None:
    one, two = target("a/song.wav"), target("b.wav")
    outputs = [("x/song.wav", target("song.wav")), ("y/song.mp3", target("song.mp3"))]
    found = collisions(["x/song.wav"], [(name, t.stems(STEMS).values()) for name, t in outputs])
    assert list(found) == [1]
    assert "x/song.wav" in found[1] and "y/song.mp3" in found[1]
    assert (
        collisions([], [("1", one.stems(STEMS).values()), ("2", two.stems(STEMS).values())]) == {}
    )
    over = collisions(
        ["/out/htdemucs/song/drums.wav"], [("s", target("song.wav").stems(STEMS).values())]
    )
    assert "overwrite" in over[0]


def test_numbers_keep_tracks_apart() -> None:
    targets = {"a/song.wav": target("song.wav"), "b/song.mp3": target("song.mp3")}
    targets |= {"c/song-2.wav": target("song-2.wav"), "d/song": target("song")}
    settled = without_collisions(targets, targets, STEMS)
    names = [one.stems(STEMS)["drums"].parent.name for one in settled.values()]
    assert names == ["song", "song-2", "song-2-2", "song-3"]
    hidden = {"a/.wav": target(".wav"), "a/.mp3": target(".mp3")}  # names that are all suffix
    settled = without_collisions(hidden, hidden, STEMS)
    names = [one.stems(STEMS)["drums"].parent.name for one in settled.values()]
    assert names == ["_", "-2"]


def test_numbers_need_a_name_to_stand_in() -> None:
    targets = {name: target(name, template="{stem}.{ext}") for name in ("a.wav", "b.wav")}
    with pytest.raises(ValueError, match="{track}"):
        without_collisions(targets, targets, STEMS)


def test_model_folders() -> None:
    assert model_folder("hf://user/name") == "user_name"
    assert model_folder("..") == "__"
    assert model_folder("../x") == ".._x"


def test_the_fields_are_upstreams() -> None:
    assert FIELDS == ("track", "trackext", "stem", "ext")
    assert [field.name for field in dataclasses.fields(OutputPaths)][:2] == ["folder", "track"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nul", "_nul"), ("COM1.wav", "_COM1.wav"), ("console", "console"), ("a. .", "a___"),
        ('what? "yes"', "what_ _yes_"), ("a:b", "a_b"), ("...", "___"),
    ],
)  # fmt: skip
def test_names_that_windows_refuses(name: str, expected: str) -> None:
    assert _component(name, windows=True) == expected
