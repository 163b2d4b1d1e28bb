"""Write notes as a standard MIDI file: the least that a soundfont player needs."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TICKS_PER_SECOND = 1000
_QUARTER = 500  # ticks; at the default tempo of 120 a minute a quarter lasts half a second


@dataclass(frozen=True, slots=True)
class Note:
    """One key held down, times in seconds."""

    start: float
    stop: float
    pitch: int
    velocity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one player plays on one MIDI channel."""

    program: int
    """General MIDI program, or the kit's number for drums."""
    notes: list[Note] = field(default_factory=list)
    drums: bool = False
    pan: float = 0.0
    """-1 is left, 1 is right."""
    gain_db: float = 0.0


def variable_length(value: int) -> bytes:
    """`value` in groups of seven bits, most significant first."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(0x80 | value & 0x7F)
    return bytes(reversed(groups))


def _ticks(seconds: float) -> int:
    return max(0, round(seconds * TICKS_PER_SECOND))


def _events(part: Part, channel: int, end: int) -> list[tuple[int, int, bytes]]:
    """(tick, order, message): a key goes up before the same key goes down again."""
    pan = round(64 + 63 * part.pan)
    volume = round(min(127.0, 100 * 10 ** (part.gain_db / 40)))  # GM volume: 40 log10
    messages = [
        (0, 0, bytes([0xB0 | channel, 7, volume])),
        (0, 0, bytes([0xB0 | channel, 10, pan])),
        (0, 1, bytes([0xC0 | channel, part.program])),
    ]
    for note in part.notes:
        velocity = min(max(note.velocity, 1), 127)
        start = _ticks(note.start)
        stop = min(_ticks(note.stop), end)  # a key left down would sound for ever
        if start >= stop:
            continue
        messages.append((start, 3, bytes([0x90 | channel, note.pitch, velocity])))
        messages.append((stop, 2, bytes([0x80 | channel, note.pitch, 0])))
    return messages


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack(">I", len(body)) + body


def write_midi(path: Path, parts: Iterable[Part], seconds: float) -> None:
    """One track of all `parts`, that ends at `seconds` so that the player stops there."""
    end = _ticks(seconds)
    events: list[tuple[int, int, bytes]] = []
    free = iter([channel for channel in range(16) if channel != 9])
    for part in parts:
        events += _events(part, 9 if part.drums else next(free), end)
    body, now = bytearray(), 0
    for tick, _, message in sorted(events):
        body += variable_length(tick - now) + message
        now = tick
    body += variable_length(end - now) + b"\xff\x2f\x00"
    header = struct.pack(">HHH", 0, 1, _QUARTER)
    path.write_bytes(_chunk(b"MThd", header) + _chunk(b"MTrk", bytes(body)))
