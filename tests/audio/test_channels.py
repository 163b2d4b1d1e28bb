"""Channels and rates change as upstream changes them, whatever the blocks."""

import sys

import julius
import pytest
import soxr
import torch
from demucs.audio import convert_audio as upstream_convert_audio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demucs_infer.audio.channels import (
    StreamResampler,
    convert_audio,
    convert_channels,
    resample,
)
from tests.helpers.networks import noise

RATES = [
    (48000, 44100),
    (22050, 44100),
    (96000, 44100),
    (44100, 48000),
    (192000, 44100),
    (32000, 44100),
    (8000, 44100),
    (44100, 22050),
    (37800, 44100),
    (44100, 16000),
    (3, 2),
    (1, 7),
]
# Reduced, these stay large: the filters are cut to their support.
AWKWARD = [(44056, 44100), (47952, 44100), (44099, 44100)]


def streamed(
    wav: Tensor, rates: tuple[int, int], cuts: list[int], method: str = "julius"
) -> Tensor:
    stream = StreamResampler(*rates, wav.shape[0], method)  # type: ignore[arg-type]
    edges = [0, *sorted(cut % (wav.shape[-1] + 1) for cut in cuts), wav.shape[-1]]
    parts = [stream.push(wav[:, a:b]) for a, b in zip(edges, edges[1:])]
    return torch.cat([*parts, stream.finish()], dim=-1)


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RATES), st.integers(2, 6), st.integers(1, 30000), CUTS)
def test_a_stream_is_julius_to_the_bit(
    rates: tuple[int, int], channels: int, length: int, cuts: list[int]
) -> None:
    wav = noise(channels, length)
    expected = julius.resample_frac(wav, *rates)
    assert torch.equal(streamed(wav, rates, cuts), expected)
    assert torch.equal(resample(wav, *rates), expected)


@pytest.mark.parametrize("rates", RATES[:6])
def test_beyond_one_piece_a_stream_is_still_julius(rates: tuple[int, int]) -> None:
    wav = noise(2, 400_003)
    assert torch.equal(
        streamed(wav, rates, [7, 100_000, 333_333]), julius.resample_frac(wav, *rates)
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(RATES + AWKWARD[1:]), st.integers(1, 2), st.integers(1, 100_000), CUTS)
def test_the_blocks_change_nothing(
    rates: tuple[int, int], channels: int, length: int, cuts: list[int]
) -> None:
    wav = noise(channels, length)
    assert torch.equal(streamed(wav, rates, cuts), streamed(wav, rates, []))


def test_one_channel_is_what_it_is_in_a_pair() -> None:
    wav = noise(1, 50_000)
    pair = julius.resample_frac(wav.expand(2, -1), 48000, 44100)
    assert torch.equal(resample(wav, 48000, 44100), pair[:1])
    assert torch.equal(
        streamed(wav, (22050, 44100), [1]),
        julius.resample_frac(wav.expand(2, -1), 22050, 44100)[:1],
    )


def test_awkward_rates_are_julius_but_for_the_order_of_a_sum() -> None:
    wav = noise(2, 50_000)
    expected = julius.resample_frac(wav, 47952, 44100)
    # The sums leave out terms below 1e-15: roundings of float32 at this level remain.
    torch.testing.assert_close(resample(wav, 47952, 44100), expected, rtol=0, atol=1e-6)


def test_awkward_rates_keep_a_tone() -> None:
    time = torch.arange(44056, dtype=torch.float64) / 44056
    tone = torch.sin(2 * torch.pi * 1000 * time).float().expand(2, -1)
    out_time = torch.arange(44100, dtype=torch.float64) / 44100
    expected = torch.sin(2 * torch.pi * 1000 * out_time).float()
    there = resample(tone, 44056, 44100)[0]
    assert there.shape == expected.shape
    # Away from the ends; upstream's float32 phases leave about -65 dB at such ratios.
    torch.testing.assert_close(there[500:-500], expected[500:-500], rtol=0, atol=2e-3)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("method", ["julius", "soxr"])
def test_next_to_nothing_is_resampled(length: int, method: str) -> None:
    wav = noise(2, length)
    assert streamed(wav, (22050, 44100), [], method).shape == (2, 2 * length)


@pytest.mark.parametrize("rates", [(48000, 44100), (22050, 44100), (44056, 44100)])
def test_soxr_in_a_stream_is_soxr_at_once(rates: tuple[int, int]) -> None:
    wav = noise(2, 100_003)
    expected = soxr.resample(wav.T.numpy(), *rates, quality="VHQ")
    there = streamed(wav, rates, [1000, 70_000], "soxr")
    assert torch.equal(there, torch.from_numpy(expected.T.copy()))


def test_without_soxr_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match=r"demucs-infer\[soxr\]"):
        StreamResampler(48000, 44100, 2, "soxr")


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("wanted", [1, 2, 6])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_conversion_is_upstreams(channels: int, wanted: int, shape: tuple[int, ...]) -> None:
    wav = noise(channels * (3 if shape else 1), 5000).reshape(*shape, channels, 5000)
    kept = wav.clone()
    if 1 < channels < wanted:
        with pytest.raises(ValueError, match="2 channels cannot become 6"):
            convert_channels(wav, wanted)
        return
    there = convert_audio(wav, 48000, 44100, wanted)
    expected = upstream_convert_audio(wav, 48000, 44100, wanted)
    if wav.numel() // 5000 > 1 and wanted > 1:
        assert torch.equal(there, expected)
    # One channel alone: the oracle's order of summation depends on its length.
    torch.testing.assert_close(there, expected, rtol=0, atol=1e-6)
    assert torch.equal(wav, kept)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least 1 Hz"):
        StreamResampler(0, 44100, 2)
    with pytest.raises(ValueError, match="channels"):
        StreamResampler(48000, 44100, 0)
    with pytest.raises(ValueError, match="method"):
        StreamResampler(48000, 44100, 2, "swr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 channels \(C t\), got \(3, 10\)"):
        StreamResampler(48000, 44100, 2).push(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="channels"):
        convert_channels(torch.zeros(2, 10), 0)
