"""Compare everything that runs on the GPU with the same on the CPU, in float32."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demucs_infer.api import Separator
from demucs_infer.optimized.gpu import arithmetic, build, fused, kernel_loader, spectra
from demucs_infer.optimized.gpu.arithmetic import PRECISIONS, Arithmetic, Precision
from demucs_infer.optimized.gpu.graphs import CudaGraphs, Graphs
from tests.bench.gpu.report import Part
from tests.bench.gpu.shapes import Shapes, make_network, write_repository
from tests.bench.music import RATE, song
from tests.helpers.bursts import decibels, make_corpus

CPU = torch.device("cpu")
LEAST = {"fp32": 100.0, "fp16": 60.0}


def make_graphs(device: torch.device) -> Graphs | None:
    """Return what captures graphs on `device`."""
    return CudaGraphs(device) if device.type == "cuda" else None


def precision_on(device: torch.device, name: str) -> Precision:
    """Return the arithmetic of a precision, emulated where there is no GPU."""
    precision = PRECISIONS[name]
    emulated = device.type == "cpu"
    return Precision(precision.default, precision.exceptions, emulated=emulated)


def make_fast(network: Any, device: torch.device, name: str, *, graphs: bool = True) -> Any:
    """Return the form of `network`, which is on `device`, that separators run there."""
    capture = make_graphs(device) if graphs else None
    return build.optimize_for_gpu(network, precision_on(device, name), device, graphs=capture)


def check(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Run all checks, the most important first."""
    part.run("products", lambda: check_products(part, device))
    part.run("kernels", lambda: check_kernels(part, device))
    part.run("spectra", lambda: check_spectra(part, shapes, device))
    for name in shapes.networks:
        part.run(name, partial(check_network, part, shapes, device, name))
    part.run("graphs", lambda: check_graphs(part, shapes, device))
    part.run("engine", lambda: check_engine(part, shapes, device, work))


