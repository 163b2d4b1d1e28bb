"""What is asked of CUDA, as far as a machine without a GPU can tell."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from demucs_infer.engine import device_track
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized.gpu import arithmetic, fused, kernel_loader
from demucs_infer.optimized.gpu.arithmetic import Kind, Precision, exact_sums, tf32_products
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.optimized.gpu.graphs import CudaGraphs
from tests.helpers.audio_signals import make_noise
from tests.helpers.bursts import decibels
from tests.helpers.networks import TINY, randomize

CPU = torch.device("cpu")
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Let tensors say that they are on a GPU; return which products were allowed to use TF32."""
    allowed: dict[str, set[bool]] = {"convolutions": set(), "matrices": set()}
    linear = F.linear

    def convolve(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        padding, stride, dilation, groups, benchmark, deterministic, tf32 = args
        assert groups == 1 and not benchmark and deterministic
        allowed["convolutions"].add(tf32)
        return F.conv2d(x, weight, None, stride, padding, dilation)

    def convolve_transposed(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        padding, output_padding, stride, dilation, groups, benchmark, deterministic, tf32 = args
        assert output_padding == (0, 0) and dilation == (1, 1) and groups == 1
        assert not benchmark and deterministic
        allowed["convolutions"].add(tf32)
        return F.conv_transpose2d(x, weight, None, stride, padding)

    def multiply(*args: Any) -> Tensor:
        allowed["matrices"].add(MATMUL.allow_tf32)
        return linear(*args)

    monkeypatch.setattr(torch, "cudnn_convolution", convolve)
    monkeypatch.setattr(torch, "cudnn_convolution_transpose", convolve_transposed)
    monkeypatch.setattr(F, "linear", multiply)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    for module in (arithmetic, fused):
        monkeypatch.setattr(module, "find_kernels", lambda _x: None)
    return allowed


@pytest.mark.parametrize(
    ("kind", "tf32"), [("float32", False), ("half", False), ("tf32", True), ("split", True)]
)
def test_every_product_is_told_whether_to_use_tf32(
    kind: Kind, tf32: bool, products: dict[str, set[bool]]
) -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"] | {"dconv_mode": 3, "bottom_channels": 16}))
    fast: Any = optimize_for_gpu(network, Precision(kind), CPU)
    planes, waves = make_noise(4, 256 * 63).view(1, 4, 256, 63), make_noise(2, 8000)[None]
    before = MATMUL.allow_tf32
    with torch.inference_mode():
        outputs = fast.estimate(planes, waves)
        assert products == {"convolutions": {tf32}, "matrices": {tf32}}
        expected = network.estimate(planes, waves)
    assert MATMUL.allow_tf32 == before
    for output, other in zip(outputs, expected, strict=True):
        assert decibels(other, output) >= (50 if kind == "half" else 100)


def test_settings_of_the_process_are_restored() -> None:
    cudnn = torch.backends.cudnn
    before = MATMUL.allow_tf32, cudnn.allow_tf32, MATMUL.allow_fp16_reduced_precision_reduction
    with pytest.raises(KeyError), exact_sums():
        assert not MATMUL.allow_tf32 and not cudnn.allow_tf32
        assert not MATMUL.allow_fp16_reduced_precision_reduction
        with tf32_products():
            assert MATMUL.allow_tf32
        assert not MATMUL.allow_tf32
        raise KeyError
    after = MATMUL.allow_tf32, cudnn.allow_tf32, MATMUL.allow_fp16_reduced_precision_reduction
    assert after == before


class FakeStream:
    """A queue that records what it waits for."""

    def __init__(self, *_: Any) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        self.waited.append(self)


class FakeGraph:
    """A graph that cannot be replayed."""

    def replay(self) -> None: ...

    def pool(self) -> int:
        return 7


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace what `torch.cuda` has of streams and graphs; return what was done with them."""
    done: dict[str, Any] = {"current": FakeStream(), "pools": [], "set": [], "error": None}

    @contextmanager
    def graph(_graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and done["current"] in stream.waited
        done["pools"].append(pool)
        yield
        if done["error"] is not None:
            raise done["error"]

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: done["current"])
    monkeypatch.setattr(torch.cuda, "set_stream", done["set"].append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return done


def test_graphs_share_their_memory_until_it_is_released(streams: dict[str, Any]) -> None:
    graphs = CudaGraphs(CPU)
    for _ in range(2):
        _, output = graphs.capture(lambda x: 2 * x, (torch.ones(3),))
        assert torch.equal(output, torch.full((3,), 2.0))
    graphs.reset()
    graphs.capture(lambda x: x, (torch.ones(3),))
    assert streams["pools"] == [None, 7, None]


def test_failed_capture_restores_the_queue_of_the_thread(streams: dict[str, Any]) -> None:
    streams["error"] = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(CPU).capture(lambda x: x, (torch.ones(3),))
    assert streams["set"] == [streams["current"]]


def test_stems_are_copied_on_a_queue_of_their_own(
    streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, recorded = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _x, s: recorded.append(s))
    monkeypatch.setattr(device_track, "_copy_streams", {})
    stems = make_noise(2, 50)
    assert torch.equal(device_track.download(stems, CPU), stems)
    (stream,) = recorded
    assert stream.waited == [streams["current"], stream], "the copy waits for the stems, we for it"


def test_kernels_that_do_not_work_are_replaced_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def add_bias_and_gelu(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Failed to find C compiler")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(kernel_loader, "import_module", lambda _name: Broken())
    kernel_loader.load_kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton does not work here.*C compiler"):
            assert kernel_loader.load_kernels() is None
        assert kernel_loader.load_kernels() is None
    finally:
        kernel_loader.load_kernels.cache_clear()
