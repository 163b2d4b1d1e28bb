"""Load the kernels in Triton where they work."""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@cache
def load_kernels() -> Any:
    """Return the module of the kernels, or None where Triton is not there, or does not work.

    It is tried, because Triton needs a C compiler, a folder to write to and a driver that fits.
    """
    try:
        kernels = import_module("demucs_infer.optimized.gpu.triton_kernels")
    except ImportError:  # Windows, macOS
        return None
    try:
        x = torch.zeros(1, 8, device="cuda")
        kernels.add_bias_and_gelu(x, x[0], torch.float16, gelu=True, inject=None)
    except Exception as error:  # noqa: BLE001 (whatever it is, PyTorch can do the same)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warnings.warn(f"Triton does not work here, running without: {reason}", stacklevel=2)
        return None
    return kernels


def find_kernels(x: Tensor) -> Any:
    """Return the kernels if they can run on `x`: they are launched on the current device."""
    return load_kernels() if x.is_cuda and x.get_device() == torch.cuda.current_device() else None
