"""Compose and synthesize a song: something to separate on a machine that has no music.

The same seed gives the same song. Shapes: S = 4 stems, C = 2 channels, T samples.
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

_CHORD_PROGRESSIONS = ((0, 4, 5, 3), (5, 3, 0, 4), (0, 5, 3, 4), (0, 3, 0, 4))
"""Scale degrees, one per bar."""
_SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))
_KICK_PATTERNS = ("x.......x.x.....", "x...x...x...x...", "x..x....x..x....", "x......xx.......")
_SNARE_PATTERNS = ("....x.......x...", "....x..o....x..o", "........x.......")
_HAT_PATTERNS = ("x.x.x.x.x.x.x.x.", "xoxoxoxoxoxoxoxo", "..x...x...x...x.")
_BASS_PATTERNS = ("x.x.x.x.x.x.x.x.", "x.....x.x.....x.", "x.......x...x...", "..x...x...x...x.")
_CHORD_PATTERNS = ("x...............", "x.......x.......", "x..x..x.x..x..x.", "..x...x...x...x.")
_VOWEL_FORMANTS = (  # the first three of each vowel, in hertz
    (730, 1090, 2440),
    (530, 1840, 2480),
    (270, 2290, 3010),
    (570, 840, 2410),
    (300, 870, 2240),
)
_STEM_LEVELS = {"drums": 0.11, "bass": 0.1, "other": 0.08, "vocals": 0.1}

Wave = NDArray[np.float32]


class Song(NamedTuple):
    """A mix and its stems."""

    mix: Tensor
    """(C, T)"""
    stems: Tensor
    """(S, C, T), in the order of `STEMS`."""
    sample_rate: int


def song(seconds: float = 20.0, seed: int = 0) -> Song:
    """Compose and play a song at 44.1 kHz; raise `ValueError` unless `seconds` is positive."""
    if not seconds > 0:
        raise ValueError(f"{seconds = }: expected a positive number")
    length = round(seconds * SAMPLE_RATE)
    composition = _compose(seconds, np.random.default_rng(seed))
    instruments = {
        "drums": _play_drums,
        "bass": _play_bass,
        "other": _play_other,
        "vocals": _sing_vocals,
    }
    stems = np.stack(
        [_normalize_level(instruments[name](composition)[:, :length], name) for name in STEMS]
    )
    stems *= 0.9 / max(float(np.abs(stems.sum(0)).max()), 1e-6)
    tensor = torch.from_numpy(stems)
    return Song(tensor.sum(0), tensor, SAMPLE_RATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Composition:
    """What the instruments play; a step is a sixteenth note, and a bar has 16 steps."""

    rng: Generator
    step: int
    """Length of a sixteenth note in samples."""
    bars: int
    tonic: int
    scale: tuple[int, ...]
    degrees: tuple[int, ...]
    patterns: dict[str, str]
    cache: dict[tuple[str, int, int], Wave] = field(default_factory=dict)
    """Rendered notes, by instrument, pitch and length."""

    @property
    def length(self) -> int:
        """Number of samples, including one bar in which notes ring out."""
        return (self.bars + 1) * 16 * self.step

    def pitch(self, degree: int, low: int) -> int:
        """Return the MIDI pitch of a scale degree; degree 0 is the lowest tonic from `low` on."""
        octave, place = divmod(degree, 7)
        return low + (self.tonic - low) % 12 + 12 * octave + self.scale[place]

    def chord_degree(self, bar: int) -> int:
        """Return the scale degree of the root of a bar's chord."""
        return self.degrees[bar % len(self.degrees)]

    def find_onsets(self, pattern: str) -> list[tuple[int, int, float]]:
        """Return (sample, bar, velocity) of every mark of a pattern."""
        return [
            ((bar * 16 + step) * self.step, bar, 0.45 if mark == "o" else 1.0)
            for bar in range(self.bars)
            for step, mark in enumerate(self.patterns[pattern])
            if mark != "."
        ]

    def render_note(
        self, instrument: str, pitch: int, length: int, play: Callable[[int, int], Wave]
    ) -> Wave:
        """Return a note of an instrument, rendering it with `play` once."""
        key = (instrument, pitch, length)
        if key not in self.cache:
            self.cache[key] = play(pitch, length)
        return self.cache[key]


def _compose(seconds: float, rng: Generator) -> _Composition:
    step = int(60 / rng.uniform(90, 126) / 4 * SAMPLE_RATE)
    choices = {
        "kick": _KICK_PATTERNS,
        "snare": _SNARE_PATTERNS,
        "hat": _HAT_PATTERNS,
        "bass": _BASS_PATTERNS,
        "chord": _CHORD_PATTERNS,
    }
    return _Composition(
        rng=rng,
        step=step,
        bars=int(np.ceil(seconds * SAMPLE_RATE / (16 * step))),
        tonic=int(rng.integers(12)),
        scale=_SCALES[int(rng.integers(2))],
        degrees=_CHORD_PROGRESSIONS[int(rng.integers(len(_CHORD_PROGRESSIONS)))],
        patterns={name: str(rng.choice(patterns)) for name, patterns in choices.items()},
    )


