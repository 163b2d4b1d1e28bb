"""The runner fits batches to memory, restores networks, and validates their output."""

import copy
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.apply import BagOfModels
from demucs_infer.engine.network import Ensemble, Network, as_tensor, window_rule
from demucs_infer.engine.pipeline import Block, TensorTrack, separate
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner, device_of, lease_network
from demucs_infer.engine.stems import choose_stems
from demucs_infer.errors import SeparationError, is_out_of_memory
from demucs_infer.events import BatchSizeReduced, ChunkProcessed, WarningEvent
from demucs_infer.options import SeparationOptions
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import OomModel, RecordingModel, ScaleModel

PLAIN = SeparationOptions(shifts=0, normalize=False)


def separate_to_tensor(*args: Any, **kwargs: Any) -> Tensor:
    blocks = [item.stems for item in separate(*args, **kwargs) if isinstance(item, Block)]
    return torch.cat(blocks, dim=-1)


class FixedWindowModel(OomModel):
    """A network with windows of one size, so that every batch but the last is full."""

    def valid_length(self, length: int) -> int:
        return 8000


def test_out_of_memory_halves_the_batch_and_retries_only_the_failed_part() -> None:
    track = TensorTrack(make_noise(2, 16 * 6000))
    network, runner = FixedWindowModel(limit=3), Runner()
    options = SeparationOptions(shifts=0, normalize=False, batch_size=8)
    items = list(separate(track, network, options=options, runner=runner))
    reduced = [item for item in items if isinstance(item, BatchSizeReduced)]
    assert [(event.old, event.new) for event in reduced] == [(8, 4), (4, 2)]
    assert "out of memory" in reduced[0].reason
    assert network.tried == [8, 4, *[2] * 8]
    assert sum(shape[0] for shape in network.seen) == 16, "no window was completed twice"
    # Planned batches are counted, not the smaller ones that ran.
    counts = [i.batch_index for i in items if isinstance(i, ChunkProcessed)]
    assert counts == [1, 2]
    expected = separate_to_tensor(track, FixedWindowModel(limit=100), options=options)
    assert torch.equal(torch.cat([i.stems for i in items if isinstance(i, Block)], -1), expected)
    # Remembered: the next track starts where this one ended.
    network.tried.clear()
    list(separate(track, network, options=options, runner=runner))
    assert network.tried == [2] * 8
    # Another runner starts anew.
    network.tried.clear()
    list(separate(track, network, options=options))
    assert network.tried[0] == 8


@pytest.mark.parametrize("oom", ["retry", "raise"])
def test_original_error_is_raised_if_retries_fail(oom: Any) -> None:
    network = FixedWindowModel(limit=0)
    options = SeparationOptions(shifts=0, normalize=False, batch_size=4, oom=oom)
    with pytest.raises(torch.OutOfMemoryError, match="simulated") as caught:
        list(separate(TensorTrack(make_noise(2, 30_000)), network, options=options))
    assert network.tried == ([4, 2, 1] if oom == "retry" else [4])
    assert caught.traceback[-1].name == "forward", "the traceback leads to where it happened"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a shape"), SystemExit])
def test_other_errors_are_raised_at_once(error: Any) -> None:
    class BrokenModel(ScaleModel):
        def forward(self, mix: Tensor) -> Tensor:
            calls.append(1)
            raise error

    calls: list[int] = []
    with pytest.raises(error if isinstance(error, type) else type(error)):
        list(separate(TensorTrack(make_noise(2, 30_000)), BrokenModel(), options=PLAIN))
    assert calls == [1]


def test_memory_of_a_failed_batch_is_free_before_the_retry() -> None:
    class Held:
        """An object in a frame, alive as long as a traceback refers to that frame."""

    class HungryModel(FixedWindowModel):
        def forward(self, mix: Tensor) -> Tensor:
            alive.append(sum(ref() is not None for ref in held))
            mine = Held()
            held.append(weakref.ref(mine))
            return super().forward(mix)

    held: list[weakref.ref[Held]] = []
    alive: list[int] = []
    options = SeparationOptions(shifts=0, normalize=False, batch_size=8)
    list(separate(TensorTrack(make_noise(2, 8 * 6000)), HungryModel(limit=1), options=options))
    assert alive == [0] * (3 + 8)


