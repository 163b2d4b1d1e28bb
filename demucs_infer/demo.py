"""A song made of arithmetic: something to separate on a machine that has no music.

The same seed gives the same song. Shapes: S = 4 stems, C = 2 channels, T samples, K partials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE = 44100
STEMS = ("drums", "bass", "other", "vocals")

_PROGRESSIONS = ((0, 4, 5, 3), (5, 3, 0, 4), (0, 5, 3, 4), (0, 3, 0, 4))  # degrees, one a bar
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))
_KICKS = ("x.......x.x.....", "x...x...x...x...", "x..x....x..x....", "x......xx.......")
_SNARES = ("....x.......x...", "....x..o....x..o", "........x.......")
_HATS = ("x.x.x.x.x.x.x.x.", "xoxoxoxoxoxoxoxo", "..x...x...x...x.")
_BASSES = ("x.x.x.x.x.x.x.x.", "x.....x.x.....x.", "x.......x...x...", "..x...x...x...x.")
_CHORDS = ("x...............", "x.......x.......", "x..x..x.x..x..x.", "..x...x...x...x.")
_VOWELS = (  # the first three resonances of a voice, in hertz
    (730, 1090, 2440),
    (530, 1840, 2480),
    (270, 2290, 3010),
    (570, 840, 2410),
    (300, 870, 2240),
)
_LEVELS = {"drums": 0.11, "bass": 0.1, "other": 0.08, "vocals": 0.1}

Wave = NDArray[np.float32]


class Song(NamedTuple):
    """A mix and what it is the sum of."""

    mix: Tensor
    """(C T)"""
    stems: Tensor
    """(S C T), in the order of `STEMS`."""
    sample_rate: int


def song(seconds: float = 20.0, seed: int = 0) -> Song:
    """Compose and play a song: four stems and their sum, at 44.1 kHz."""
    if not seconds > 0:
        raise ValueError(f"{seconds = } must be positive")
    length = round(seconds * SAMPLE_RATE)
    score = _compose(seconds, np.random.default_rng(seed))
    players = {"drums": _drums, "bass": _bass, "other": _other, "vocals": _vocals}
    stems = np.stack([_level(players[name](score)[:, :length], name) for name in STEMS])
    stems *= 0.9 / max(float(np.abs(stems.sum(0)).max()), 1e-6)
    tensor = torch.from_numpy(stems)
    return Song(tensor.sum(0), tensor, SAMPLE_RATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """What is played; a step is a sixteenth, a bar has sixteen."""

    rng: Generator
    step: int
    """Samples."""
    bars: int
    tonic: int
    scale: tuple[int, ...]
    degrees: tuple[int, ...]
    rows: dict[str, str]
    cache: dict[tuple[str, int, int], Wave] = field(default_factory=dict)
    """Notes that were played already, by instrument, pitch and length."""

    @property
    def length(self) -> int:
        """Samples, with a bar to ring out."""
        return (self.bars + 1) * 16 * self.step

    def pitch(self, degree: int, low: int) -> int:
        """The MIDI pitch of a degree of the scale; degree 0 is the tonic next above `low`."""
        octave, place = divmod(degree, 7)
        return low + (self.tonic - low) % 12 + 12 * octave + self.scale[place]

    def degree(self, bar: int) -> int:
        return self.degrees[bar % len(self.degrees)]

    def hits(self, row: str) -> list[tuple[int, int, float]]:
        """(sample, bar, loudness) of every mark of a row."""
        return [
            ((bar * 16 + step) * self.step, bar, 0.45 if mark == "o" else 1.0)
            for bar in range(self.bars)
            for step, mark in enumerate(self.rows[row])
            if mark != "."
        ]

    def note(self, name: str, pitch: int, length: int, play: Callable[[int, int], Wave]) -> Wave:
        key = (name, pitch, length)
        if key not in self.cache:
            self.cache[key] = play(pitch, length)
        return self.cache[key]


def _compose(seconds: float, rng: Generator) -> _Sheet:
    step = int(60 / rng.uniform(90, 126) / 4 * SAMPLE_RATE)
    names = {"kick": _KICKS, "snare": _SNARES, "hat": _HATS, "bass": _BASSES, "chord": _CHORDS}
    return _Sheet(
        rng=rng,
        step=step,
        bars=int(np.ceil(seconds * SAMPLE_RATE / (16 * step))),
        tonic=int(rng.integers(12)),
        scale=_SCALES[int(rng.integers(2))],
        degrees=_PROGRESSIONS[int(rng.integers(len(_PROGRESSIONS)))],
        rows={name: str(rng.choice(rows)) for name, rows in names.items()},
    )


def _hertz(pitch: float) -> float:
    return float(440 * 2 ** ((pitch - 69) / 12))


def _time(length: int) -> Wave:
    return (np.arange(length) / SAMPLE_RATE).astype(np.float32)


def _add(out: Wave, start: int, sound: Wave, gain: float = 1.0) -> None:
    """Mix `sound` (T or C T) into `out` (C T) from `start`."""
    kept = min(sound.shape[-1], out.shape[-1] - start)
    if kept > 0:
        out[:, start : start + kept] += gain * sound[..., :kept]


def _level(stem: Wave, name: str) -> Wave:
    gain = _LEVELS[name] / max(float(np.sqrt((stem**2).mean())), 1e-6)
    levelled: Wave = (stem * gain).astype(np.float32)
    return levelled


def _bright(noise: Wave) -> Wave:
    """Noise without its low half: two differences."""
    return np.diff(noise, 2, append=[0, 0]).astype(np.float32)


def _partials(hertz: float, cutoff: float, decay: float, length: int) -> Wave:
    """A saw tooth through a soft low-pass, whose high partials fade first: (T)."""
    order = np.arange(1, max(2, min(40, int(12000 / hertz))), dtype=np.float32)[:, None]
    strength = 1 / order / (1 + (order * hertz / cutoff) ** 2)
    time = _time(length)
    fade = np.exp(-decay * (0.5 + 0.2 * order) * time)
    waves = np.sin(np.float32(2 * np.pi * hertz) * order * time)
    total: Wave = (strength * fade * waves).sum(0).astype(np.float32)
    return total


def _ends(sound: Wave, seconds: float = 0.006) -> Wave:
    """Fade both ends, so that no note clicks."""
    size = min(int(seconds * SAMPLE_RATE), len(sound) // 2)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    sound[:size] *= ramp
    sound[len(sound) - size :] *= ramp[::-1]
    return sound


def _drums(score: _Sheet) -> Wave:
    rng, out = score.rng, np.zeros((2, score.length), np.float32)
    time = _time(SAMPLE_RATE // 2)
    low, sweep = rng.uniform(42, 58), rng.uniform(90, 200)
    phase = 2 * np.pi * (low * time + sweep / 30 * (1 - np.exp(-30 * time)))
    kick = np.sin(phase) * np.exp(-rng.uniform(6, 12) * time)
    noise = rng.normal(size=(3, len(time))).astype(np.float32)
    shell = 0.7 * np.sin(2 * np.pi * rng.uniform(170, 230) * time) * np.exp(-22 * time)
    snare = shell + 0.35 * noise[0] * np.exp(-rng.uniform(12, 25) * time)
    hat = 0.1 * _bright(noise[1]) * np.exp(-rng.uniform(25, 80) * time)
    crash = 0.1 * _bright(noise[2]) * np.exp(-5 * time)
    for row, sound, gain in (("kick", kick, 1.0), ("snare", snare, 0.8), ("hat", hat, 0.7)):
        for start, _, loudness in score.hits(row):
            _add(out, start, sound, gain * loudness * float(rng.uniform(0.85, 1.0)))
    for bar in range(0, score.bars, 4):
        _add(out, bar * 16 * score.step, crash)
    return out


def _bass(score: _Sheet) -> Wave:
    rng, out = score.rng, np.zeros((2, score.length), np.float32)
    cutoff, decay = rng.uniform(180, 700), rng.uniform(0.5, 3)

    def play(pitch: int, length: int) -> Wave:
        return _ends(_partials(_hertz(pitch), cutoff, decay, length))

    hits = score.hits("bass")
    for (start, bar, loudness), (stop, *_) in zip(hits, [*hits[1:], (score.length, 0, 0.0)]):
        pitch = score.pitch(score.degree(bar), 28)
        held = int(min(stop - start, 4 * score.step) * 0.9)
        _add(out, start, score.note("bass", pitch - 12 * (pitch > 43), held, play), loudness)
    return out


def _other(score: _Sheet) -> Wave:
    """Plucked chords on one side, a pad around them."""
    rng, out = score.rng, np.zeros((2, score.length), np.float32)
    cutoff, decay, side = rng.uniform(1200, 4000), rng.uniform(2, 5), rng.uniform(-0.6, 0.6)
    width, bar_length = rng.uniform(0.002, 0.005), 16 * score.step
    plucked_gain, pad_gain = rng.uniform(0.7, 1.0), rng.uniform(0.1, 0.4)
    angle = (side + 1) * np.pi / 4
    left_right = np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)

    def pluck(pitch: int, length: int) -> Wave:
        return _ends(_partials(_hertz(pitch), cutoff, decay, length))

    def pad(pitch: int, length: int) -> Wave:
        hertz = _hertz(pitch)
        sides = [_partials(hertz * (1 + d), 900.0, 0.05, length) for d in (-width, width)]
        return np.stack([_ends(side, 0.15) for side in sides])

    def chord(bar: int) -> list[int]:
        degree = score.degree(bar)
        return [60 + (score.pitch(degree + third, 60) - 60) % 12 for third in (0, 2, 4)]

    for start, bar, loudness in score.hits("chord"):
        for pitch in chord(bar):
            sound = score.note("pluck", pitch, 6 * score.step, pluck)
            _add(out, start, left_right * sound, plucked_gain * loudness)
    for bar in range(score.bars):
        for pitch in chord(bar):
            _add(out, bar * bar_length, score.note("pad", pitch, bar_length, pad), pad_gain)
    return out


def _melody(score: _Sheet) -> list[tuple[int, int, int]]:
    """(start, stop, pitch) of each sung note; every second bar ends with a breath."""
    rng, low = score.rng, int(score.rng.choice([48, 52, 57]))
    rhythm = [int(rng.choice([2, 2, 4, 4, 6])) for _ in range(16)]
    notes, degree = [], 0
    for phrase in range(0, score.bars, 2):
        at, index = 0, 0
        while at < 26:
            steps = rhythm[index]
            degree += int(rng.choice([-2, -1, 1, 2]))
            if at % 8 == 0:
                degree = score.degree(phrase + at // 16) % 7 + int(rng.choice([0, 2, 4]))
            degree = min(max(degree, 0), 9)
            start = (phrase * 16 + at) * score.step
            stop = start + int(steps * score.step * 0.95)
            notes.append((start, stop, score.pitch(degree, low)))
            at, index = at + steps, index + 1
    return notes


def _vocals(score: _Sheet) -> Wave:
    rng, out = score.rng, np.zeros((2, score.length), np.float32)
    tract = rng.uniform(0.95, 1.2)  # a shorter throat has higher resonances
    before = 0.0
    for start, stop, pitch in _melody(score):
        vowels = [_VOWELS[int(index)] for index in rng.integers(len(_VOWELS), size=2)]
        sound = _sung(rng, pitch, before or pitch, stop - start, tract * np.array(vowels))
        if rng.random() < 0.4:
            size = int(0.07 * SAMPLE_RATE)
            hiss = _bright(rng.normal(size=size).astype(np.float32))
            _add(out, start, _ends(hiss, 0.02), 0.02)
        _add(out, start + int(0.03 * SAMPLE_RATE), sound)
        before = pitch
    return out


def _sung(
    rng: Generator, pitch: int, before: float, length: int, vowels: NDArray[np.float64]
) -> Wave:
    """One note of a voice: a pulse train with vibrato through moving resonances: (T)."""
    time = _time(length)
    bend = (before - pitch) * np.exp(-time / 0.03)
    depth = 0.35 * np.clip((time - 0.15) / 0.3, 0, 1)
    bend += depth * np.sin(2 * np.pi * rng.uniform(4.8, 6.2) * time)
    phase = 2 * np.pi * np.cumsum(_hertz(pitch) * 2 ** (bend / 12)) / SAMPLE_RATE
    order = np.arange(1, min(45, int(9000 / _hertz(pitch))))
    points = np.arange(0, length + 512, 512)
    glide = np.clip(points / max(length, 1) * 2 - 0.5, 0, 1)[:, None]
    formants = vowels[0] * (1 - glide) + vowels[1] * glide
    hertz = order * _hertz(pitch)
    distance = (hertz[None, :, None] - formants[:, None, :]) / np.array([70, 100, 160])
    gains = (np.array([1.0, 0.6, 0.3]) / (1 + distance**2)).sum(-1) / order**0.4 + 0.003
    sound = np.zeros(length)
    for index, number in enumerate(order):
        gain = np.interp(np.arange(length), points, gains[:, index])
        sound += gain * np.sin(number * phase)
    sound += 0.01 * rng.normal(size=length)
    return _ends(sound.astype(np.float32), 0.03)
