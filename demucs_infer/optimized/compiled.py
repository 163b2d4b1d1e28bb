"""The static core of a network through PyTorch's compiler: for a GPU and many windows.

Minutes of compilation buy fewer and larger kernels; a processor gains more from the packed ones.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from demucs_infer.transformer import CrossTransformer


def compiled(network: nn.Module, backend: Any = "inductor") -> nn.Module:
    """A network whose real-valued core is compiled at its first window.

    Spectra stay outside, where a network has an `estimate` or an `ask` between them: compilers stop
    at complex numbers. If the compiler cannot be had or gives up, a warning says so and the network
    runs as it was.
    """
    for tables in (CrossTransformer._positions, CrossTransformer._positions_t):
        torch.compiler.assume_constant_result(tables)  # looked up once, not made in every window
    fast = copy.copy(network)
    name = next(one for one in ("estimate", "ask", "forward") if hasattr(network, one))
    object.__setattr__(fast, name, _Core(getattr(network, name), backend))
    return fast


class _Core:
    """A function that is compiled for as long as that works."""

    def __init__(self, plain: Callable[..., Any], backend: Any) -> None:
        self._plain = plain
        self._run = torch.compile(plain, dynamic=False, backend=backend)

    def __call__(self, *tensors: Any, **kwargs: Any) -> Any:
        if self._run is self._plain:
            return self._plain(*tensors, **kwargs)
        try:
            return self._run(*tensors, **kwargs)
        except torch.OutOfMemoryError:
            raise  # the runner's business: it takes a smaller batch
        except (RuntimeError, AssertionError, ImportError, OSError) as error:
            what = " ".join(str(error).split())[:200]
            warnings.warn(f"torch.compile gave up, going on without: {what}", stacklevel=2)
            self._run = self._plain
            return self._plain(*tensors, **kwargs)