def check_products(part: Part, device: torch.device) -> None:
    """Compare products and convolutions of every kind with exact ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 64, 50, generator=generator)
    weight = torch.randn(96, 48, 3, 3, generator=generator).half().float() / 20
    up = torch.randn(48, 24, 8, 1, generator=generator).half().float() / 20
    tokens = torch.randn(2, 4, 300, 64, generator=generator)
    matrix = torch.randn(128, 64, generator=generator).half().float() / 8
    # The units for TF32 cut off sums, which an emulation does not show: fewer decibels than 125.
    least: dict[arithmetic.Kind, float] = {"float32": 110, "split": 95, "tf32": 65, "half": 65}
    for kind, bound in least.items():
        here = Arithmetic(kind, emulated=device.type == "cpu")
        cases: dict[str, tuple[Tensor, Tensor]] = {}
        with arithmetic.exact_sums():
            last = x.to(device).contiguous(memory_format=torch.channels_last)
            cases["convolution"] = (
                torch.nn.functional.conv2d(x.double(), weight.double(), padding=1),
                here.convolve(
                    last, here.read_weight(weight.to(device), 1), stride=(1, 1), padding=(1, 1)
                ),
            )
            cases["transposed convolution"] = (
                torch.nn.functional.conv_transpose2d(x.double(), up.double(), None, (4, 1), (2, 0)),
                here.convolve_transposed(
                    last, here.read_weight(up.to(device), 0), stride=(4, 1), padding=(2, 0)
                ),
            )
            cases["product"] = (
                tokens.double() @ matrix.double().mT,
                here.multiply(tokens.to(device), *here.read_linear(matrix.to(device), None)),
            )
            on_device = tokens.to(device)
            cases["attention"] = (
                torch.nn.functional.scaled_dot_product_attention(*[tokens.double()] * 3),
                here.attend(on_device, on_device, on_device),
            )
        for name, (exact, result) in cases.items():
            value = decibels(exact, result.double().cpu())
            part.add(f"{name} in {kind}", value, "dB", least=bound)


def check_kernels(part: Part, device: torch.device) -> None:
    """Compare the kernels in Triton with the same steps in PyTorch."""
    kernels = kernel_loader.load_kernels() if device.type == "cuda" else None
    if kernels is None:
        part.add("Triton", None, note="not here: plain PyTorch is used")
        return
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x = make(2, 48, 7, 300)
    expected = arithmetic.split_digits(x.cpu(), 3)
    actual = arithmetic.split_digits(x, 3).cpu()
    part.add("digits apart", decibels(expected, actual), "dB", least=199)

    for out, bound in ((Arithmetic("float32"), 110.0), (Arithmetic("half"), 70.0)):
        for rows, steps, channels in ((64, 336, 48), (2, 86_000, 48), (8, 10, 384)):
            wide = make(rows, steps, 2 * channels).to(out.dtype)
            narrow = make(rows, steps, channels).to(out.dtype)
            vectors = [make(2 * channels) for _ in range(2)]
            bias, gain, scale = (make(channels) for _ in range(3))
            image = wide.unflatten(0, (2, -1))
            offset = make(image.shape[1], 1, channels)
            used = channels - 2
            for vector in (bias, gain, scale):
                vector[used:] = 0
            hidden = narrow.clone()
            hidden[..., used:] = 0
            calls = {
                "bias and GELU": (fused.add_bias_and_gelu, (narrow, bias, out)),
                "gate": (fused.gate, (image, vectors[0], out, offset)),
                "norm and GELU": (
                    fused.normalize_and_gelu,
                    (hidden, bias, gain, scale, 1e-5, out, used),
                ),
                "norm and gate": (
                    fused.normalize_and_gate,
                    (wide, *vectors, 1e-5, scale, narrow, out),
                ),
                "norm of tokens": (
                    fused.add_and_normalize,
                    (narrow.float(), narrow, scale, gain, bias, 1e-5, out),
                ),
            }
            for name, (step, args) in calls.items():
                expected = step(*(x.cpu() if isinstance(x, Tensor) else x for x in args))
                actual = step(*args)
                pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, actual)))
                worst = min(decibels(one.float(), other.cpu().float()) for one, other in pairs)
                label = f"{name}, {rows} x {steps} x {channels}, {out.kind}"
                part.add(label, worst, "dB", least=bound)


def check_spectra(part: Part, shapes: Shapes, device: torch.device) -> None:
    """Compare spectra and their inverse with those on the CPU."""
    network = make_network(shapes, "htdemucs")
    mix = song(shapes.window_seconds["htdemucs"])[None, :, : int(network.segment * RATE)]
    z = network.analyze(mix)
    planes = network.to_planes(z)
    for complex_numbers in (True, False):
        there = spectra.DeviceSpectra(network, device, complex_numbers=complex_numbers)
        name = "complex" if complex_numbers else "planes"
        result = there.analyze(mix.to(device)).cpu()
        part.add(f"spectrum, {name}", decibels(planes, result), "dB", least=110)


def check_network(part: Part, shapes: Shapes, device: torch.device, name: str) -> None:
    """Compare a network on music and on difficult windows, in every precision."""
    network = make_network(shapes, name)
    samples = int(shapes.window_seconds.get(name, 3.0) * RATE)
    own = getattr(network, "use_train_segment", False)
    samples = min(samples, int(network.segment * RATE)) if own else samples
    corpus = {"music": song(samples / RATE + 0.1)[:, :samples], **make_corpus(samples)}
    if name != "htdemucs":
        corpus = {window: corpus[window] for window in shapes.windows}
    with torch.inference_mode():
        expected = {window: network(mix[None]) for window, mix in corpus.items()}
    on_device = network.to(device)
    for precision, least in LEAST.items():
        fast = make_fast(on_device, device, precision)
        for window, mix in corpus.items():
            with torch.inference_mode():
                output = fast(mix[None].to(device)).float().cpu()
            label = f"{name}, {precision}, {window}"
            if not bool(output.isfinite().all()):
                part.add(f"{label}: not finite", 0, "dB", least=least)
            elif window == "silence":
                loudest = float(output.abs().max()) * 32768
                part.add(label, loudest, "of 16-bit full scale", most=1)
            else:
                part.add(label, decibels(expected[window], output), "dB", least=least)


def check_graphs(part: Part, shapes: Shapes, device: torch.device) -> None:
    """Compare graphs with the same core run eagerly, for batches of several sizes."""
    network = make_network(shapes, "htdemucs").to(device)
    samples = int(network.segment * RATE)
    for precision in LEAST:
        eager = make_fast(network, device, precision, graphs=False)
        graphed = make_fast(network, device, precision)
        worst = 200.0
        with torch.inference_mode():
            for batch in (1, 1, 1, 3, 3, 4, 2, 1):
                mix = torch.stack(
                    [song(samples / RATE + 0.1, seed)[:, :samples] for seed in range(batch)]
                )
                mix = mix.to(device)
                worst = min(worst, decibels(eager(mix), graphed(mix)))
        # Batches of another size may be multiplied in another order.
        part.add(f"graphs against eager, {precision}", worst, "dB", least=LEAST[precision])


def check_engine(part: Part, shapes: Shapes, device: torch.device, work: Path) -> None:
    """Compare a whole track: level, windows, stitching, transfers."""
    write_repository(work / "engine", shapes, "htdemucs")
    track = song(min(13.0, shapes.tracks["3 min"]))
    stems: dict[str, Tensor] = {}
    names = {"CPU": ("cpu", "fp32"), "fp32": (str(device), "fp32")}
    if device.type != "cpu":
        names["fp16"] = (str(device), "fp16")
    for name, (place, precision) in names.items():
        separator: Any = Separator(
            "htdemucs", work / "engine", device=place, shifts=0, precision=precision
        )
        # The first run is eager, the second one captures graphs, the third one replays them.
        runs = [separator.separate_tensor(track, RATE)[1] for _ in range(3)]
        first, *others = (torch.stack(list(outputs.values())) for outputs in runs)
        stems[name] = first
        difference = max(float((first - other).abs().max()) for other in others)
        part.add(f"engine, {name}, the same track again", difference, "difference", most=0)
        separator.close()
    for name in list(names)[1:]:
        value = decibels(stems["CPU"], stems[name])
        part.add(f"engine, {name}, a track", value, "dB", least=LEAST[name])
