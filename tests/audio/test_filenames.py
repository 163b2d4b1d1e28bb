"""Names come from outside: whatever they are, files stay in the folder and stay apart."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demucs_infer.audio.filenames import stem_paths, valid_template

OUT = Path("/out")


def test_upstreams_fields_and_names() -> None:
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
def test_a_template_that_would_lose_or_leak_files_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        valid_template(template)


ODD_NAMES = st.text(st.characters(exclude_categories=()), max_size=300) | st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a\0b", "..\\x", ".wav", "日" * 200 + ".wav", "~"]
)


@settings(max_examples=50)
@given(track=ODD_NAMES, stem=ODD_NAMES.filter(lambda name: len(name.encode(errors="ignore")) < 99))
@pytest.mark.parametrize("template", ["{track}/{stem}.{ext}", "{stem}", "{track}{stem}.{ext}"])
def test_no_name_leaves_the_folder(template: str, track: str, stem: str) -> None:
    (path,) = stem_paths(OUT, [stem], template, track=track).values()
    inside = path.relative_to(OUT)
    assert ".." not in inside.parts
    assert len(inside.parts) == template.count("/") + 1
    assert "\0" not in str(inside)


def test_a_long_name_is_cut_but_stays_its_own() -> None:
    names = ["日" * 100 + end + ".wav" for end in "ab"]
    paths = [stem_paths(OUT, ["bass"], "{track}_{stem}.{ext}", track=name) for name in names]
    files = [found["bass"].name for found in paths]
    assert files[0] != files[1]
    assert all(len(file.encode()) <= 255 and file.endswith("_bass.wav") for file in files)


def test_two_stems_never_share_a_file() -> None:
    with pytest.raises(ValueError, match="the same file"):
        stem_paths(OUT, ["a/b", "a_b"])
    with pytest.raises(ValueError, match="the same file"):  # where capitals do not count
        stem_paths(OUT, ["Bass", "bass"])


def test_a_name_that_no_file_system_stores_is_made_one() -> None:
    (path,) = stem_paths(OUT, ["bass"], "{track}{stem}", track="\ud800" + "日" * 99).values()
    assert path.name.startswith("_")
    assert len(path.name.encode()) <= 255
