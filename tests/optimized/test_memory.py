"""A window of an optimized network frees its tensors early."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.optimize import optimize
from demucs_infer.system.arena import Arena, use_arenas
from tests.helpers.audio_signals import make_noise

FULL_WIDTH = {"sources": list("abcd"), "bottom_channels": 512, "dconv_mode": 3}
"""htdemucs as released, but for the number of layers of its transformer."""

KEPT = 0 if sys.version_info[:2] == (3, 11) else 40
"""Bytes per sample that other versions of Python may need: 3.10 keeps the arguments of a call until
it returns."""


def measure_live_bytes(network: torch.nn.Module, mix: torch.Tensor, trace: Path) -> int:
    """Return the peak of the tensors that are alive while `network` runs."""
    activities = [ProfilerActivity.CPU]
    with torch.inference_mode(), profile(activities=activities, profile_memory=True) as recorder:
        network(mix)
    recorder.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    live = peak = 0
    for event in events:
        if event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak


def test_tensors_of_a_window_are_freed_as_soon_as_they_are_not_needed(tmp_path: Path) -> None:
    network = optimize(HTDemucs(**FULL_WIDTH, t_layers=1, segment=3.9).eval())
    mix = make_noise(2, int(3.9 * 44_100))[None]
    peak = measure_live_bytes(network, mix, tmp_path / "trace.json")
    assert peak <= (490 + KEPT) * mix.shape[-1]  # 479 with Python 3.11


def test_large_tensors_of_a_window_share_an_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = optimize(HTDemucs(**FULL_WIDTH, t_layers=1, segment=3.9).eval())
    mix = make_noise(2, int(3.9 * 44_100))[None]
    highest = [0]
    allocate = Arena.allocate

    def record(self: Arena, size: int) -> memoryview | None:
        block = allocate(self, size)
        highest.append(self._free[-1][0])
        return block

    monkeypatch.setattr(Arena, "allocate", record)
    with use_arenas():
        from_malloc = measure_live_bytes(network, mix, tmp_path / "trace.json")
    # 81 on Python 3.11; 121 on 3.13; 146 on 3.10 with torch 2.4.
    assert from_malloc <= (95 + 1.5 * KEPT) * mix.shape[-1]
    assert max(highest) <= (500 + KEPT) * mix.shape[-1]  # 489
