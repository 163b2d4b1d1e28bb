"""The bench measures the time outside of networks also where windows run side by side."""

import threading
from unittest import mock

import pytest
import torch

from demucs_infer.api import Separator
from demucs_infer.engine.pipeline import TensorTrack
from demucs_infer.engine.runner import Runner
from tests.bench import worker
from tests.bench.worker import NetworkClock, measure
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import ScaleModel


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[NetworkClock]:
    """Restore the clock, and the method that it watches, after the test."""
    monkeypatch.setattr(NetworkClock, "seconds", 0.0)
    monkeypatch.setattr(Runner, "_forward", Runner._forward)
    return NetworkClock


def test_time_of_networks_that_run_side_by_side_counts_once(clock: type[NetworkClock]) -> None:
    times = [0.0, 7.0, 10.0, 11.5]  # the first pass begins at 0; the longer of two ends at 7
    with mock.patch.object(worker.time, "perf_counter", side_effect=times):
        with clock.running(), clock.running():
            pass
        with clock.running():
            pass
    assert clock.seconds == 8.5


def test_share_outside_of_networks_is_not_negative(clock: type[NetworkClock]) -> None:
    class MeetingModel(ScaleModel):
        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            barrier.wait(30)  # so that each pass takes all the time of another one
            threading.Event().wait(0.2)
            return super().forward(mix)

    barrier = threading.Barrier(2)
    clock.watch()
    separator = Separator.from_model(MeetingModel(), device="cpu", shifts=0, overlap=0, jobs=2)
    track = TensorTrack(make_noise(2, 4 * 8000))
    figures, _ = measure(lambda: list(separator.stream_blocks(track)), "cpu")
    assert 0 <= figures["outside"] < 1
    assert clock.seconds <= figures["seconds"]
