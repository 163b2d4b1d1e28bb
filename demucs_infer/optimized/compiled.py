"""Compile the core of a network with PyTorch's compiler, which pays on a GPU with many windows.

Compilation takes minutes, and gives fewer and larger kernels. On a CPU, `kernels.py` is faster.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from demucs_infer.transformer import CrossTransformer


def compile_network(network: nn.Module, backend: Any = "inductor") -> nn.Module:
    """Return a copy of a network whose real-valued core is compiled at its first window.

    The core is the network's `estimate` or `run_network`, if it has one: spectra stay outside,
    because the compiler does not handle complex numbers. If compilation fails, the copy warns once
    and runs without it.
    """
    for positions in (CrossTransformer._positions, CrossTransformer._positions_t):
        torch.compiler.assume_constant_result(positions)  # looked up once, not for every window
    compiled = copy.copy(network)
    name = next(core for core in ("estimate", "run_network", "forward") if hasattr(network, core))
    object.__setattr__(compiled, name, _CompiledCore(getattr(network, name), backend))
    return compiled


class _CompiledCore:
    """A compiled function, replaced by the original one when compilation fails."""

    def __init__(self, original: Callable[..., Any], backend: Any) -> None:
        self._original = original
        self._function = torch.compile(original, dynamic=False, backend=backend)

    def __call__(self, *tensors: Any, **kwargs: Any) -> Any:
        if self._function is self._original:
            return self._original(*tensors, **kwargs)
        try:
            return self._function(*tensors, **kwargs)
        except torch.OutOfMemoryError:
            raise  # the runner retries with a smaller batch
        except (RuntimeError, AssertionError, ImportError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"torch.compile failed, running without it: {reason}", stacklevel=2)
            self._function = self._original
            return self._original(*tensors, **kwargs)