def _pitch_to_hertz(pitch: float) -> float:
    return float(440 * 2 ** ((pitch - 69) / 12))


def _sample_times(length: int) -> Wave:
    return (np.arange(length) / SAMPLE_RATE).astype(np.float32)


def _mix_into(out: Wave, start: int, sound: Wave, gain: float = 1.0) -> None:
    """Mix `sound` (T, or C, T) into `out` (C, T) from `start`."""
    length = min(sound.shape[-1], out.shape[-1] - start)
    if length > 0:
        out[:, start : start + length] += gain * sound[..., :length]


def _normalize_level(stem: Wave, name: str) -> Wave:
    gain = _STEM_LEVELS[name] / max(float(np.sqrt((stem**2).mean())), 1e-6)
    normalized: Wave = (stem * gain).astype(np.float32)
    return normalized


def _high_pass(noise: Wave) -> Wave:
    """Attenuate the lower half of the spectrum of noise with two differences."""
    return np.diff(noise, 2, append=[0, 0]).astype(np.float32)


def _play_sawtooth(hertz: float, cutoff: float, decay: float, length: int) -> Wave:
    """Synthesize a low-passed sawtooth whose high harmonics decay first: (T)."""
    harmonics = np.arange(1, max(2, min(40, int(12000 / hertz))), dtype=np.float32)[:, None]
    amplitudes = 1 / harmonics / (1 + (harmonics * hertz / cutoff) ** 2)
    time = _sample_times(length)
    decay_curve = np.exp(-decay * (0.5 + 0.2 * harmonics) * time)
    waves = np.sin(np.float32(2 * np.pi * hertz) * harmonics * time)
    wave: Wave = (amplitudes * decay_curve * waves).sum(0).astype(np.float32)
    return wave


