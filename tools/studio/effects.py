"""What a mixing desk does to a stem: equalize, compress, widen, put into a room.

Shapes: C = 2 channels, T samples.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SAMPLE_RATE = 44100

Audio = NDArray[np.float32]


def rms(audio: Audio) -> float:
    """Level where something sounds: the mean power of the louder half of 50 ms pieces."""
    size = SAMPLE_RATE // 20
    pieces = audio[:, : audio.shape[1] // size * size].reshape(2, -1, size)
    power = np.sort((pieces.astype(np.float64) ** 2).mean(axis=(0, 2)))
    return float(np.sqrt(power[len(power) // 2 :].mean())) if len(power) else 0.0


def _filtered(audio: Audio, gain: NDArray[np.float64]) -> Audio:
    size = 2 * (len(gain) - 1)
    spectrum = np.fft.rfft(audio, size) * gain
    return np.fft.irfft(spectrum, size)[:, : audio.shape[1]].astype(np.float32)


def _fast_size(length: int) -> int:
    """Return the next even size that has only small factors."""
    best = 2 ** int(np.ceil(np.log2(length)))
    for factor in (9, 15, 25, 27, 45, 75, 81, 125, 135):
        power = int(np.ceil(np.log2(length / factor)))
        best = min(best, factor * 2 ** max(power, 1))
    return best


def equalize(audio: Audio, rng: Generator, low_cut: float = 25.0) -> Audio:
    """Apply a high-pass at `low_cut` hertz, a tilt, and two gentle bells."""
    size = _fast_size(audio.shape[1] + 4096)
    hertz = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 1.0)
    octaves = np.log2(hertz / 1000)
    decibels = rng.normal(0, 0.5) * np.clip(octaves, -5, 4)
    for _ in range(2):
        centre, width = rng.uniform(-3.5, 3.5), rng.uniform(0.4, 1.2)
        decibels += rng.normal(0, 2.5) * np.exp(-0.5 * ((octaves - centre) / width) ** 2)
    high_pass = 1 / np.sqrt(1 + (low_cut / hertz) ** 8)
    return _filtered(audio, high_pass * 10 ** (decibels / 20))


def compress(audio: Audio, amount: float) -> Audio:
    """Turn loud moments down; `amount` 0 changes nothing, 1 flattens."""
    size = 256
    padded = np.pad(audio, ((0, 0), (0, -audio.shape[1] % size)))
    power = (padded.reshape(2, -1, size).astype(np.float64) ** 2).mean(axis=(0, 2))
    followed = np.empty_like(power)
    level = 0.0
    for index, now in enumerate(power):  # attack at once, release in about 150 ms
        level = max(now, level * 0.96)
        followed[index] = level
    threshold = max(rms(audio), 1e-6)
    gain = np.minimum(1, (np.sqrt(followed) / threshold + 1e-9) ** -amount)
    at = np.arange(audio.shape[1]) / size - 0.5
    return (audio * np.interp(at, np.arange(len(gain)), gain)).astype(np.float32)


def saturate(audio: Audio, drive: float) -> Audio:
    """Soft clipping, for the grit of tape and tubes."""
    level = max(rms(audio), 1e-6) * 4
    return (np.tanh(audio / level * drive) * level / drive).astype(np.float32)


def pan(mono: NDArray[np.float32], where: float) -> Audio:
    """Equal power; -1 is left, 1 is right: (T) -> (C T)."""
    angle = (where + 1) * np.pi / 4
    return np.stack([np.cos(angle) * mono, np.sin(angle) * mono]).astype(np.float32)


def room(rng: Generator, seconds: float) -> Audio:
    """Draw an impulse response: noise that decays, high frequencies first: (C T)."""
    length = int(seconds * SAMPLE_RATE)
    time = np.arange(length) / SAMPLE_RATE
    noise = rng.normal(size=(2, length))
    dull = np.cumsum(noise, axis=1)
    dull = 0.15 * (dull[:, 32:] - dull[:, :-32])
    noise[:, 32:] = 0.4 * noise[:, 32:] * np.exp(-6 * time[32:] / seconds) + dull
    noise *= np.exp(-6.9 * time / seconds)
    noise[:, : int(rng.uniform(0.002, 0.03) * SAMPLE_RATE)] = 0  # before the first reflection
    return (noise / np.sqrt((noise**2).sum(axis=1, keepdims=True))).astype(np.float32)


def reverberate(audio: Audio, rng: Generator, wet: float, seconds: float) -> Audio:
    """`audio` in a room of its own."""
    response = room(rng, seconds)
    size = _fast_size(audio.shape[1] + response.shape[1])
    tail = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(response, size), size)
    return (audio + wet * tail[:, : audio.shape[1]]).astype(np.float32)


def echo(audio: Audio, delay_seconds: float, feedback: float) -> Audio:
    """Three repeats, each crosses to the other side."""
    out = audio.copy()
    for repeat in range(1, 4):
        shift = int(repeat * delay_seconds * SAMPLE_RATE)
        if shift < audio.shape[1]:
            side = audio[::-1] if repeat % 2 else audio
            out[:, shift:] += feedback**repeat * side[:, : audio.shape[1] - shift]
    return out
