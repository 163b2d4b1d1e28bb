"""Choose the device, or the devices, that a network runs on."""

import re
from pathlib import Path

import torch

from demucs_infer.errors import ConfigError
from demucs_infer.events import DeviceChosen

_DRIVER = Path("/proc/driver/nvidia/version")


def choose_device(device: str | torch.device | None = "auto") -> torch.device:
    """Return the device of that name; "auto" and None are the first available of cuda, mps and cpu.

    Raises `ValueError` for an unknown device, and `ConfigError` if it is not available here.
    """
    if device is None or device == "auto":
        return torch.device(choose_best_device().device)
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{device=!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device='meta' computes nothing; use 'auto', 'cpu', 'cuda' or 'mps'")
    reason = _find_obstacle(chosen)
    if reason is not None:
        details = f"; {describe_cuda()}" if chosen.type == "cuda" else ""
        raise ConfigError(
            f"{device=!s} is not available here ({reason}{details}); use 'auto' or 'cpu', "
            "or install a build of torch that supports it"
        )
    return chosen


def choose_devices(devices: str | torch.device | None = "auto") -> tuple[torch.device, ...]:
    """Return the devices of a list such as "cuda:0,cuda:1"; a single one as `choose_device` does.

    Raises `ValueError` also for devices of different kinds, whose results differ slightly: those
    of a track would depend on which of them was free.
    """
    if not isinstance(devices, str) or "," not in devices:
        return (choose_device(devices),)
    chosen = tuple(choose_device(device.strip()) for device in devices.split(","))
    kinds = sorted({device.type for device in chosen})
    if len(kinds) > 1:
        raise ValueError(
            f"device={devices!r} has devices of different kinds ({' and '.join(kinds)}): "
            "use those of one, such as 'cuda:0,cuda:1'"
        )
    return chosen


def choose_best_device() -> DeviceChosen:
    """Return the first of cuda, mps and cpu that works, and why it was chosen."""
    if torch.cuda.is_available():
        obstacle = _find_obstacle(torch.device("cuda"))
        if obstacle is None:
            return DeviceChosen("cuda", f"{torch.cuda.get_device_name()} is available")
        reason = f"the GPU does not work ({obstacle}; {describe_cuda()})"
        return DeviceChosen("cpu", reason, has_unused_gpu=True)
    if torch.backends.mps.is_available():
        return DeviceChosen("mps", "the GPU of this Mac is available")
    if _read_driver() is not None:
        reason = f"torch cannot use the NVIDIA GPU: {describe_cuda()}"
        return DeviceChosen("cpu", reason, has_unused_gpu=True)
    return DeviceChosen("cpu", f"no GPU was found: {describe_cuda()}")


def describe_cuda() -> str:
    """Return the versions of torch and of the NVIDIA driver, which have to fit each other."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    driver = _read_driver()
    return f"torch {torch.__version__} is {build}, " + (
        "no NVIDIA driver was found" if driver is None else f"the NVIDIA driver is {driver}"
    )


def _find_obstacle(device: torch.device) -> str | None:
    """Return why nothing can be computed on `device`, or None if that works."""
    try:
        # Backends report a missing device in different ways, but none can compute on it. A GPU that
        # is too old or too new for this build of torch is there, but runs none of its kernels.
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).strip().split(". ")[0].split("\n")[0].rstrip(".")
    return None


def _read_driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if Linux has none loaded."""
    try:
        text = _DRIVER.read_text()
    except OSError:
        return None
    version = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d[\d.]*)", text)
    return version[1] if version else "of an unknown version"