class TinyDeviceModel(ScaleModel):
    """A network on a device that is too small for a window: its weights fit, its windows do not."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def forward(self, mix: Tensor) -> Tensor:
        if mix.device.type == "meta":
            raise torch.OutOfMemoryError("meta out of memory")
        return super().forward(mix)


def test_cpu_fallback_if_one_window_does_not_fit() -> None:
    track, network, runner = TensorTrack(make_noise(2, 30_000)), TinyDeviceModel(), Runner("meta")
    options = SeparationOptions(shifts=0, normalize=False, batch_size=2)
    items = list(separate(track, network, options=options, runner=runner))
    warnings = [item for item in items if isinstance(item, BatchSizeReduced | WarningEvent)]
    assert warnings[0] == BatchSizeReduced(2, 1, "meta out of memory")
    assert isinstance(warnings[1], WarningEvent)
    assert "on the CPU" in warnings[1].message
    assert len(warnings) == 2, "reported once, and remembered"
    blocks = torch.cat([item.stems for item in items if isinstance(item, Block)], -1)
    assert torch.equal(blocks, separate_to_tensor(track, ScaleModel(), options=options))
    forbidden = SeparationOptions(shifts=0, normalize=False, batch_size=2, cpu_fallback=False)
    with pytest.raises(torch.OutOfMemoryError):
        list(separate(track, network, options=forbidden, runner=Runner("meta")))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: ...)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to ..."), True),
        (RuntimeError("size mismatch"), False),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (BrokenThreadPool("A thread initializer failed"), True),
        (ImportError("libavcodec.so: failed to map segment from shared object"), True),
        (ImportError("no module named torch"), False),
        (ValueError("out of memory"), False),
    ],
    ids=[
        "torch",
        "python",
        "mps",
        "cpu: allocate",
        "cpu: not enough",
        "other",
        "no more threads",
        "onednn",
        "onednn: unsupported",
        "threads that failed to begin",
        "a library that cannot be mapped",
        "a missing module",
        "not a RuntimeError",
    ],
)
def test_is_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_only_forwards_run_in_inference_mode() -> None:
    network = RecordingModel()
    for item in separate(TensorTrack(make_noise(2, 30_000)), network):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        if isinstance(item, Block):
            assert not item.stems.is_inference()
    assert set(network.modes) == {True}


def test_lease_restores_modes() -> None:
    network = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    network.train()
    network[1].eval()
    with lease_network(network, torch.device("cpu")):
        assert not any(module.training for module in network.modules())
        with lease_network(network, None):
            pass
        assert not network.training, "still leased by the first"
    assert [m.training for m in network.modules()] == [True, True, False]
    with pytest.raises(RuntimeError, match="mine"), lease_network(network, None):
        raise RuntimeError("mine")
    assert network.training


def test_leased_network_does_not_move() -> None:
    network = ScaleModel()
    with (
        lease_network(network, torch.device("cpu")),
        pytest.raises(ValueError, match=r"in use on cpu and cannot move to cuda"),
        lease_network(network, torch.device("cuda")),
    ):
        pass
    assert device_of(network) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None
    assert device_of(lambda x: x) is None


def test_threads_share_the_lease_of_a_training_network() -> None:
    network = ScaleModel()
    network.train()
    seen: list[bool] = []
    barrier = threading.Barrier(4)

    def use() -> None:
        for _ in range(200):
            with lease_network(network, None):
                seen.append(network.training)
        barrier.wait()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {False}
    assert network.training


@pytest.mark.parametrize(
    "output",
    [
        {"a": torch.ones(1, 2, 5), "b": torch.zeros(1, 2, 5)},
        {"b": torch.zeros(1, 2, 5), "a": torch.ones(1, 2, 5)},
        [torch.ones(1, 2, 5), torch.zeros(1, 2, 5)],
        (torch.ones(1, 2, 5), torch.zeros(1, 2, 5)),
        torch.stack([torch.ones(1, 2, 5), torch.zeros(1, 2, 5)], dim=1),
    ],
    ids=["dict", "dict in another order", "list", "tuple", "tensor"],
)
def test_as_tensor_accepts_all_forms(output: object) -> None:
    expected = torch.stack([torch.ones(1, 2, 5), torch.zeros(1, 2, 5)], dim=1)
    assert torch.equal(as_tensor(output, ["a", "b"]), expected)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ({"a": torch.ones(1, 2, 5)}, r"stems \['a'\], expected \['a', 'b'\]"),
        ([torch.ones(1, 2, 5)], "returned 1, expected"),
        (torch.ones(1, 3, 2, 5), r"returned \(1, 3, 2, 5\)"),
        (torch.ones(2, 2, 5), r"with 2 stems: a, b"),
        (None, "returned None"),
    ],
    ids=["missing stem", "too few", "too many", "too few dimensions", "no output"],
)
def test_as_tensor_rejects_other_outputs(output: object, words: str) -> None:
    with pytest.raises(SeparationError, match=words):
        as_tensor(output, ["a", "b"])


def test_output_of_another_length_is_rejected() -> None:
    class ShortOutputModel(ScaleModel):
        def forward(self, mix: Tensor) -> Tensor:
            return super().forward(mix)[..., 1:]

    with pytest.raises(SeparationError, match="must stay the same"):
        list(separate(TensorTrack(make_noise(2, 9000)), ShortOutputModel(), options=PLAIN))


class OverflowingModel(ScaleModel):
    def forward(self, mix: Tensor) -> Tensor:
        output = super().forward(mix)
        output[-1, 0, 0, 0] = float("inf")
        return output


def test_non_finite_output_is_an_error_in_float32() -> None:
    with pytest.raises(SeparationError, match="NaN or infinity"):
        list(separate(TensorTrack(make_noise(2, 9000)), OverflowingModel(), options=PLAIN))
    # Stems that are not requested are not checked.
    from demucs_infer.engine.stems import choose_stems

    only = choose_stems(["drums", "bass"], stems=["bass"])
    assert list(
        separate(TensorTrack(make_noise(2, 9000)), OverflowingModel(), options=PLAIN, stems=only)
    )


def test_overflow_in_low_precision_is_redone_in_float32() -> None:
    prepared: list[tuple[Network, str]] = []

    def prepare(network: Network, precision: str) -> Network:
        prepared.append((network, precision))
        return OverflowingModel() if precision == "fp16" else network

    network, runner = RecordingModel(), Runner(prepare=prepare)
    options = SeparationOptions(shifts=0, normalize=False, precision="fp16", batch_size=3)
    track = TensorTrack(make_noise(2, 30_000))
    items = list(separate(track, network, options=options, runner=runner))
    warned = [item for item in items if isinstance(item, WarningEvent)]
    assert "overflowed in fp16" in warned[0].message
    assert all(shape[0] == 1 for shape in network.seen), "only the window that overflowed"
    blocks = torch.cat([item.stems for item in items if isinstance(item, Block)], -1)
    assert torch.equal(blocks, separate_to_tensor(track, ScaleModel(), options=PLAIN))
    assert prepared == [(network, "fp16")], "prepared once"
    assert separate_to_tensor(track, network, options=PLAIN, runner=runner).isfinite().all()
    with pytest.raises(ValueError, match="precision = 'bf16' needs a runner with `prepare`"):
        list(separate(track, network, options=SeparationOptions(precision="bf16")))


def test_auto_batch_size_on_a_cpu_is_one() -> None:
    runner, network = Runner("cpu"), ScaleModel()
    assert runner.batch_size(network, 10**12, SeparationOptions()) == 1
    assert runner.batch_size(network, 10**12, SeparationOptions(batch_size=64)) == 64


def test_window_rule() -> None:
    fixed = ScaleModel(segment=2.0)
    assert window_rule(fixed, None)(17) == 17
    fixed.valid_length = lambda length: length + 3  # type: ignore[assignment]
    assert window_rule(fixed, 1.0)(17) == 20
    fixed.use_train_segment = True  # type: ignore[assignment]
    assert window_rule(fixed, 1.0)(17) == 8000
    with pytest.raises(ValueError, match="longer than the 2 s"):
        window_rule(fixed, 2.001)
    assert window_rule(fixed, 2.0)(17) == 16_000, "its own length is not too long"
    fixed.use_train_segment = False  # type: ignore[assignment]
    assert window_rule(fixed, 3.0)(17) == 24_000


def test_query_adapter_has_the_attributes_of_its_network() -> None:
    network = FixedWindowModel(segment=2.0, limit=9)
    adapter = QueryAdapter(network, {"": {}})
    assert adapter.sources == network.sources
    assert adapter.valid_length(3) == 8000
    assert not hasattr(adapter, "use_train_segment")
    with pytest.raises(ValueError, match="queries is empty"):
        QueryAdapter(network, {})


def test_ensemble_from_model() -> None:
    one = ScaleModel()
    assert Ensemble.from_model(one).weights is None
    bag = BagOfModels([one, copy.deepcopy(one)], [[1, 0], [0, 1]])
    assert Ensemble.from_model(bag).weights == ((1.0, 0.0), (0.0, 1.0))
    assert Ensemble.from_model(Ensemble.from_model(bag)).members == tuple(bag.models)
    with pytest.raises(ValueError, match="has no sources, samplerate, audio_channels, segment"):
        Ensemble.from_model(print)


def test_ensemble_rejects_mismatch_and_zero_weights() -> None:
    one = ScaleModel()
    with pytest.raises(ValueError, match="differ in samplerate: 8000 and 16000"):
        Ensemble((one, ScaleModel(samplerate=16_000)), ((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="the weights of stem 'bass' add up to 0"):
        Ensemble((one, ScaleModel()), ((1.0, 1.0), (1.0, -1.0)))


def test_workers_get_few_batches_and_stop_when_the_stream_is_closed() -> None:
    class CountingPool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            futures.append(super().submit(*args, **kwargs))
            return futures[-1]

    class SlowModel(ScaleModel):
        def forward(self, mix: Tensor) -> Tensor:
            time.sleep(0.02)
            return super().forward(mix)

    futures: list[Future[Any]] = []
    options = SeparationOptions(shifts=0, normalize=False, jobs=3)
    with CountingPool(1) as pool:
        track = TensorTrack(make_noise(2, 200_000))
        stream = separate(track, SlowModel(), options=options, pool=pool)
        next(item for item in stream if isinstance(item, ChunkProcessed))
        assert len(futures) == 4, "three in flight, and the one that has returned"
        stream.close()
        assert all(future.done() for future in futures)
        assert futures[-1].cancelled(), "batches that had not started never run"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_stems_of_the_cpu() -> None:
    network, track = RecordingModel(), TensorTrack(make_noise(2, 30_000))
    expected = separate_to_tensor(track, network)
    got = separate_to_tensor(
        track, network, runner=Runner("cuda"), options=SeparationOptions(batch_size=3, jobs=1)
    )
    # The same products and sums, one rounding each, perhaps fused on one of the two.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert device_of(network) == torch.device("cpu")


class PartialStemsModel(ScaleModel):
    """Returns twice the signal from `forward_stems`, to tell it from `forward`."""

    def forward_stems(self, mix: Tensor, stems: Any) -> Tensor:
        return 2 * super().forward(mix)[:, list(stems)]


class OverriddenForwardModel(PartialStemsModel):
    def forward(self, mix: Tensor) -> Tensor:
        return super().forward(mix)


def test_forward_stems_is_used_where_it_is_equivalent() -> None:
    track, network = TensorTrack(make_noise(2, 9000)), PartialStemsModel()
    everything = separate_to_tensor(track, network, options=PLAIN)
    one = choose_stems(network.sources, stems=[network.sources[1]])
    assert torch.equal(
        separate_to_tensor(track, network, options=PLAIN, stems=one), 2 * everything[[1]]
    )
    # Not if hooks expect calls, or if `forward` is overridden.
    assert torch.equal(
        separate_to_tensor(track, OverriddenForwardModel(), options=PLAIN, stems=one),
        everything[[1]],
    )
    network.register_forward_hook(lambda *_: None)
    assert torch.equal(
        separate_to_tensor(track, network, options=PLAIN, stems=one), everything[[1]]
    )
