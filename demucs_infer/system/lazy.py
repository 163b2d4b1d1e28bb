"""Import public names on first use, so that importing a package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from opcode import opmap
from types import FrameType


def make_getattr(
    package: str,
    modules: Mapping[str, str],
    left_out: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Callable[[str], object]:
    """Return the `__getattr__` of a package; `modules` maps each public name to its module.

    `left_out` maps names of upstream that do not exist here to the reasons. They raise an
    `AttributeError`, so that `hasattr` is false, but for `from package import name`, which would
    hide its text, an `ImportError`. `aliases` maps names to modules that are imported under them.
    """

    def load(name: str) -> object:
        if left_out and name in left_out:
            kind = ImportError if _is_importing(sys._getframe(1)) else AttributeError
            raise kind(f"{package}.{name} is left out: {left_out[name]}")
        if aliases and name in aliases:
            try:
                value: object = import_module(aliases[name])
            except ImportError as error:
                raise AttributeError(f"{package}.{name} is not installed: {error}") from error
        elif name in modules:
            value = getattr(import_module(modules[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(import_module(package), name, value)  # later look-ups do not call this
        return value

    return load


def _is_importing(frame: FrameType) -> bool:
    """Return whether a function is at a `from module import name`."""
    return frame.f_code.co_code[frame.f_lasti] == opmap["IMPORT_FROM"]
