"""Measure what each optimization is worth: `python -m tests.bench.steps` removes one at a time.

One window of the released htdemucs shape runs in interleaved rounds, once in the optimized form and
once without each step. Times are CPU seconds of all threads, which other processes disturb less
than the clock. A step is worth the extra time of the window without it, in percent of the
optimized form, from the fastest runs; the range in brackets is that of the single rounds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import attention, dconv, istft, kernels, layout, unet, winograd
from demucs_infer.optimized import optimize as optimizer
from demucs_infer.optimized.layout import view_as_rows
from demucs_infer.system import malloc
from tests.bench.music import song
from tests.bench.pairs import decibels

ORIGINAL = "original network"
OPTIMIZED = "optimized"
LARGE_ALLOCATIONS = "large allocations kept"


class JointGate(kernels.SplitGate):
    """A gate whose two halves come out of one product, side by side in memory."""

    def __init__(
        self, make: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, **geometry: Any
    ) -> None:
        self._dtype = dtype
        self._product = make(weight, bias, dtype, **geometry)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and gates, interleaved in memory."""
        values, gates = self._product(x.to(self._dtype)).chunk(2, 1 if x.dim() == 4 else -1)
        return values, gates


class OriginalDConv:
    """The residual branches of a stage as the network has them."""

    def __init__(self, layers: nn.Module) -> None:
        self._layers = layers

    def add_to(self, y: Tensor) -> None:
        """Add the branches to `y` (R T C) in place."""
        y.copy_(self._layers(y.mT.contiguous()).mT)


class ConvolvedBranch(dconv.Branch):
    """A residual branch whose first convolution is PyTorch's."""

    def _convolve(self, y: Tensor) -> Tensor:
        weight, dilation = self._taps.permute(1, 2, 0), self._dilation
        return F.conv1d(y.mT, weight, self._conv_bias[:, 0], padding=dilation, dilation=dilation)


class UnfoldedBranch(dconv.Branch):
    """A residual branch that computes its wide result, then normalizes it."""

    def add_to(self, y: Tensor) -> None:
        """Add the branch to `y` (R T C) in place."""
        wide = torch.baddbmm(
            self._bias[:, None], self._weight.expand(len(y), -1, -1), self._compute_hidden(y)
        )
        gain, shift = self._output_gain.float(), self._output_shift.float()
        values, gates = torch.group_norm(wide, 1, gain, shift, self._output_eps).chunk(2, 1)
        y.add_((values * gates.sigmoid_()).mT)


class OriginalTransposedConv(unet.TransposedConv):
    """A transposed convolution by PyTorch's own."""

    def __init__(self, up: Any, dtype: torch.dtype, *, last: bool) -> None:
        super().__init__(up, dtype, last=last)
        self._parameters = up.weight.detach().to(dtype), up.bias.detach().to(dtype)

    def upsample_rows(self, block: Tensor, out: Tensor) -> None:
        """Upsample rows of bins."""
        weight, bias = self._parameters
        image = block.permute(2, 0, 1)[None].to(weight.dtype)
        output = F.conv_transpose2d(image, weight, bias, (self.stride, 1)).float()
        first = self.lookback * self.stride
        out.copy_(view_as_rows(output[0])[first : first + len(out)])
        if not self._last:
            torch.ops.aten.gelu_(out)

    def upsample_time(self, y: Tensor) -> Tensor:
        """Upsample steps of time."""
        weight, bias = self._parameters
        output = F.conv_transpose1d(y[:, :, 0].to(weight.dtype), weight, bias, self.stride).float()
        return output if self._last else F.gelu(output)


def call_without_fused_gelu(kernel: type) -> Callable[..., Tensor]:
    """Make a `__call__` of `kernel` that applies the GELU to its result."""
    call = kernel.__call__

    def run(self: Any, x: Tensor, *, gelu: bool = False) -> Tensor:
        y: Tensor = call(self, x)
        return F.gelu(y) if gelu else y

    return run


def attend_by_pytorch(*args: Tensor, dtype: torch.dtype) -> Tensor:
    """Attend as without packed kernels."""
    with mock.patch.object(kernels, "has_packed_kernels", lambda *_: False):
        return kernels.attend(*args, dtype=dtype)


def attend_in_rows(*args: Tensor, dtype: torch.dtype) -> Tensor:
    """Attend as on processors whose vectors PyTorch's products use only half."""
    with mock.patch.object(kernels, "uses_half_width_vectors", lambda: True):
        return kernels.attend(*args, dtype=dtype)


Patch = tuple[Any, str, Any]
"""An object, the name of its attribute, and the attribute without the step."""

