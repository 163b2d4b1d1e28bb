"""Music source separation with the Demucs networks, inference only."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demucs_infer.errors import DemucsError as DemucsError

__version__ = "5.0.0"

_HOME = {
    "DemucsError": "demucs_infer.errors",
}
__all__ = ["DemucsError", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import demucs_infer` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
