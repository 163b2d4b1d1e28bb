"""Sing a melody: espeak-ng speaks syllables, WORLD analyzes them and resynthesizes the notes.

WORLD describes speech, every five milliseconds, by a pitch, a spectral envelope and a noise share.
A note takes one syllable: its consonants keep their length, its vowel is stretched, its pitch
is replaced by the melody's. Shapes: N frames, F bins, T samples.
"""

from __future__ import annotations

import functools
import io
import subprocess
import wave
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyworld
from numpy.random import Generator
from numpy.typing import NDArray

from tools.studio.midi import Note

SAMPLE_RATE = 44100
FRAME = 0.005
_SPOKEN_UP_TO = 9000.0  # espeak-ng speaks at 22.05 kHz; the band above gets noise
_DIMENSIONS = 60

Array = NDArray[np.float64]

LANGUAGES = ("en-us", "en-gb", "it", "es", "fr-fr", "de", "pt-br", "sv")
LOW_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7")
HIGH_VARIANTS = ("f1", "f2", "f3", "f4", "f5")
SYLLABLES = (
    "la", "love", "you", "me", "night", "day", "see", "know", "heart", "time", "down", "rain",
    "fire", "home", "go", "way", "light", "moon", "sun", "stay", "dream", "fly", "high", "sea",
    "no", "oh", "yeah", "take", "more", "shine", "soul", "free", "run", "blue", "sky", "back",
    "what", "girl", "man", "world", "stars", "cry",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Syllable:
    """One spoken syllable in WORLD's terms."""

    voiced: NDArray[np.bool_]
    envelope: Array
    """Coded spectral envelope, (N 60)."""
    noise: Array
    """Coded noise share, (N bands)."""
    vowel: tuple[int, int]
    """Range of the frames that may be stretched."""

    def frames(self, length: int) -> NDArray[np.int64]:
        """Return which frame to sing at each of `length` frames."""
        start, stop = self.vowel
        end = len(self.voiced)
        coda = min(end - stop, max(length // 4, 1))
        onset = min(start, max(length // 3, 1))
        middle = max(length - onset - coda, 1)
        stretched = np.linspace(start, max(stop - 1, start), middle)
        order = [np.arange(start - onset, start), stretched, np.arange(stop, stop + coda)]
        return np.concatenate(order).round().astype(np.int64)[:length]


def speak(text: str, voice: str) -> Array:
    """Speak a text: mono, at 44.1 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", "120", "--stdout", text]
    raw = subprocess.run(command, check=True, capture_output=True, timeout=20).stdout
    with wave.open(io.BytesIO(raw)) as file:
        rate, data = file.getframerate(), file.readframes(2**30)
    samples = np.frombuffer(data[: len(data) // 2 * 2], np.int16).astype(np.float64) / 32768
    old, new = len(samples), round(len(samples) * SAMPLE_RATE / rate)
    spectrum = np.zeros(new // 2 + 1, np.complex128)
    half = np.fft.rfft(samples)
    spectrum[: min(len(half), len(spectrum))] = half[: len(spectrum)]
    return np.fft.irfft(spectrum, new) * (new / old)


def _extend_with_noise(envelope: Array, noise: Array) -> None:
    """Extend the envelope above the spoken band with noise that falls by 3 dB per kilohertz."""
    frequencies = np.linspace(0, SAMPLE_RATE / 2, envelope.shape[1])
    above = frequencies > _SPOKEN_UP_TO
    near = (frequencies > _SPOKEN_UP_TO - 2500) & ~above
    level = envelope[:, near].mean(axis=1, keepdims=True)
    fall = 10 ** (-0.3 * (frequencies[above] - _SPOKEN_UP_TO) / 1000)
    envelope[:, above] = np.maximum(level * fall, 1e-12)
    noise[:, above] = 0.98


@functools.lru_cache(maxsize=4096)
def analyze(text: str, voice: str) -> Syllable:
    """Speak a syllable and analyze it with WORLD, without the silence around it."""
    sound = speak(text, voice)
    loud = np.flatnonzero(np.abs(sound) > 0.01)
    sound = np.ascontiguousarray(sound[max(loud[0] - 400, 0) : loud[-1] + 400])
    pitch, times = pyworld.dio(sound, SAMPLE_RATE, frame_period=1000 * FRAME, f0_floor=60)
    envelope = pyworld.cheaptrick(sound, pitch, times, SAMPLE_RATE)
    noise = pyworld.d4c(sound, pitch, times, SAMPLE_RATE)
    _extend_with_noise(envelope, noise)
    voiced = pitch > 0
    voiced_frames = np.flatnonzero(voiced)
    first, last = (
        (voiced_frames[0], voiced_frames[-1] + 1) if len(voiced_frames) else (0, len(voiced))
    )
    power = envelope[first:last].sum(axis=1)
    core = np.flatnonzero(power > 0.3 * power.max()) + first
    vowel = (int(core[0]) + 2, max(int(core[-1]) - 2, int(core[0]) + 3))
    vowel = (min(vowel[0], len(voiced) - 2), min(vowel[1], len(voiced) - 1))
    coded = pyworld.code_spectral_envelope(envelope, SAMPLE_RATE, _DIMENSIONS)
    bands = pyworld.code_aperiodicity(noise, SAMPLE_RATE)
    return Syllable(voiced, coded, bands, vowel)


def _curve(note: Note, before: float, length: int, rng: Generator) -> Array:
    """Draw the pitch of a note in semitones: a glide into it, then growing vibrato."""
    time = np.arange(length) * FRAME
    glide = (before - note.pitch) * np.exp(-time / rng.uniform(0.015, 0.05))
    depth = rng.uniform(0.1, 0.5) * np.clip((time - rng.uniform(0.1, 0.4)) / 0.4, 0, 1)
    vibrato = depth * np.sin(2 * np.pi * rng.uniform(4.6, 6.4) * time + rng.uniform(0, 6))
    drift = np.cumsum(rng.normal(0, 0.012, length))
    return note.pitch + glide + vibrato + drift - drift.mean()


def _swell(length: int, velocity: int) -> Array:
    """Return the amplitude envelope of a note."""
    time = np.arange(length) * FRAME
    fade = np.minimum(1, (length * FRAME - time) / 0.05)
    return (velocity / 96) * np.minimum(1, 0.4 + time / 0.04) * np.clip(fade, 0, 1)


def sing(
    melody: Sequence[Note], seconds: float, voice: str, rng: Generator, vocabulary: int = 18
) -> NDArray[np.float32]:
    """Sing a melody: (T)."""
    total = int(seconds / FRAME) + 1
    pitch = np.zeros(total)
    words = rng.choice(SYLLABLES, size=vocabulary, replace=False)
    first = analyze(str(words[0]), voice)
    envelope = np.full((total, _DIMENSIONS), first.envelope.min())
    bands = np.zeros((total, first.noise.shape[1]))
    gain = np.zeros(total)
    before = float(melody[0].pitch) if melody else 0.0
    for note in melody:
        start, stop = round(note.start / FRAME), min(round(note.stop / FRAME), total)
        if stop - start < 8:
            continue
        syllable = analyze(str(rng.choice(words)), voice)
        frames = syllable.frames(stop - start)
        stop = start + len(frames)
        curve = _curve(note, before - rng.uniform(0, 0.7), len(frames), rng)
        hertz = 440 * 2 ** ((curve - 69) / 12)
        pitch[start:stop] = np.where(syllable.voiced[frames], hertz, 0)
        envelope[start:stop] = syllable.envelope[frames]
        bands[start:stop] = syllable.noise[frames]
        gain[start:stop] = _swell(len(frames), note.velocity)
        before = note.pitch
    return _synthesize(pitch, envelope, bands, gain, round(seconds * SAMPLE_RATE))


def _synthesize(
    pitch: Array, envelope: Array, bands: Array, gain: Array, length: int
) -> NDArray[np.float32]:
    """Synthesize only the sung parts, because WORLD takes as long for silence."""
    out = np.zeros(length, np.float32)
    size = pyworld.get_cheaptrick_fft_size(SAMPLE_RATE)
    active = np.flatnonzero(np.diff(np.concatenate([[0], gain > 0, [0]])))
    for start, stop in active.reshape(-1, 2):
        if stop - start < 8:
            continue
        decoded = pyworld.decode_spectral_envelope(
            np.ascontiguousarray(envelope[start:stop]), SAMPLE_RATE, size
        )
        noise = pyworld.decode_aperiodicity(
            np.ascontiguousarray(bands[start:stop]), SAMPLE_RATE, size
        )
        sound = pyworld.synthesize(
            np.ascontiguousarray(pitch[start:stop]),
            decoded * gain[start:stop, None] ** 2,
            noise,
            SAMPLE_RATE,
            1000 * FRAME,
        )
        offset = round(start * FRAME * SAMPLE_RATE)
        length_used = min(len(sound), length - offset)
        out[offset : offset + length_used] += sound[:length_used].astype(np.float32)
    return out
