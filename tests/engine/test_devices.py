"""A device that does not work is an error with versions in it, and a choice is explained."""

import io
from pathlib import Path

import pytest
import torch

from demucs_infer import DeviceChosen, Separator, devices
from demucs_infer.cli.progress import make_reporter
from demucs_infer.devices import choose_best_device, choose_device, describe_cuda
from demucs_infer.errors import ConfigError
from demucs_infer.events import event_to_json
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import ScaleModel

DRIVER = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021
GCC version:  gcc version 11.4.0
"""
OPEN_DRIVER = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build
"""

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "version"
    path.write_text(DRIVER)
    monkeypatch.setattr(devices, "_DRIVER", path)
    return path


@pytest.mark.parametrize("text", [DRIVER, OPEN_DRIVER], ids=["closed", "open"])
def test_driver_version_is_read(driver: Path, text: str) -> None:
    driver.write_text(text)
    assert describe_cuda().endswith("is " + ("470.82.01" if text == DRIVER else "580.159.03"))


def test_unknown_form_of_the_driver_file(driver: Path) -> None:
    driver.write_text("something else")
    assert describe_cuda().endswith("the NVIDIA driver is of an unknown version")


def test_no_driver(driver: Path) -> None:
    driver.unlink()
    assert describe_cuda().endswith("no NVIDIA driver was found")


@without_gpu
def test_gpu_that_torch_cannot_use_is_an_error_with_both_versions(driver: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_device("cuda")
    message = str(caught.value)
    assert f"torch {torch.__version__}" in message and "470.82.01" in message
    assert "use 'auto' or 'cpu'" in message


@without_gpu
def test_separator_for_a_gpu_never_runs_on_the_cpu(driver: Path) -> None:
    with pytest.raises(ConfigError, match="470.82.01"):
        Separator.from_model(ScaleModel(), device="cuda")


@without_gpu
def test_auto_tells_that_a_gpu_is_there_but_cannot_be_used(driver: Path) -> None:
    choice = choose_best_device()
    assert choice.device == "cpu" and choice.has_unused_gpu
    assert choice.reason.startswith("torch cannot use the NVIDIA GPU: ")
    assert "470.82.01" in choice.reason


@without_gpu
def test_auto_tells_that_a_gpu_fails(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too new for this build of torch is available, but computes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choice = choose_best_device()
    assert choice.device == "cpu" and choice.has_unused_gpu
    assert choice.reason.startswith("the GPU does not work (")


@without_gpu
def test_machine_without_a_gpu_has_no_unused_one(driver: Path) -> None:
    driver.unlink()
    choice = choose_best_device()
    assert choice.reason.startswith("no GPU was found") and not choice.has_unused_gpu


def test_command_warns_of_an_unused_gpu_only() -> None:
    stream = io.StringIO()
    reporter = make_reporter("none", quiet=False, stream=stream)
    reporter.show_event("a.mp3", DeviceChosen("cpu", "no GPU was found"))
    assert not stream.getvalue()
    reporter = make_reporter("auto", quiet=False, stream=stream)
    reporter.show_event("a.mp3", DeviceChosen("cpu", "the driver is old", has_unused_gpu=True))
    assert stream.getvalue() == "warning: running on cpu: the driver is old\n"


@without_gpu
def test_auto_tells_its_choice_in_an_event_before_the_first_window() -> None:
    separator = Separator.from_model(ScaleModel(), device="auto")
    events = list(separator.stream(make_noise(2, 4000), 8000))
    chosen = [event for event in events if isinstance(event, DeviceChosen)]
    assert [event.device for event in chosen] == ["cpu"]
    assert "torch" in chosen[0].reason
    assert event_to_json(chosen[0]) == {
        "event": "DeviceChosen",
        "device": "cpu",
        "reason": chosen[0].reason,
        "has_unused_gpu": chosen[0].has_unused_gpu,
    }


def test_device_that_was_asked_for_is_not_announced() -> None:
    separator = Separator.from_model(ScaleModel(), device="cpu")
    events = list(separator.stream(make_noise(2, 4000), 8000))
    assert not any(isinstance(event, DeviceChosen) for event in events)
