"""A track on the device of its networks gives the stems that it gives elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from demucs_infer.engine import device_track, pipeline
from demucs_infer.engine.device_track import DeviceTrack, download, upload
from demucs_infer.engine.level import PIECE, Level, measure, measure_on_device
from demucs_infer.engine.pipeline import Block, TensorTrack, separate, separate_many
from demucs_infer.errors import SeparationError
from demucs_infer.events import ChunkProcessed, TrackFinished
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import RecordingModel, ScaleModel

CPU = torch.device("cpu")


@dataclass
class CountedTrack:
    """A track that counts how often it is read, and overwrites what it has handed out."""

    samples: Tensor
    readings: int = 0
    channels: int = 2

    def blocks(self) -> Iterator[Tensor]:
        self.readings += 1
        for block in self.samples.split(3000, dim=-1):
            shared = block.clone()
            yield shared
            shared.fill_(float("nan"))


@pytest.mark.parametrize("count", [1, 999, PIECE, 2 * PIECE + 7, 5 * PIECE])
@pytest.mark.parametrize("block", [1000, PIECE, 1 << 20])
def test_level_measured_on_a_device_equals_the_other_one(count: int, block: int) -> None:
    samples = make_noise(2, count) + 0.01
    expected = measure([samples])
    level = measure_on_device(samples.split(block, dim=-1))
    assert level.length == expected.length == count
    assert level.mean == pytest.approx(expected.mean, rel=1e-9)
    assert level.std == pytest.approx(expected.std, rel=1e-9)


def test_level_of_silence_and_of_nothing() -> None:
    assert measure_on_device([torch.zeros(2, 100)]) == Level(length=100)
    assert measure_on_device([]) == Level()


def test_track_with_nan_is_refused_with_its_place() -> None:
    samples = torch.zeros(2, 3 * PIECE)
    samples[1, PIECE + 5] = float("nan")
    with pytest.raises(SeparationError, match=f"between samples {PIECE} and {2 * PIECE}"):
        measure_on_device([samples])


def test_track_is_read_and_transferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_track, "UPLOAD_SAMPLES", 1024)
    samples = make_noise(2, 10_000)
    original = CountedTrack(samples)
    track = DeviceTrack(original, CPU, max_bytes=1 << 20)
    level = track.measure()
    assert torch.equal(torch.cat(list(track.blocks()), dim=-1), samples)
    assert original.readings == 1 and track.length == level.length == 10_000


def test_track_that_does_not_fit_is_read_again() -> None:
    samples = make_noise(2, 10_000)
    original = CountedTrack(samples)
    track = DeviceTrack(original, CPU, max_bytes=50_000)
    for _ in range(2):
        copies = [block.clone() for block in track.blocks()]
        assert torch.equal(torch.cat(copies, dim=-1), samples)
    assert original.readings == 2


def test_track_that_was_not_read_to_its_end_is_not_kept() -> None:
    original = CountedTrack(make_noise(2, 10_000))
    track = DeviceTrack(original, CPU, max_bytes=1 << 20)
    next(track.blocks())
    assert sum(block.shape[-1] for block in track.blocks()) == 10_000
    assert original.readings == 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine treat the CPU as a device with a queue of its own."""
    monkeypatch.setattr(pipeline, "runs_beside_cpu", lambda _device: True)
    monkeypatch.setattr(device_track, "UPLOAD_SAMPLES", 5000)


OPTIONS = SeparationOptions(shifts=1, overlap=0.25, batch_size=2)


def collect(track: object, model: object, options: SeparationOptions = OPTIONS) -> Tensor:
    blocks = [item for item in separate(track, model, options=options) if isinstance(item, Block)]
    return torch.cat([block.stems for block in blocks], dim=-1)


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_stems_are_the_same_as_without_a_device(
    padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SeparationOptions(shifts=1, batch_size=2, padding=padding)
    samples = make_noise(2, 30_000) + 0.01
    expected = collect(TensorTrack(samples), ScaleModel(), options)
    monkeypatch.setattr(pipeline, "runs_beside_cpu", lambda _device: True)
    assert torch.allclose(collect(TensorTrack(samples), ScaleModel(), options), expected, atol=1e-6)


def test_batches_wait_in_the_queue_while_earlier_ones_are_stitched(gpu: None) -> None:
    model = RecordingModel()
    stream = separate(TensorTrack(make_noise(2, 60_000)), model, options=OPTIONS)
    for item in stream:
        if isinstance(item, ChunkProcessed):
            break
    # The first batch is done; at most two more have been queued by then.
    assert len(model.seen) <= 3
    stream.close()
    assert len(model.seen) <= 3, "a closed stream runs no more batches"


def test_tracks_share_batches_on_a_device(gpu: None) -> None:
    options = SeparationOptions(shifts=0, batch_size=4)
    tracks = [TensorTrack(make_noise(2, 6000, seed)) for seed in range(9)]
    model = RecordingModel(segment=0.75)
    finished = [
        index
        for index, item in separate_many(tracks, model, options=options)
        if isinstance(item, TrackFinished)
    ]
    assert sorted(finished) == list(range(9))
    assert max(shape[0] for shape in model.seen) == 4


def test_transfers_to_the_same_device_change_nothing() -> None:
    samples = make_noise(2, 100)
    assert torch.equal(upload(samples, CPU), samples)
    assert torch.equal(download(samples, CPU), samples)
