"""Which device a network runs on."""

import torch

from demucs_infer.errors import ConfigError


def choose_device(device: str | torch.device | None = "auto") -> torch.device:
    """The device of that name; "auto" and None are the first of cuda, mps and cpu that is here."""
    if device is None or device == "auto":
        return _best()
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{device=!r} is no device; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from error
    if chosen.type == "meta":
        raise ValueError("device='meta' computes nothing; use 'auto', 'cpu', 'cuda' or 'mps'")
    try:
        # What a device says when it is absent differs from one to the next; trying does not.
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split(". ")[0].rstrip(".")
        raise ConfigError(
            f"{device=!s} is not available here ({reason}); use 'auto' or 'cpu', "
            "or install the torch that was built for it"
        ) from error
    return chosen


def _best() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
