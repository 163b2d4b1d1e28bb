"""Provide the torch helpers of this package's first release, for programs that import them."""

import torch
from torch import Tensor

__all__ = [
    "get_cuda_current_device",
    "get_device_tensor",
    "get_torch_arange",
    "get_torch_empty",
    "get_torch_tensor",
]

get_torch_arange = torch.arange
get_torch_empty = torch.empty
get_torch_tensor = torch.tensor


def get_device_tensor(device: torch.device | str) -> Tensor:
    """Return a tensor with one zero on a device."""
    return torch.zeros(1, device=device)


def get_cuda_current_device() -> int | None:
    """Return the index of the current GPU; None without one."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None
