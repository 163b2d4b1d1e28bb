"""The form of networks for GPUs, emulated on a CPU: exact, or 60 dB, on every kind of window."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from demucs_infer import spec
from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs, Hybrid
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu.arithmetic import (
    PRECISIONS,
    Arithmetic,
    Precision,
    choose_arithmetic,
    round_to_tf32,
)
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.optimized.gpu.spectra import PlaneTransform, compute_without_complex
from demucs_infer.optimized.optimize import optimize
from tests.bench.steps import make_released_network
from tests.helpers.audio_signals import make_noise
from tests.helpers.bursts import decibels, make_corpus
from tests.helpers.networks import TINY, randomize
from tests.optimized.test_optimized import HYBRIDS

CPU = torch.device("cpu")
EXACT = Precision("float32", emulated=True)
SPLIT = Precision("split", emulated=True)
FULL = Precision("float32", PRECISIONS["fp32"].exceptions, emulated=True)
HALF = Precision("half", PRECISIONS["fp16"].exceptions, emulated=True)
CORPUS = make_corpus(8000)


def round_weights(network: nn.Module) -> nn.Module:
    """Round the weights to half precision, in which all released networks are stored."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network


@pytest.mark.parametrize(
    ("precision", "complex_numbers"),
    [
        pytest.param(EXACT, True, id="complex"),
        pytest.param(EXACT, False, id="planes"),
        pytest.param(SPLIT, True, id="products of 22 bits"),
    ],
)
@pytest.mark.parametrize("name", HYBRIDS)
def test_float32_form_of_htdemucs_is_class_b(
    name: str, precision: Precision, complex_numbers: bool
) -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"] | HYBRIDS[name]))
    fast = optimize_for_gpu(network, precision, CPU, complex_numbers=complex_numbers)
    mix = make_noise(network.audio_channels, 8000)[None]
    with torch.inference_mode():
        assert decibels(network(mix), fast(mix)) >= 100


@pytest.mark.parametrize(
    ("network", "samples"),
    [
        pytest.param(HDemucs(**TINY["HDemucs"]), 20_000, id="hdemucs"),
        pytest.param(Demucs(**TINY["Demucs"]), 8000, id="demucs"),
        pytest.param(Demucs(**TINY["Demucs"] | {"lstm_layers": 1}), 7001, id="demucs with LSTM"),
    ],
)
def test_float32_form_of_older_networks_is_class_b(network: nn.Module, samples: int) -> None:
    network = randomize(network)
    fast = optimize_for_gpu(network, EXACT, CPU)
    mix = torch.stack([make_noise(2, samples), make_noise(2, samples, seed=1)])
    with torch.inference_mode():
        assert decibels(network(mix), fast(mix)) >= 100


@pytest.mark.parametrize("window", [name for name in CORPUS if name != "silence"])
@pytest.mark.parametrize("name", ["released", "no branches", "no transformer", "no layer scale"])
def test_half_precision_keeps_60_db_on_every_window(name: str, window: str) -> None:
    network = round_weights(randomize(HTDemucs(**TINY["HTDemucs"] | HYBRIDS[name])))
    fast = optimize_for_gpu(network, HALF, CPU)
    mix = CORPUS[window][None]
    with torch.inference_mode():
        expected, output = network(mix), fast(mix)
    assert bool(output.isfinite().all())
    assert decibels(expected, output) >= 60


@pytest.mark.parametrize("window", [name for name in CORPUS if name != "silence"])
def test_full_precision_is_class_b_on_every_window(window: str) -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    mix = CORPUS[window][None]
    with torch.inference_mode():
        assert decibels(network(mix), optimize_for_gpu(network, FULL, CPU)(mix)) >= 100


def test_older_gpus_do_without_tf32() -> None:
    for name in PRECISIONS:
        older = choose_arithmetic(name, has_tf32=False)
        kinds = {older.default, *older.exceptions.values()}
        assert kinds <= {"half", "float32"}
        assert choose_arithmetic(name, has_tf32=True) == PRECISIONS[name]


def test_half_precision_keeps_silence_silent() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    with torch.inference_mode():
        output = optimize_for_gpu(network, HALF, CPU)(CORPUS["silence"][None])
    assert float(output.abs().max()) <= 1e-6


def test_half_precision_of_every_layer_would_lose_bursts() -> None:
    """Why the waveform branch is in float32: its gates amplify the error of large numbers."""
    network = round_weights(make_released_network())
    randomize(network)
    network.segment = 0.5
    mix = make_corpus(22_050)["burst of crest 60"][None]
    with torch.inference_mode():
        expected = network(mix)
        naive = optimize_for_gpu(network, Precision("half", emulated=True), CPU)(mix)
        kept = optimize_for_gpu(network, HALF, CPU)(mix)
    assert decibels(expected, naive) < 55
    assert decibels(expected, kept) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("window", ["burst of crest 60", "click"])
