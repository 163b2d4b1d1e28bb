"""The kernels in Triton equal the steps in plain PyTorch.

On a machine without a GPU they run in Triton's interpreter, which needs the package `triton`.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu import arithmetic, fused, triton_kernels
from demucs_infer.optimized.gpu.arithmetic import (
    PRECISIONS,
    Arithmetic,
    Precision,
    split_digits,
)
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from tests.helpers.bursts import decibels
from tests.helpers.networks import TINY, randomize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUTS = [
    pytest.param(Arithmetic("float32"), 110, id="float32"),
    pytest.param(Arithmetic("half"), 70, id="half"),
]
ROWS = [
    pytest.param(3, 7, 5, id="less than a block"),
    pytest.param(2, 300, 48, id="several blocks"),
    pytest.param(1, 700, 96, id="several pieces"),
]


def make(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE)


def compare(plain: Any, name: str, *args: Any, decibels_needed: float, **kwargs: Any) -> None:
    """Run a step in plain PyTorch, on the CPU, and by its kernel."""
    on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in args]
    expected = plain(*on_cpu, **kwargs)
    dtypes = [x.dtype if isinstance(x, Arithmetic) else x for x in args]
    actual = getattr(triton_kernels, name)(*dtypes, **kwargs)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (expected, actual))):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert decibels(one.float(), other.cpu().float()) >= decibels_needed


@pytest.mark.parametrize(("out", "needed"), OUTPUTS)
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "no gelu"])
def test_bias_and_gelu(out: Arithmetic, needed: float, gelu: bool) -> None:
    x = make(2, 50, 24, scale=3).to(out.dtype)
    args = (x, make(24, seed=1), out)
    compare(
        fused.add_bias_and_gelu, "add_bias_and_gelu", *args, decibels_needed=needed, gelu=gelu,
        inject=None,
    )  # fmt: skip


def test_injected_waveform_is_added() -> None:
    x, inject = make(2, 9, 6), make(2, 9, 6, seed=2).cpu()
    out = Arithmetic("float32")
    expected = fused.add_bias_and_gelu(x.cpu(), make(6).cpu(), out, inject=inject)
    actual = triton_kernels.add_bias_and_gelu(
        x, make(6), torch.float32, gelu=True, inject=inject.to(DEVICE)
    )
    assert decibels(expected, actual.cpu()) >= 110


@pytest.mark.parametrize(("out", "needed"), OUTPUTS)
@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
def test_gate(out: Arithmetic, needed: float, with_offset: bool) -> None:
    x = make(2, 5, 30, 2 * 12, scale=3).to(out.dtype)
    offset = make(5, 1, 12, seed=2) if with_offset else None
    compare(fused.gate, "gate", x, make(24, seed=1), out, offset, decibels_needed=needed)


@pytest.mark.parametrize(("out", "needed"), OUTPUTS)
@pytest.mark.parametrize(("rows", "steps", "channels"), ROWS)
def test_norm_and_gelu(
    out: Arithmetic, needed: float, rows: int, steps: int, channels: int
) -> None:
    """The last channels are padding: they do not count, and stay 0."""
    x, bias, gain, shift = (
        make(*shape, seed=seed)
        for seed, shape in enumerate([(rows, steps, channels), *[(channels,)] * 3])
    )
    for tensor in (x, bias, gain, shift):
        tensor[..., channels - 2 :] = 0
    expected = fused.normalize_and_gelu(
        x.to(out.dtype).cpu(), bias.cpu(), gain.cpu(), shift.cpu(), 1e-5, out, channels - 2
    )
    actual = triton_kernels.normalize(
        x.to(out.dtype), bias, gain, shift, 1e-5, out.dtype, channels - 2, gelu=True
    )
    assert decibels(expected.float(), actual.cpu().float()) >= needed
    assert not actual[..., channels - 2 :].any()


@pytest.mark.parametrize(("out", "needed"), OUTPUTS)
@pytest.mark.parametrize(("rows", "steps", "channels"), ROWS)
def test_norm_and_gate(
    out: Arithmetic, needed: float, rows: int, steps: int, channels: int
) -> None:
    x = (make(rows, steps, 2 * channels) + 5).to(out.dtype)
    gain, shift = make(2 * channels, seed=1), make(2 * channels, seed=2)
    scale, stream = make(channels, seed=3), make(rows, steps, channels, seed=4).to(out.dtype)
    args = (x, gain, shift, 1e-5, scale, stream, out)
    compare(fused.normalize_and_gate, "normalize_and_gate", *args, decibels_needed=needed)


def test_norm_of_a_row_with_an_offset_far_above_its_spread() -> None:
    """Moments are taken around the mean: a mean of squares would cancel."""
    x = make(2, 400, 30) + 1000
    gain, shift = torch.ones(30, device=DEVICE), torch.zeros(30, device=DEVICE)
    actual = triton_kernels.normalize(x, None, gain, shift, 0, torch.float32, 30, gelu=False)
    exact = x.double()
    exact = exact - exact.mean((1, 2), keepdim=True)
    exact /= exact.square().mean((1, 2), keepdim=True).sqrt()
    assert decibels(exact, actual.double()) >= 75  # float32 holds 1000 + x with 17 bits of x


@pytest.mark.parametrize(("out", "needed"), OUTPUTS)
@pytest.mark.parametrize("with_branch", [True, False], ids=["branch", "no branch"])
def test_sum_and_norm_of_tokens(out: Arithmetic, needed: float, with_branch: bool) -> None:
    x = make(2, 11, 40, scale=4)
    branch = make(2, 11, 40, seed=1).to(out.dtype) if with_branch else None
    vectors = [make(40, seed=seed) for seed in (2, 3, 4)]
    args = (x, branch, *vectors, 1e-5, out)
    compare(fused.add_and_normalize, "add_and_normalize", *args, decibels_needed=needed)


@pytest.mark.parametrize("parts", [2, 3])
def test_digits_are_split(parts: int) -> None:
    x = make(3, 70, 24, scale=5)
    expected = split_digits(x.cpu().movedim(-1, 1), parts).movedim(1, -1)
    actual = triton_kernels.split_digits(x, parts, 13).cpu()
    assert torch.equal(actual, expected)
    assert torch.equal(actual[..., :24] + actual[..., 24:48], x.cpu())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "needed"),
    [
        pytest.param(Precision("float32"), 100, id="float32"),
        pytest.param(Precision("split"), 100, id="22 bits"),
        pytest.param(Precision("half", PRECISIONS["fp16"].exceptions), 60, id="half"),
    ],
)
def test_network_with_kernels_equals_the_one_without(
    precision: Precision, needed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel gets the tensors and strides that networks give them."""
    kwargs = TINY["HTDemucs"] | {"dconv_mode": 3, "bottom_channels": 16, "t_layers": 2, "nfft": 256}
    network = randomize(HTDemucs(**kwargs)).to(DEVICE)
    mix = 0.1 * make(2, 2, 2000)
    with torch.inference_mode():
        expected = network.cpu()(mix.cpu())
        fast = optimize_for_gpu(network.to(DEVICE), precision, torch.device(DEVICE))
        calls: list[str] = []
        for module in (fused, arithmetic):
            monkeypatch.setattr(module, "find_kernels", lambda _x: Recorder(calls))
        output = fast(mix).cpu()
    assert decibels(expected, output) >= needed
    split = {"split_digits"} if precision.default != "float32" else set()
    assert set(calls) == split | {
        "add_bias_and_gelu",
        "gate",
        "normalize",
        "normalize_and_gate",
        "add_and_normalize",
    }


