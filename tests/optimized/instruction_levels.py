"""Compare kernels and small networks at one level of instructions with exact sums.

The level is chosen by the environment that the process starts in (`LEVELS`): what a processor may
use is decided when a library is loaded.
`python -m tests.optimized.instruction_levels NAME` prints a report as JSON.
"""

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import kernels
from demucs_infer.optimized.optimize import choose_precision, has_bf16_instructions, optimize
from demucs_infer.optimized.unet import TransposedConv
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import ROOT, environment
from tests.helpers.networks import TINY, randomize


@dataclass(frozen=True)
class Level:
    """Instructions that a process may use, and what the package should do with them."""

    needs: tuple[str, ...]
    """What the processor must have, as `/proc/cpuinfo` spells it."""
    onednn: str
    pytorch: str
    mkl: str
    has_bf16_kernels: bool
    multiplies_bf16: bool

    def variables(self) -> dict[str, str]:
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.pytorch,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
        }


_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq")
LEVELS = {
    "sse4.1": Level((), "SSE41", "default", "SSE4_2", False, False),
    "avx2": Level(("avx2", "fma"), "AVX2", "avx2", "AVX2", False, False),
    # There oneDNN computes bf16 in float32.
    "avx512": Level(_AVX512, "AVX512_CORE", "avx512", "AVX512", True, False),
    "avx512_bf16": Level(
        (*_AVX512, "avx512_vnni", "avx512_bf16"), "AVX512_CORE_BF16", "avx512", "AVX512", True, True
    ),
}


def run_level(name: str) -> dict[str, Any]:
    """Return the report of a process that may use no more than the level `name`."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.optimized.instruction_levels", name],
        env={**environment(), **LEVELS[name].variables()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    *lines, last = process.stdout.splitlines()
    report: dict[str, Any] = json.loads(last)
    report["packed anew"] = [line for line in lines if ",exec,cpu,reorder," in line]
    return report


def decibels(exact: Tensor, other: Tensor) -> float:
    """How far an answer is from the exact one; a wrong shape or no number is as far as can be."""
    if exact.shape != other.shape or not torch.isfinite(other).all():
        return -1000.0
    difference = (exact - other.double()).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(exact.square().sum() / difference))


def products(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Packed products of sizes that are no whole number of vectors, with and without GELU."""
    x, weight, bias = torch.randn(101, 67), torch.randn(43, 67) / 8, torch.randn(43)
    image, kernel = torch.randn(2, 19, 24, 51), torch.randn(43, 19, 4, 3) / 15
    x, weight, bias, image, kernel = (
        each.to(dtype).float() for each in (x, weight, bias, image, kernel)
    )
    flat = F.linear(x.double(), weight.double(), bias.double())
    strides, padding = (4, 1), (0, 1)
    spread = F.conv2d(image.double(), kernel.double(), bias.double(), strides, padding)
    product = kernels.Linear(weight, bias, dtype)
    convolution = kernels.Conv(kernel, bias, dtype, stride=strides, padding=padding)
    yield "linear", decibels(flat, product(x))
    yield "linear and gelu", decibels(F.gelu(flat), product(x, gelu=True))
    unpacked = kernels.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    yield "unpacked linear", decibels(flat, unpacked)
    yield "conv", decibels(spread, convolution(image))
    yield "conv and gelu", decibels(F.gelu(spread), convolution(image, gelu=True))


def attention(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    q, k, v = (torch.randn(2, length, 3, 8).to(dtype) for length in (450, 37, 37))
    q = q / 8**0.5
    scores = torch.einsum("bnhc,bmhc->bhnm", q.double(), k.double())
    exact = torch.einsum("bhnm,bmhc->bnhc", scores.softmax(-1), v.double())
    for halved in (False, True):
        with mock.patch.object(kernels, "uses_half_width_vectors", lambda halved=halved: halved):
            yield (
                f"attention, halved={halved}",
                decibels(exact, kernels.attend(q, k, v, dtype=dtype)),
            )


def networks(precision: str) -> Iterator[tuple[str, float]]:
    torch.manual_seed(0)
    kinds: list[Any] = [
        HTDemucs(**(TINY["HTDemucs"] | {"dconv_mode": 3, "bottom_channels": 32})),
        HDemucs(**TINY["HDemucs"]),
        Demucs(**(TINY["Demucs"] | {"channels": 8})),
    ]
    mix = make_noise(2, 8000)[None]
    for network in kinds:
        randomize(network)
        with torch.inference_mode():
            exact = copy.deepcopy(network).double()(mix.double())
            fast = optimize(network, precision)(mix)
        yield type(network).__name__, decibels(exact, fast)


def upsample_innermost_stage() -> None:
    """Run the upsampling of htdemucs whose weights are largest; oneDNN prints what it runs."""
    up = TransposedConv(
        torch.nn.ConvTranspose2d(384, 192, (8, 1), (4, 1)), torch.float32, last=True
    )
    for rows in (2, 3):  # in a tile within the stage, and in its last one
        block, target = torch.randn(rows + 1, 336, 384), torch.empty(4 * rows, 336, 192)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            up.upsample_rows(block, target)


def report(level: Level) -> dict[str, Any]:
    # It asks the processor, which cannot be told to forget an instruction.
    has = has_bf16_instructions() and level.multiplies_bf16
    with (
        mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: has, create=True),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        auto = choose_precision("auto", torch.device("cpu"))
        found = {
            precision: dict([*products(dtype), *attention(dtype), *networks(precision)])
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        upsample_innermost_stage()
    return {
        "pytorch": torch.backends.cpu.get_cpu_capability(),
        "kernels": {
            "fp32": kernels.has_packed_kernels(),
            "bf16": kernels.has_packed_kernels(torch.bfloat16),
        },
        "auto": auto,
        "warnings": sorted({str(warning.message) for warning in caught}),
        "decibels": found,
    }


if __name__ == "__main__":
    print(json.dumps(report(LEVELS[sys.argv[1]])))