def test_half_precision_keeps_60_db_at_the_released_shape(window: str) -> None:
    network = round_weights(randomize(make_released_network()))
    mix = make_corpus(343_980)[window][None]
    with torch.inference_mode():
        expected = network(mix)
        output = optimize_for_gpu(network, HALF, CPU)(mix)
    assert decibels(expected, output) >= 60


class ForbidComplexAndDouble(TorchDispatchMode):
    """Fail at the first operation that makes a complex or a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                assert not x.is_complex() and x.dtype != torch.float64, func
        return result


def test_network_without_complex_numbers_makes_none_and_no_float64() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    fast = optimize_for_gpu(network, EXACT, CPU, complex_numbers=False)
    mix = make_noise(2, 8000)[None]
    with torch.inference_mode():
        expected = network(mix)
        with ForbidComplexAndDouble():
            output = fast(mix)
    assert decibels(expected, output) >= 100


@pytest.mark.parametrize(
    ("network", "samples"),
    [
        pytest.param(HTDemucs(**TINY["HTDemucs"]), 8000, id="htdemucs"),
        pytest.param(HDemucs(**TINY["HDemucs"]), 20_001, id="hdemucs"),
    ],
)
def test_network_for_apple_makes_no_complex_numbers(network: Hybrid, samples: int) -> None:
    randomize(network)
    fast = compute_without_complex(network, CPU)
    mix = make_noise(2, samples)[None]
    with torch.inference_mode():
        expected = network(mix)
        with ForbidComplexAndDouble():
            output = fast(mix)
    assert decibels(expected, output) >= 100


def test_devices_without_complex_numbers_get_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "_WITHOUT_COMPLEX", frozenset({"meta"}))
    network = HTDemucs(**TINY["HTDemucs"]).to("meta")
    fast = optimize(network, "fp32", device="meta")
    assert fast.analyze(torch.empty(1, 2, 8000, device="meta")).shape == (1, 4, 256, 63)
    magnitudes = HTDemucs(**TINY["HTDemucs"] | {"cac": False}).to("meta")
    assert optimize(magnitudes, "fp32", device="meta") is magnitudes, "its spectra go to the CPU"


@pytest.mark.parametrize("size", [4096, 512, 96, 30, 14, 2])
def test_transform_in_planes_equals_the_complex_one(size: int) -> None:
    transform = PlaneTransform(size)
    frames = make_noise(3, 5 * size).unflatten(-1, (5, size))
    spectrum = transform.transform(frames)
    expected = torch.fft.rfft(frames, norm="ortho")[..., :-1]
    assert decibels(torch.view_as_real(expected), spectrum) >= 110
    padded = torch.nn.functional.pad(torch.view_as_complex(spectrum), (0, 1))
    inverse = torch.fft.irfft(padded, norm="ortho")
    assert decibels(inverse, transform.invert(spectrum)) >= 110


def test_odd_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an even number"):
        PlaneTransform(15)


def test_tf32_rounds_to_eleven_bits() -> None:
    exact = torch.tensor([1.0, 1 + 2**-10, -3.5, 0.0, float("inf"), 1e30])
    assert torch.equal(round_to_tf32(exact)[:5], exact[:5])
    assert float(round_to_tf32(torch.tensor(1 + 2**-12))) == 1.0
    assert float(round_to_tf32(torch.tensor(1 + 2**-11))) == 1 + 2**-10
    assert float(round_to_tf32(exact)[5]) > 9.99e29  # the range is that of float32
    assert bool(round_to_tf32(torch.tensor(float("nan"))).isnan())


def test_weights_that_half_precision_holds_have_no_low_digits() -> None:
    weight = torch.randn(6, 5, 3, 3)
    arithmetic = Arithmetic("split", emulated=True)
    assert arithmetic.read_weight(weight, 1).shape == (6, 15, 3, 3)
    assert arithmetic.read_weight(weight.half().float(), 1).shape == (6, 10, 3, 3)
    assert arithmetic.read_weight(weight, 0).shape == (18, 5, 3, 3)


@pytest.mark.parametrize("rounded", [True, False], ids=["weights of 11 bits", "any weights"])
def test_products_of_split_digits_have_22_bits(rounded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 8, 9, generator=generator)
    weight = torch.randn(20, 30, 3, 3, generator=generator)
    weight = weight.half().float() if rounded else weight
    arithmetic = Arithmetic("split", emulated=True)
    y = arithmetic.convolve(x, arithmetic.read_weight(weight, 1), stride=(1, 1), padding=(1, 1))
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert decibels(exact, y.double()) >= 125


def test_emulated_half_precision_stores_what_half_precision_can_hold() -> None:
    x = torch.randn(100) * 100
    stored = Arithmetic("half", emulated=True).store(x)
    assert stored.dtype == torch.float32
    assert torch.equal(stored, Arithmetic("half").store(x).float())