def _fade_edges(sound: Wave, seconds: float = 0.006) -> Wave:
    """Fade both ends in place, so that the note does not click."""
    size = min(int(seconds * SAMPLE_RATE), len(sound) // 2)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    sound[:size] *= ramp
    sound[len(sound) - size :] *= ramp[::-1]
    return sound


def _play_drums(composition: _Composition) -> Wave:
    rng, out = composition.rng, np.zeros((2, composition.length), np.float32)
    time = _sample_times(SAMPLE_RATE // 2)
    low, sweep = rng.uniform(42, 58), rng.uniform(90, 200)
    phase = 2 * np.pi * (low * time + sweep / 30 * (1 - np.exp(-30 * time)))
    kick = np.sin(phase) * np.exp(-rng.uniform(6, 12) * time)
    noise = rng.normal(size=(3, len(time))).astype(np.float32)
    shell = 0.7 * np.sin(2 * np.pi * rng.uniform(170, 230) * time) * np.exp(-22 * time)
    snare = shell + 0.35 * noise[0] * np.exp(-rng.uniform(12, 25) * time)
    hat = 0.1 * _high_pass(noise[1]) * np.exp(-rng.uniform(25, 80) * time)
    crash = 0.1 * _high_pass(noise[2]) * np.exp(-5 * time)
    for pattern, sound, gain in (("kick", kick, 1.0), ("snare", snare, 0.8), ("hat", hat, 0.7)):
        for start, _, velocity in composition.find_onsets(pattern):
            _mix_into(out, start, sound, gain * velocity * float(rng.uniform(0.85, 1.0)))
    for bar in range(0, composition.bars, 4):
        _mix_into(out, bar * 16 * composition.step, crash)
    return out


def _play_bass(composition: _Composition) -> Wave:
    rng, out = composition.rng, np.zeros((2, composition.length), np.float32)
    cutoff, decay = rng.uniform(180, 700), rng.uniform(0.5, 3)

    def play(pitch: int, length: int) -> Wave:
        return _fade_edges(_play_sawtooth(_pitch_to_hertz(pitch), cutoff, decay, length))

    onsets = composition.find_onsets("bass")
    stops = [*(start for start, *_ in onsets[1:]), composition.length]
    for (start, bar, velocity), stop in zip(onsets, stops, strict=True):
        pitch = composition.pitch(composition.chord_degree(bar), 28)
        duration = int(min(stop - start, 4 * composition.step) * 0.9)
        note = composition.render_note("bass", pitch - 12 * (pitch > 43), duration, play)
        _mix_into(out, start, note, velocity)
    return out


def _play_other(composition: _Composition) -> Wave:
    """Play plucked chords on one side and a wide pad."""
    rng, out = composition.rng, np.zeros((2, composition.length), np.float32)
    cutoff, decay, pan = rng.uniform(1200, 4000), rng.uniform(2, 5), rng.uniform(-0.6, 0.6)
    width, bar_length = rng.uniform(0.002, 0.005), 16 * composition.step
    plucked_gain, pad_gain = rng.uniform(0.7, 1.0), rng.uniform(0.1, 0.4)
    angle = (pan + 1) * np.pi / 4
    left_right = np.array([[np.cos(angle)], [np.sin(angle)]], np.float32)

    def pluck(pitch: int, length: int) -> Wave:
        return _fade_edges(_play_sawtooth(_pitch_to_hertz(pitch), cutoff, decay, length))

    def pad(pitch: int, length: int) -> Wave:
        hertz = _pitch_to_hertz(pitch)
        sides = [
            _play_sawtooth(hertz * (1 + detune), 900.0, 0.05, length) for detune in (-width, width)
        ]
        return np.stack([_fade_edges(side, 0.15) for side in sides])

    def chord(bar: int) -> list[int]:
        degree = composition.chord_degree(bar)
        return [60 + (composition.pitch(degree + third, 60) - 60) % 12 for third in (0, 2, 4)]

    for start, bar, velocity in composition.find_onsets("chord"):
        for pitch in chord(bar):
            note = composition.render_note("pluck", pitch, 6 * composition.step, pluck)
            _mix_into(out, start, left_right * note, plucked_gain * velocity)
    for bar in range(composition.bars):
        for pitch in chord(bar):
            note = composition.render_note("pad", pitch, bar_length, pad)
            _mix_into(out, bar * bar_length, note, pad_gain)
    return out


def _compose_melody(composition: _Composition) -> list[tuple[int, int, int]]:
    """Return (start, stop, pitch) of each note; every second bar ends with a rest."""
    rng, low = composition.rng, int(composition.rng.choice([48, 52, 57]))
    rhythm = [int(rng.choice([2, 2, 4, 4, 6])) for _ in range(16)]
    notes, degree = [], 0
    for phrase in range(0, composition.bars, 2):
        position, index = 0, 0
        while position < 26:
            steps = rhythm[index]
            degree += int(rng.choice([-2, -1, 1, 2]))
            if position % 8 == 0:
                root = composition.chord_degree(phrase + position // 16) % 7
                degree = root + int(rng.choice([0, 2, 4]))
            degree = min(max(degree, 0), 9)
            start = (phrase * 16 + position) * composition.step
            stop = start + int(steps * composition.step * 0.95)
            notes.append((start, stop, composition.pitch(degree, low)))
            position, index = position + steps, index + 1
    return notes


def _sing_vocals(composition: _Composition) -> Wave:
    rng, out = composition.rng, np.zeros((2, composition.length), np.float32)
    formant_scale = rng.uniform(0.95, 1.2)  # a shorter vocal tract has higher formants
    previous_pitch = 0.0
    for start, stop, pitch in _compose_melody(composition):
        indices = rng.integers(len(_VOWEL_FORMANTS), size=2)
        vowels = formant_scale * np.array([_VOWEL_FORMANTS[int(index)] for index in indices])
        note = _sing_note(rng, pitch, previous_pitch or pitch, stop - start, vowels)
        if rng.random() < 0.4:
            size = int(0.07 * SAMPLE_RATE)
            hiss = _high_pass(rng.normal(size=size).astype(np.float32))
            _mix_into(out, start, _fade_edges(hiss, 0.02), 0.02)
        _mix_into(out, start + int(0.03 * SAMPLE_RATE), note)
        previous_pitch = pitch
    return out


def _sing_note(
    rng: Generator, pitch: int, previous_pitch: float, length: int, vowels: NDArray[np.float64]
) -> Wave:
    """Sing one note: harmonics with vibrato, shaped by formants that move between vowels: (T)."""
    time = _sample_times(length)
    semitones = (previous_pitch - pitch) * np.exp(-time / 0.03)
    depth = 0.35 * np.clip((time - 0.15) / 0.3, 0, 1)
    semitones += depth * np.sin(2 * np.pi * rng.uniform(4.8, 6.2) * time)
    phase = 2 * np.pi * np.cumsum(_pitch_to_hertz(pitch) * 2 ** (semitones / 12)) / SAMPLE_RATE
    harmonics = np.arange(1, min(45, int(9000 / _pitch_to_hertz(pitch))))
    points = np.arange(0, length + 512, 512)
    vowel_blend = np.clip(points / max(length, 1) * 2 - 0.5, 0, 1)[:, None]
    formants = vowels[0] * (1 - vowel_blend) + vowels[1] * vowel_blend
    hertz = harmonics * _pitch_to_hertz(pitch)
    distance = (hertz[None, :, None] - formants[:, None, :]) / np.array([70, 100, 160])
    gains = (np.array([1.0, 0.6, 0.3]) / (1 + distance**2)).sum(-1) / harmonics**0.4 + 0.003
    sound = np.zeros(length)
    for index, number in enumerate(harmonics):
        gain = np.interp(np.arange(length), points, gains[:, index])
        sound += gain * np.sin(number * phase)
    sound += 0.01 * rng.normal(size=length)
    return _fade_edges(sound.astype(np.float32), 0.03)