class Recorder:
    """The module of the kernels, which records what is called."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(triton_kernels, name)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from demucs_infer.optimized.gpu import triton_kernels as kernels

INTEGERS = {"count", "channels", "steps", "bins", "length", "stride", "parts"}
FLAGS = {"block": 1024, "piece": 16384, "most": 512}
STORED = {"x", "inject", "out", "stream", "branch"}

for name in [name for name in dir(kernels) if name.endswith("_kernel")]:
    kernel = getattr(kernels, name)
    names = [parameter.name for parameter in kernel.params]
    constants = {p.name: FLAGS.get(p.name, True) for p in kernel.params if p.is_constexpr}
    for stored in ("*fp16", "*fp32"):
        types = {
            name: "constexpr" if name in constants else "i32" if name in INTEGERS
            else "fp32" if name == "epsilon" else stored if name in STORED else "*fp32"
            for name in names
        }
        indexed = {(names.index(name),): value for name, value in constants.items()}
        version = tuple(map(int, triton.__version__.split(".")[:2]))
        if version < (3, 2):  # it numbers what others name, and lists no constants
            types = {names.index(name): types[name] for name in names if name not in constants}
            indexed = {index: value for (index,), value in indexed.items()}
        triton.compile(ASTSource(kernel, types, indexed), target=GPUTarget("cuda", 90, 32))
        print(name, stored)
"""


def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 14
