"""Choose the device that a network runs on."""

import torch

from demucs_infer.errors import ConfigError


def choose_device(device: str | torch.device | None = "auto") -> torch.device:
    """Return the device of that name; "auto" and None are the first available of cuda, mps and cpu.

    Raises `ValueError` for an unknown device, and `ConfigError` if it is not available here.
    """
    if device is None or device == "auto":
        return _best_device()
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{device=!r} is not a device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device='meta' computes nothing; use 'auto', 'cpu', 'cuda' or 'mps'")
    try:
        # Backends report a missing device in different ways, but none can allocate on it.
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split(". ")[0].rstrip(".")
        raise ConfigError(
            f"{device=!s} is not available here ({reason}); use 'auto' or 'cpu', "
            "or install a build of torch that supports it"
        ) from error
    return chosen


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
