"""Windows have the right samples, and stitching inverts cutting."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demucs_infer.engine.level import Level
from demucs_infer.engine.plan import Chunk, plan_chunks, plan_padded
from demucs_infer.engine.stitch import (
    PADDINGS,
    WINDOWS,
    OverlapAdd,
    TrackBuffer,
    make_window,
    pad_audio,
    usable_weights,
)
from tests.helpers.audio_signals import make_noise


def ramp(length: int) -> Tensor:
    """Return a track whose sample n is n + 1, in two channels: integers, so that sums are exact."""
    return (torch.arange(length, dtype=torch.float32) + 1).expand(2, -1)


def split_blocks(track: Tensor, size: int) -> Iterator[Tensor]:
    yield from track.split(size, dim=-1) if track.shape[-1] else iter(())


@settings(max_examples=1000, deadline=None)
@given(
    length=st.integers(1, 200),
    segment=st.integers(1, 60),
    overlap=st.integers(0, 59),
    origin=st.integers(-80, 0),
    extra=st.integers(0, 40),
    size=st.integers(1, 90),
)
def test_cut_and_stitch_are_exact_on_integers(
    length: int, segment: int, overlap: int, origin: int, extra: int, size: int
) -> None:
    stride = max(1, segment - overlap)
    chunks = plan_chunks(
        length, segment=segment, stride=stride, window=lambda n: n + extra, origin=origin
    )
    track = ramp(length)
    buffer, sums = TrackBuffer(split_blocks(track, size), length), OverlapAdd(origin)
    weights = torch.ones(segment)
    parts = []
    for number, chunk in enumerate(chunks):
        window = buffer.cut(chunk)
        assert window.shape == (2, chunk.window)
        sums.add(
            chunk.start, window[..., chunk.skip : chunk.skip + len(chunk)], weights[: len(chunk)]
        )
        last = number + 1 == len(chunks)
        parts.append(sums.take(length if last else chunks[number + 1].start))
        later = [length, *(other.read for other in chunks[number + 1 :])]
        buffer.drop(min(later))
    whole = torch.cat(parts, dim=-1)
    assert torch.equal(whole[..., -origin:], track)
    assert not whole[..., :-origin].any() if origin else True, "before the track is silence"


@settings(max_examples=400, deadline=None)
@given(
    length=st.integers(1, 120),
    pad=st.integers(0, 150),
    mode=st.sampled_from(PADDINGS),
    size=st.integers(1, 50),
    chunk=st.integers(1, 60),
)
def test_padding_equals_numpy_for_any_length(
    length: int, pad: int, mode: str, size: int, chunk: int
) -> None:
    track = ramp(length)
    names = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    expected = torch.from_numpy(np.pad(track.numpy(), ((0, 0), (pad, pad)), mode=names[mode]))
    assert torch.equal(pad_audio(track, pad, pad, mode), expected)
    # The same, cut from a stream.
    for at in range(-pad, length + pad - chunk + 1, 7):
        buffer = TrackBuffer(split_blocks(track, size), length)
        window = buffer.cut(Chunk(at, at + chunk, at, chunk), mode, pad)
        assert torch.equal(window, expected[:, at + pad : at + pad + chunk])


def test_reflect_equals_torch_for_a_long_track() -> None:
    track = make_noise(2, 300)
    expected = torch.nn.functional.pad(track, (128, 77), mode="reflect")
    assert torch.equal(pad_audio(track, 128, 77), expected)


def test_unknown_padding_is_rejected() -> None:
    with pytest.raises(ValueError, match="constant, reflect, replicate"):
        pad_audio(make_noise(2, 10), 1, 1, "circular")
    with pytest.raises(ValueError, match="0 or more"):
        pad_audio(make_noise(2, 10), -1, 1)


def test_window_is_normalized_and_silent_outside_the_track() -> None:
    track = make_noise(2, 100)
    level = Level(mean=0.25, std=2.0, length=100)
    window = TrackBuffer([track], 100, level=level).cut(Chunk(-10, 120, -10, 130))
    assert torch.equal(window[:, 10:110], (track - 0.25) / 2.0)
    # Padded after the level was taken, as upstream does: silence, not minus the mean.
    assert not window[:, :10].any()
    assert not window[:, 110:].any()


def test_window_entirely_outside_the_track_is_silent() -> None:
    buffer = TrackBuffer([make_noise(2, 100)], 100)
    assert torch.equal(buffer.cut(Chunk(-50, -20, -50, 30)), torch.zeros(2, 30))


def test_source_that_ends_early_is_an_error() -> None:
    buffer = TrackBuffer([make_noise(2, 100)], 101)
    with pytest.raises(ValueError, match="ended after 100 of 101"):
        buffer.read(0, 101)


def test_track_buffer_keeps_only_needed_pieces() -> None:
    pulled = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield torch.ones(2, 65_536)

    buffer = TrackBuffer(blocks(), 100 * 65_536)
    buffer.read(0, 10)
    assert pulled == 1
    buffer.read(65_530, 65_540)
    buffer.drop(65_536)
    assert len(buffer._pieces) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 10, 101])
def test_window_shapes(length: int) -> None:
    assert torch.equal(make_window("hann", length), torch.hann_window(length))
    assert torch.equal(make_window("hamming", length), torch.hamming_window(length))
    assert torch.equal(make_window("ones", length), torch.ones(length))
    up, down = list(range(1, length // 2 + 1)), list(range(length - length // 2, 0, -1))
    triangle = torch.tensor(up + down) / max(up + down)
    assert torch.equal(make_window("triangle", length), triangle)
    assert torch.equal(make_window("triangle", length, power=2.0), triangle**2.0)
    fade = make_window("linear_fade", length)
    assert fade.max() == 1
    assert fade.min() > 0


@pytest.mark.parametrize("shape", WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 10, 101])
def test_partial_window_equals_the_start_of_the_whole(shape: str, length: int) -> None:
    whole = make_window(shape, length, power=2.0)
    for stop in (1, 5, length, 1000):
        assert torch.equal(make_window(shape, length, power=2.0, stop=stop), whole[:stop])


def test_unknown_window_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be one of triangle, hann"):
        make_window("kaiser", 10)
    with pytest.raises(ValueError, match="1 or more"):
        make_window("hann", 0)


@pytest.mark.parametrize("shape", WINDOWS)
@pytest.mark.parametrize("stride", [1, 39, 50, 64, 99, 100])
def test_any_window_and_stride_return_the_track(shape: str, stride: int) -> None:
    track = make_noise(2, 1234)
    weights = usable_weights(make_window(shape, 100))
    buffer, sums, parts = TrackBuffer([track], 1234), OverlapAdd(stride - 100), []
    for chunk in plan_padded(1234, segment=100, stride=stride):
        sums.add(chunk.start, buffer.cut(chunk), weights)
        parts.append(sums.take(chunk.start + stride))
    whole = torch.cat(parts, dim=-1)[:, 100 - stride :][:, :1234]
    # A sum of at most 100 products over the sum of its weights: each rounds to 6e-8 of 0.5.
    torch.testing.assert_close(whole, track, rtol=0, atol=1e-6)


def test_memory_of_overlap_add_is_constant() -> None:
    weights = make_window("triangle", 100)
    sums = OverlapAdd()
    sizes = set()
    for number in range(10_000):
        sums.add(number * 25, torch.ones(4, 2, 100), weights)
        sums.take((number + 1) * 25)
        if number in (10, 9_999):
            sizes.add(sum(tensor.numel() for tensor in sums.tensors))
    assert sizes == {(4 * 2 + 1) * 100}


def test_take_rejects_samples_that_were_not_added() -> None:
    sums = OverlapAdd()
    with pytest.raises(ValueError, match="no samples"):
        sums.take(1)
    sums.add(0, torch.ones(1, 1, 10), torch.ones(10))
    with pytest.raises(ValueError, match="no samples up to 11"):
        sums.take(11)
    assert sums.take(10).shape == (1, 1, 10)
    assert sums.take(10).shape == (1, 1, 0)
