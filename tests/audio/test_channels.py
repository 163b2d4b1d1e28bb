"""Channels and sample rates are converted as upstream does, for blocks of any size."""

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
from tests.helpers.audio_signals import make_noise

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
# The reduced ratios are large: the filters are cut to their support.
LARGE_RATIOS = [(44056, 44100), (47952, 44100), (44099, 44100)]


def resample_stream(
    wav: Tensor, rates: tuple[int, int], cuts: list[int], method: str = "julius"
) -> Tensor:
    stream = StreamResampler(*rates, wav.shape[0], method)  # type: ignore[arg-type]
    edges = [0, *sorted(cut % (wav.shape[-1] + 1) for cut in cuts), wav.shape[-1]]
    parts = [stream.push(wav[:, a:b]) for a, b in zip(edges, edges[1:])]
    return torch.cat([*parts, stream.finish()], dim=-1)


CUTS = st.lists(st.integers(0, 10**6), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RATES), st.integers(2, 6), st.integers(1, 30000), CUTS)
def test_stream_equals_julius_bit_for_bit(
    rates: tuple[int, int], channels: int, length: int, cuts: list[int]
) -> None:
    wav = make_noise(channels, length)
    expected = julius.resample_frac(wav, *rates)
    assert torch.equal(resample_stream(wav, rates, cuts), expected)
    assert torch.equal(resample(wav, *rates), expected)


@pytest.mark.parametrize("rates", RATES[:6])
def test_long_stream_equals_julius_bit_for_bit(rates: tuple[int, int]) -> None:
    wav = make_noise(2, 400_003)
    assert torch.equal(
        resample_stream(wav, rates, [7, 100_000, 333_333]), julius.resample_frac(wav, *rates)
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(RATES + LARGE_RATIOS[1:]), st.integers(1, 2), st.integers(1, 100_000), CUTS)
def test_block_sizes_do_not_change_the_result(
    rates: tuple[int, int], channels: int, length: int, cuts: list[int]
) -> None:
    wav = make_noise(channels, length)
    assert torch.equal(resample_stream(wav, rates, cuts), resample_stream(wav, rates, []))


def test_mono_equals_one_channel_of_stereo() -> None:
    wav = make_noise(1, 50_000)
    pair = julius.resample_frac(wav.expand(2, -1), 48000, 44100)
    assert torch.equal(resample(wav, 48000, 44100), pair[:1])
    assert torch.equal(
        resample_stream(wav, (22050, 44100), [1]),
        julius.resample_frac(wav.expand(2, -1), 22050, 44100)[:1],
    )


def test_large_ratios_equal_julius_up_to_rounding() -> None:
    wav = make_noise(2, 50_000)
    expected = julius.resample_frac(wav, 47952, 44100)
    # Terms below 1e-15 are left out of the sums: rounding of float32 remains.
    torch.testing.assert_close(resample(wav, 47952, 44100), expected, rtol=0, atol=1e-6)


def test_large_ratios_keep_a_tone() -> None:
    time = torch.arange(44056, dtype=torch.float64) / 44056
    tone = torch.sin(2 * torch.pi * 1000 * time).float().expand(2, -1)
    out_time = torch.arange(44100, dtype=torch.float64) / 44100
    expected = torch.sin(2 * torch.pi * 1000 * out_time).float()
    converted = resample(tone, 44056, 44100)[0]
    assert converted.shape == expected.shape
    # Away from the ends; upstream's float32 phases leave about -65 dB at such ratios.
    torch.testing.assert_close(converted[500:-500], expected[500:-500], rtol=0, atol=2e-3)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("method", ["julius", "soxr"])
def test_empty_and_tiny_tracks_are_resampled(length: int, method: str) -> None:
    wav = make_noise(2, length)
    assert resample_stream(wav, (22050, 44100), [], method).shape == (2, 2 * length)


@pytest.mark.parametrize("rates", [(48000, 44100), (22050, 44100), (44056, 44100)])
def test_soxr_stream_equals_soxr_of_the_whole(rates: tuple[int, int]) -> None:
    wav = make_noise(2, 100_003)
    expected = soxr.resample(wav.T.numpy(), *rates, quality="VHQ")
    converted = resample_stream(wav, rates, [1000, 70_000], "soxr")
    assert torch.equal(converted, torch.from_numpy(expected.T.copy()))


def test_missing_soxr_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError, match="pip install soxr"):
        StreamResampler(48000, 44100, 2, "soxr")


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("to_channels", [1, 2, 6])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_convert_audio_equals_upstreams(
    channels: int, to_channels: int, shape: tuple[int, ...]
) -> None:
    wav = make_noise(channels * (3 if shape else 1), 5000).reshape(*shape, channels, 5000)
    before = wav.clone()
    if 1 < channels < to_channels:
        with pytest.raises(ValueError, match="2 channels cannot become 6"):
            convert_channels(wav, to_channels)
        return
    converted = convert_audio(wav, 48000, 44100, to_channels)
    expected = upstream_convert_audio(wav, 48000, 44100, to_channels)
    if wav.numel() // 5000 > 1 and to_channels > 1:
        assert torch.equal(converted, expected)
    # With a single channel, the order of upstream's sums depends on the length.
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-6)
    assert torch.equal(wav, before)


def test_invalid_arguments_are_reported() -> None:
    with pytest.raises(ValueError, match="at least 1 Hz"):
        StreamResampler(0, 44100, 2)
    with pytest.raises(ValueError, match="channels"):
        StreamResampler(48000, 44100, 0)
    with pytest.raises(ValueError, match="method"):
        StreamResampler(48000, 44100, 2, "swr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"2 channels \(C, t\), got \(3, 10\)"):
        StreamResampler(48000, 44100, 2).push(torch.zeros(3, 10))
    with pytest.raises(ValueError, match="channels"):
        convert_channels(torch.zeros(2, 10), 0)
