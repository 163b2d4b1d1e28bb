"""Offer the helpers of upstream's `demucs.utils` that inference programs import."""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from demucs_infer.system.lazy import make_getattr

P = ParamSpec("P")
Data = TypeVar("Data", bound=Sized)

LEFT_OUT = {
    "EMA": "it is only for training; average metrics with numpy or torch",
    "pull_metric": "it is only for training; read your metrics with a list comprehension",
}
"""Names of upstream that are not here, and why."""

__getattr__ = make_getattr(__name__, {}, LEFT_OUT)


def fatal(*args: object) -> NoReturn:
    """Write a message to the error stream, and exit with code 1."""
    sys.stderr.write(" ".join(map(str, args)) + "\n")
    raise SystemExit(1)


def unfold(a: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Cut frames out of the last axis: (..., T) -> (... ceil(T / stride) kernel_size).

    The end is padded with zeros.
    """
    frames = math.ceil(a.shape[-1] / stride)
    length = (frames - 1) * stride + kernel_size
    return F.pad(a, (0, length - a.shape[-1])).unfold(-1, kernel_size, stride)


def center_trim(tensor: Tensor, reference: Tensor | int) -> Tensor:
    """Return the middle of the last axis, as long as `reference` or its last axis.

    If an odd number of samples is removed, the right side loses one more. Raises `ValueError` if
    the axis is too short.
    """
    length = reference.shape[-1] if isinstance(reference, Tensor) else reference
    surplus = tensor.shape[-1] - length
    if surplus < 0:
        raise ValueError(f"{tensor.shape[-1]} samples cannot be trimmed to {length}")
    return tensor[..., surplus // 2 : surplus // 2 + length]


def sizeof_fmt(num: float, suffix: str = "B") -> str:
    """Format a number of bytes for people: 1536 -> "1.5KiB"."""
    for unit in ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi"):
        if abs(num) < 1024:
            return f"{num:3.1f}{unit}{suffix}"
        num /= 1024
    return f"{num:.1f}Yi{suffix}"


@contextmanager
def temp_filenames(count: int, delete: bool = True) -> Iterator[list[str]]:
    """Create `count` empty temporary files, and delete them afterwards unless told not to."""
    names: list[str] = []
    try:
        for _ in range(count):
            with tempfile.NamedTemporaryFile(delete=False) as file:
                names.append(file.name)
        yield names
    finally:
        for name in names if delete else []:
            Path(name).unlink()


def random_subset(dataset: Data, max_samples: int, seed: int = 42) -> "Data | Subset[Any]":
    """Return `max_samples` random items of a dataset, or a smaller dataset unchanged."""
    if max_samples >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    indices: list[int] = order[:max_samples].tolist()
    items: Dataset[Any] = dataset  # type: ignore[assignment]  # anything with a length and items
    return Subset(items, indices)


class DummyPoolExecutor:
    """A pool without threads: each task runs in the caller when its result is asked for."""

    class DummyResult:
        """A task that has not run yet."""

        def __init__(
            self,
            func: Callable[..., Any],
            _dict: dict[str, bool],
            *args: Any,
            **kwargs: Any,
        ) -> None:
            self.func = func
            self.args = args
            self.kwargs = kwargs
            self._dict = _dict

        def result(self) -> Any:
            """Run the task; raise `CancelledError` after a shutdown of its pool."""
            if not self._dict["run"]:
                raise CancelledError
            return self.func(*self.args, **self.kwargs)

    def __init__(self, workers: int = 0) -> None:  # noqa: ARG002 (upstream's signature)
        self._dict = {"run": True}

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> DummyResult:
        """Return a task for `func(*args, **kwargs)`."""
        return DummyPoolExecutor.DummyResult(func, self._dict, *args, **kwargs)

    def shutdown(self, *_: object, **__: object) -> None:
        """Cancel the tasks that have not run."""
        self._dict["run"] = False

    def __enter__(self) -> "DummyPoolExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        return None


def capture_init(init: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Decorate an `__init__`, so that `serialize_model` finds its arguments.

    They are in the attribute `_init_args_kwargs` of the object, as a tuple and a dictionary.
    """

    def __init__(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self._init_args_kwargs = (args, kwargs)
        init(self, *args, **kwargs)

    update_wrapper(__init__, init)
    return __init__
