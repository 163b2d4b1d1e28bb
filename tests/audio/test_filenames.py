"""File names of stems stay in the output folder and stay different, for any track name."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.audio.filenames import stem_paths, valid_template

OUT = Path("/out")


def test_stem_paths_fill_upstreams_fields() -> None:
    template = "{track}/{stem}-{trackext}.{ext}"
    paths = stem_paths(OUT, ["bass", "vocals"], template, track="a.b.flac", extension="mp3")
    assert paths == {"bass": OUT / "a.b/bass-flac.mp3", "vocals": OUT / "a.b/vocals-flac.mp3"}


@pytest.mark.parametrize(
    "template",
    [
        "{track}.{ext}",
        "{{stem}}.wav",
        "../{stem}.wav",
        "a/../../{stem}.wav",
        "/etc/{stem}.wav",
        "C:{stem}.wav",
        "a\\..\\{stem}.wav",
        "{stem}/",
        "{stem.__class__}.wav",
        "{stem!r}{stem}",
        "{stem:9}{stem}",
        "{0}{stem}",
        "{title}-{stem}",
        "{stem",
        "",
    ],
)
def test_unsafe_templates_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        valid_template(template)


ODD_NAMES = st.text(st.characters(exclude_categories=()), max_size=300) | st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a\0b", "..\\x", ".wav", "日" * 200 + ".wav", "~"]
)


@settings(max_examples=50)
@given(track=ODD_NAMES, stem=ODD_NAMES.filter(lambda name: len(name.encode(errors="ignore")) < 99))
@pytest.mark.parametrize("template", ["{track}/{stem}.{ext}", "{stem}", "{track}{stem}.{ext}"])
def test_paths_stay_in_the_folder_for_any_name(template: str, track: str, stem: str) -> None:
    (path,) = stem_paths(OUT, [stem], template, track=track).values()
    inside = path.relative_to(OUT)
    assert ".." not in inside.parts
    assert len(inside.parts) == template.count("/") + 1
    assert "\0" not in str(inside)


def test_long_names_are_shortened_and_stay_different() -> None:
    names = ["日" * 100 + end + ".wav" for end in "ab"]
    paths = [stem_paths(OUT, ["bass"], "{track}_{stem}.{ext}", track=name) for name in names]
    files = [stems["bass"].name for stems in paths]
    assert files[0] != files[1]
    assert all(len(file.encode()) <= 255 and file.endswith("_bass.wav") for file in files)


def test_stems_with_equal_file_names_are_refused() -> None:
    with pytest.raises(ValueError, match="the same file"):
        stem_paths(OUT, ["a/b", "a_b"])
    with pytest.raises(ValueError, match="the same file"):  # on case-insensitive file systems
        stem_paths(OUT, ["Bass", "bass"])


def test_surrogates_and_long_names_become_valid_file_names() -> None:
    (path,) = stem_paths(OUT, ["bass"], "{track}{stem}", track="\ud800" + "日" * 99).values()
    assert path.name.startswith("_")
    assert len(path.name.encode()) <= 255
