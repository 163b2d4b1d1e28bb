"""Test the choice between spectra of networks against one transform of the whole track."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from demucs_infer.engine.spectral import FRAME, HOP, SpectralChoice, find_first
from tests.helpers.audio_signals import make_noise
from tests.helpers.community import decibels

LENGTHS = (1, 1000, 1024, 2048, 5000, 11 * 1024, 20_001)


def make_values(length: int, count: int = 3) -> Tensor:
    """Return what `count` networks made of a stem, (count, 2, length)."""
    return torch.stack([make_noise(2, length, seed=seed) for seed in range(count)])


def choose_whole(values: Tensor, how: str) -> Tensor:
    """Choose between the spectra of whole stems, with scipy."""
    geometry = {"window": "hann", "nperseg": FRAME, "noverlap": FRAME - HOP}
    padded = np.pad(values.double().numpy(), ((0, 0), (0, 0), (0, FRAME)))  # scipy's least length
    *_, spectra = signal.stft(padded, **geometry)
    magnitude = np.abs(spectra)
    index = magnitude.argmin(0) if how == "min" else magnitude.argmax(0)
    _, wave = signal.istft(np.take_along_axis(spectra, index[None], 0)[0], **geometry)
    return torch.from_numpy(wave[..., : values.shape[-1]].copy())


def choose_in_blocks(values: Tensor, size: int, how: str = "min", start: int = 0) -> Tensor:
    length = values.shape[-1]
    choice = SpectralChoice(smallest=how == "min", start=start, length=length)
    edges = [*range(start, length, size), length]
    return torch.cat([choice.push(values[..., a:b]) for a, b in pairwise(edges)], dim=-1)


@pytest.mark.parametrize("how", ["min", "max"])
@pytest.mark.parametrize("length", LENGTHS)
def test_result_is_that_of_one_transform(length: int, how: str) -> None:
    values = make_values(length)
    actual = choose_in_blocks(values, length, how)
    assert actual.shape == values.shape[1:]
    assert decibels(choose_whole(values, how), actual) >= 110


@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_do_not_depend_on_blocks(length: int) -> None:
    values = make_values(length)
    whole = choose_in_blocks(values, length)
    for size in {7, 1023, 1024, 3000} if length < 3000 else {500, 1024, 5001}:
        assert torch.equal(choose_in_blocks(values, size), whole)


def test_result_may_begin_within_the_track() -> None:
    values = make_values(20_001)
    whole = choose_in_blocks(values, 20_001)
    for start in (0, 1, 2047, 2048, 10_000):
        first = find_first(start)
        part = choose_in_blocks(values, 3000, start=first)
        assert torch.equal(part[..., start - first :], whole[..., start:])


def test_stem_of_one_network_is_left_alone() -> None:
    values = make_values(5000, count=1)
    assert torch.equal(choose_in_blocks(values, 700), values[0])


def test_memory_does_not_grow_with_the_track() -> None:
    choice = SpectralChoice(smallest=True, start=0, length=10**9)
    for _ in range(20):
        choice.push(make_values(3000))
    assert choice._samples is not None and choice._samples.shape[-1] < FRAME
