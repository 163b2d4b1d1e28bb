"""Make a finished multitrack song from a seed.

Shapes: S = 4 stems (drums, bass, other, vocals), C = 2 channels, T samples.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tools.studio import effects
from tools.studio.compose import Song, compose
from tools.studio.effects import Audio
from tools.studio.soundfont import SAMPLE_RATE, play
from tools.studio.voice import HIGH_VARIANTS, LANGUAGES, LOW_VARIANTS, sing

STEMS = ("drums", "bass", "other", "vocals")

_LEVELS = {  # mean and spread in decibels, relative to one another
    "drums": (0.0, 2.0),
    "bass": (-1.0, 2.0),
    "other": (-1.5, 2.0),
    "vocals": (0.0, 2.0),
}
_WET = {"drums": 0.18, "bass": 0.03, "other": 0.25, "vocals": 0.3}
_LOW_CUT = {"drums": 28.0, "bass": 28.0, "other": 70.0, "vocals": 90.0}


def _voice(song: Song, rng: Generator) -> str:
    pitches = [note.pitch for note in song.melody]
    high = bool(pitches) and float(np.mean(pitches)) > 58
    return f"{rng.choice(LANGUAGES)}+{rng.choice(HIGH_VARIANTS if high else LOW_VARIANTS)}"


def vocals(song: Song, rng: Generator) -> Audio:
    """Render the singer in the middle, and the harmony of the choruses at the sides."""
    voice = _voice(song, rng)
    if not song.melody:
        return np.zeros((2, round(song.seconds * SAMPLE_RATE)), np.float32)
    lead = sing(song.melody, song.seconds, voice, rng)
    out = effects.pan(lead, float(rng.normal(0, 0.08)))
    if song.harmony:
        side = sing(song.harmony, song.seconds, voice, rng)
        late = np.roll(side, int(rng.uniform(0.01, 0.03) * SAMPLE_RATE))
        out += 0.5 * (effects.pan(side, -0.7) + effects.pan(late, 0.7))
    return out


def produce(name: str, stem: Audio, rng: Generator, beat_seconds: float) -> Audio:
    """Process one stem with the effects of its channel strip."""
    stem = effects.equalize(stem, rng, _LOW_CUT[name] * rng.uniform(0.8, 1.4))
    stem = effects.compress(stem, float(rng.uniform(0.1, 0.6)))
    if rng.random() < 0.25:
        stem = effects.saturate(stem, float(rng.uniform(0.5, 2.0)))
    if name == "vocals" and rng.random() < 0.3:
        stem = effects.echo(stem, beat_seconds * float(rng.choice([0.5, 0.75])), 0.25)
    wet = _WET[name] * float(rng.uniform(0.2, 1.8))
    return effects.reverberate(stem, rng, wet, float(rng.uniform(0.4, 1.6)))


def balance(stems: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    """Balance the levels of the stems and keep the mix below full scale: (S C T)."""
    for index, name in enumerate(STEMS):
        level = effects.rms(stems[index])
        gain = 10 ** (rng.normal(*_LEVELS[name]) / 20)
        if level > 1e-5:
            stems[index] *= 0.1 * gain / level
    peak = float(np.abs(stems.sum(axis=0)).max())
    return stems * (rng.uniform(0.5, 0.95) / max(peak, 1e-6))


def make_song(seed: int, seconds: float) -> NDArray[np.float32]:
    """Make the four stems, whose sum is the mix: (S C T) at 44.1 kHz."""
    rng = np.random.default_rng(seed)
    song = compose(rng, seconds)
    beat_seconds = 60 / song.tempo
    dry = {
        "drums": play(list(song.drums), seconds),
        "bass": play(list(song.bass), seconds),
        "other": play(list(song.other), seconds),
        "vocals": vocals(song, rng),
    }
    stems = np.stack([produce(name, dry[name], rng, beat_seconds) for name in STEMS])
    return balance(stems, rng)
