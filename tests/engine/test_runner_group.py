"""Several devices share the windows of a track and give the bytes of one; memory can be bounded."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from demucs_infer import Separator
from demucs_infer.engine.parallel import _BYTES_PER_SAMPLE, _OVERHEAD_BYTES, limit_windows
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.options import OPTIONS
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, OomModel, RecordingModel, ScaleModel, randomize

GB = 10**9
MIX = 0.3 * make_noise(2, 6 * 8000)


class MeetingModel(ScaleModel):
    """Wait in every window for another one: a single device would wait for ever."""

    barrier = threading.Barrier(2, timeout=20)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MeetingModel":
        return MeetingModel(self.sources, self.gains.tolist())

    def forward(self, mix: Tensor) -> Tensor:
        self.barrier.wait()
        return super().forward(mix)


def test_devices_run_windows_at_the_same_time() -> None:
    separator = Separator.from_model(
        MeetingModel(), device="cpu,cpu", shifts=0, overlap=0, normalize=False
    )
    assert separator.devices == (torch.device("cpu"),) * 2
    torch.testing.assert_close(separator.run(MIX)["bass"], 0.75 * MIX, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_stems_of_several_devices_are_those_of_one() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    alone = Separator.from_model(network, device="cpu").run(MIX)
    together = Separator.from_model(network, device="cpu,cpu").run(MIX)
    assert all(torch.equal(alone[stem], together[stem]) for stem in alone)
    assert not network.training


@pytest.mark.usefixtures("one_thread")
def test_devices_can_be_changed_and_weights_freed() -> None:
    separator = Separator("tiny", device="cpu,cpu", shifts=0)
    wav = make_noise(2, 44_100)
    expected = separator.run(wav)
    separator.update_parameter(device="cpu")
    one = separator.run(wav)
    separator.update_parameter(device="cpu,cpu,cpu")
    separator.free_original_weights()
    three = separator.run(wav)
    for stem in expected:
        assert torch.equal(one[stem], expected[stem]) and torch.equal(three[stem], expected[stem])


def test_every_device_remembers_its_batch_size() -> None:
    network = OomModel(limit=1, segment=1.0)
    separator = Separator.from_model(
        network, device="cpu,cpu", shifts=0, overlap=0, normalize=False, batch_size=2
    )
    torch.testing.assert_close(separator.run(MIX)["bass"], 0.75 * MIX, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("cpu,,cpu", "device='' is not a device"),
        ("cpu,gpu7", "'gpu7' is not a device"),
        ("cpu,meta", "'meta' computes nothing"),
    ],
)
def test_invalid_lists_of_devices_are_refused(devices: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Separator.from_model(ScaleModel(), device=devices)


def test_devices_of_different_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from demucs_infer import devices

    monkeypatch.setattr(devices, "choose_device", torch.device)
    with pytest.raises(ValueError, match=r"different kinds \(cpu and cuda\): use those of one"):
        devices.choose_devices("cuda:0,cpu")
    assert devices.choose_devices("cuda:0, cuda:1") == (
        torch.device("cuda:0"),
        torch.device("cuda:1"),
    )


# ── memory ──


@pytest.mark.parametrize(
    ("text", "size"),
    [("7", 7), ("500MB", 500_000_000), ("2 gb", 2 * GB), ("1.5GiB", 3 * 2**29), ("1T", 10**12)],
)
def test_sizes_of_the_command_line(text: str, size: int) -> None:
    assert OPTIONS["max_memory"].parse(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "2 bananas", "1e400GB"])
def test_invalid_sizes_tell_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="an integer above 0, or a size such as 2GB"):
        OPTIONS["max_memory"].parse(text)


def test_windows_are_limited_by_the_memory_that_is_left() -> None:
    network = RecordingModel(samplerate=44_100, segment=10.0)
    window, used = 441_000 * _BYTES_PER_SAMPLE, GB // 2
    base = used + _OVERHEAD_BYTES
    for segment, size in ((None, window), (1.0, window // 10)):
        for count in (1, 3):
            memory = base + count * size + size // 2
            limit = limit_windows([network], memory, segment=segment, used=used, is_cpu=True)
            assert limit == count
    needed = f"about {(base + window) / GB:.2f} GB"
    with pytest.raises(ValueError, match=rf"max_memory = 0.80 GB is too little: {needed}"):
        limit_windows([network], 8 * GB // 10, segment=None, used=used, is_cpu=True)


def test_batches_and_windows_in_flight_stay_within_max_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("demucs_infer.engine.runner.measure_memory", lambda device: GB)
    window = 8000 * _BYTES_PER_SAMPLE
    for jobs, batches in ((0, [3, 3]), (3, [1] * 6)):
        network = RecordingModel(segment=1.0)
        separator = Separator.from_model(
            network,
            device="cpu",
            shifts=0,
            overlap=0,
            batch_size=6,
            jobs=jobs,
            max_memory=GB + _OVERHEAD_BYTES + 3 * window + 100,
        )
        separator.run(MIX)
        assert [shape[0] for shape in network.seen] == batches
    with pytest.raises(ValueError, match="max_memory = 1 bytes is too little"):
        Separator.from_model(ScaleModel(), device="cpu", max_memory=1).run(MIX)
