"""The studio's score: a seed is a song, bars are filled, and a MIDI file says what was written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tools.studio.compose import STEPS, compose
from tools.studio.midi import Note, Part, variable_length, write_midi


@pytest.mark.parametrize(
    ("value", "expected"),  # the examples of the MIDI file specification
    [(0, "00"), (0x7F, "7f"), (0x80, "8100"), (0x2000, "c000"), (0x0FFFFFFF, "ffffff7f")],
)
def test_variable_lengths_equal_the_specification(value: int, expected: str) -> None:
    assert variable_length(value).hex() == expected


def test_midi_file_has_the_bytes_of_its_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.mid"
    notes = [Note(0.1, 9.0, 60, 100), Note(3.0, 4.0, 62, 100)]
    write_midi(path, [Part(program=5, notes=notes)], seconds=2.0)
    body = (
        "00b00764" "00b00a40" "00c005"  # volume 100, pan in the middle, program 5
        "64903c64"  # key 60 goes down 100 ms from the start
        "8e6c803c00"  # and up, 1900 ms later, at the end: the second note is behind it
        "00ff2f00"
    )  # fmt: skip
    size = len(body) // 2
    assert path.read_bytes().hex() == f"4d546864000000060000000101f44d54726b{size:08x}{body}"


@pytest.mark.parametrize("seed", range(12))
def test_seed_gives_one_song_with_adjoining_sections(seed: int) -> None:
    song = compose(np.random.default_rng(seed), 40.0)
    assert song == compose(np.random.default_rng(seed), 40.0)
    assert song != compose(np.random.default_rng(seed + 100), 40.0)
    for section, after in pairwise(song.sections):
        assert after.first_bar == section.first_bar + section.bars
    last = song.sections[-1]
    assert (last.first_bar + last.bars) * STEPS * 60 / song.tempo / 4 >= 40.0
    parts = [*song.drums, *song.bass, *song.other]
    assert sum(len(part.notes) for part in parts) > 50
    for note in (*song.melody, *(note for part in parts for note in part.notes)):
        assert 0 <= note.start < note.stop
        assert 0 < note.pitch < 128
    scale = {(song.tonic + step) % 12 for step in song.scale}
    assert {note.pitch % 12 for note in song.melody} <= scale