STEPS: dict[str, list[Patch]] = {
    "packed kernels": [(kernels, "has_packed_kernels", lambda *_: False)],
    "GELU inside the kernels": [
        (kernel, "__call__", call_without_fused_gelu(kernel))
        for kernel in (kernels.Linear, kernels.Conv)
    ],
    "optimized transformer": [(attention, "supports", lambda _: False)],
    "attention in rows": [(attention, "attend", attend_by_pytorch)],
    "attention by PyTorch": [(attention, "attend", attend_in_rows)],
    "norm over whole items": [(attention, "_normalize_items", lambda norm, x: norm(x))],
    "optimized U-Net layers": [(unet, "supports", lambda _: False)],
    "tiles in the cache": [(layout, "TILE_BYTES", 1 << 40)],
    "gates from two products": [(unet, "SplitGate", JointGate)],
    "Winograd": [
        (winograd, name, lambda *_: False) for name in ("supports", "has_enough_channels")
    ],
    "transposed convolutions as ordinary ones": [(unet, "TransposedConv", OriginalTransposedConv)],
    "frequency embedding in the first layer": [(optimizer, "_fold_embedding", lambda _: None)],
    "residual branches": [(unet, "FastDConv", OriginalDConv)],
    "all taps in one product": [(dconv, "Branch", ConvolvedBranch)],
    "norm folded into weights": [(dconv, "Branch", UnfoldedBranch)],
    "inverse STFT": [(istft, "supports", lambda _: False)],
    LARGE_ALLOCATIONS: [],
}


def list_steps(precision: str) -> list[str]:
    """List the steps that are taken in `precision` on this machine."""
    in_rows = kernels.has_packed_kernels() and (
        precision != "fp32" or kernels.uses_half_width_vectors()
    )
    other_attention = "attention by PyTorch" if in_rows else "attention in rows"
    absent = {other_attention} | ({"Winograd"} if precision != "fp32" else set())
    return [name for name in STEPS if name not in absent]


@contextmanager
def remove_step(name: str) -> Iterator[None]:
    """Build and run networks without a step; with all of them for any other name."""
    with ExitStack() as stack:
        for patch in STEPS.get(name, []):
            stack.enter_context(mock.patch.object(*patch))
        if name != LARGE_ALLOCATIONS:
            stack.enter_context(malloc.keep_large_allocations())
        yield


@dataclass(kw_only=True)
class StepResult:
    """The runs without one step (or of the original network, or of the optimized form)."""

    precision: str
    step: str
    cpu_seconds: list[float] = field(default_factory=list)
    percent: float | None = None
    """Extra time without the step, in percent of the optimized form."""
    percent_range: tuple[float, float] | None = None
    """Lowest and highest `percent` of a single round."""
    error_db: float | None = None
    """Error against the original network, in decibels below it."""


def measure_steps(
    network: nn.Module, mix: Tensor, precision: str, steps: Sequence[str], rounds: int
) -> list[StepResult]:
    """Run `network` as it is, optimized, and without each step, in interleaved rounds."""
    variants = {ORIGINAL: network}
    for name in (OPTIMIZED, *steps):
        with remove_step(name):
            variants[name] = optimizer.optimize(network, precision)
    results = {name: StepResult(precision=precision, step=name) for name in variants}
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, variant in variants.items():
                with remove_step(name):
                    started = time.process_time()
                    outputs[name] = variant(mix)
                    seconds = time.process_time() - started
                if number:  # the first round warms up
                    results[name].cpu_seconds.append(seconds)
    baseline = results[OPTIMIZED].cpu_seconds
    for name, result in results.items():
        if name == ORIGINAL:
            continue
        result.error_db = decibels(outputs[ORIGINAL], outputs[name])
        if name != OPTIMIZED:
            result.percent = 100 * (min(result.cpu_seconds) / min(baseline) - 1)
            each = [100 * (a / b - 1) for a, b in zip(result.cpu_seconds, baseline, strict=True)]
            result.percent_range = min(each), max(each)
    return list(results.values())


def format_table(results: Sequence[StepResult]) -> str:
    """Format the results of one precision as a Markdown table."""
    lines = [
        f"| {results[0].precision}, one window | CPU s | worth (range) | error |",
        "|---|---|---|---|",
    ]
    for result in results:
        name = result.step if result.percent is None else f"without {result.step}"
        cells = [name, f"{min(result.cpu_seconds):.2f}", "", ""]
        if result.percent is not None and result.percent_range is not None:
            low, high = result.percent_range
            cells[2] = f"{result.percent:+.1f} % ({low:+.1f} to {high:+.1f})"
        if result.error_db is not None:
            cells[3] = f"{result.error_db:.0f} dB"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_released_network() -> nn.Module:
    """Build htdemucs with random weights."""
    torch.manual_seed(0)
    kwargs = {"bottom_channels": 512, "t_layers": 5, "dconv_mode": 3, "segment": Fraction(39, 5)}
    network = HTDemucs(["drums", "bass", "other", "vocals"], **kwargs).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("scale"):  # the initial 1e-4 would hide errors of the branches
            parameter.data.fill_(0.3)
    return network


def main() -> None:
    """Parse the arguments, measure, and print the tables."""
    parser = argparse.ArgumentParser("python -m tests.bench.steps", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16"])
    parser.add_argument("--step", action="append", choices=list(STEPS), help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, mix = make_released_network(), song(7.8)[None]
    fastest = optimizer.choose_precision("auto", torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for precision in args.precision or dict.fromkeys(["fp32", fastest]):
        available = list_steps(precision)
        steps = [name for name in available if name in (args.step or available)]
        results = measure_steps(network, mix, precision, steps, args.rounds)
        print(format_table(results), end="\n\n", flush=True)
        rows += [asdict(result) for result in results]
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
