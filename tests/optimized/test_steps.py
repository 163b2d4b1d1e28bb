"""The benchmark of optimization steps can take each step away without changing the result."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import kernels
from demucs_infer.optimized.optimize import optimize
from tests.bench import steps
from tests.bench.pairs import decibels
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, randomize

# As many channels as the Winograd convolution needs.
SHAPE = TINY["HTDemucs"] | {"channels": 96, "depth": 2, "dconv_mode": 3, "segment": 0.25}


@pytest.fixture(scope="module")
def network() -> HTDemucs:
    network = HTDemucs(**(SHAPE | {"t_layers": 2, "sources": ["a", "b"]}))
    return randomize(network)


@pytest.mark.parametrize("name", steps.STEPS)
def test_network_without_a_step_matches_in_class_b(name: str, network: HTDemucs) -> None:
    calls: dict[int, int] = {}

    def count(index: int, replacement: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[index] = calls.get(index, 0) + 1
            return replacement(*args, **kwargs)

        return call

    patches = [
        (target, attribute, count(index, value) if callable(value) else value)
        for index, (target, attribute, value) in enumerate(steps.STEPS[name])
    ]
    mix = make_noise(2, 2000)[None]
    with torch.inference_mode(), mock.patch.dict(steps.STEPS, {name: patches}):
        with steps.remove_step(name):
            output = optimize(copy.copy(network))(mix)
        assert decibels(network(mix), output) >= 100
    # Every replacement that is called at all stands for a step that the network takes.
    assert len(calls) == sum(callable(value) for *_, value in steps.STEPS[name])


def test_steps_depend_on_precision_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_packed_kernels", lambda *_: True)
    monkeypatch.setattr(kernels, "uses_half_width_vectors", lambda: False)
    assert "attention by PyTorch" not in steps.list_steps("bf16")
    assert "attention in rows" not in steps.list_steps("fp32")
    assert "Winograd" in steps.list_steps("fp32")
    assert "Winograd" not in steps.list_steps("bf16")


def test_table_has_the_percentage_of_every_step(network: HTDemucs) -> None:
    names = ["inverse STFT", "Winograd"]
    results = steps.measure_steps(network, make_noise(2, 2000)[None], "fp32", names, rounds=2)
    assert [result.step for result in results] == [steps.ORIGINAL, steps.OPTIMIZED, *names]
    for result in results[2:]:
        assert len(result.cpu_seconds) == 2
        low, high = result.percent_range
        assert low <= high
        assert f"| without {result.step} |" in steps.format_table(results)
        assert f"{result.percent:+.1f} %" in steps.format_table(results)
