"""Import public names on first use, so that importing a package costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module


def make_getattr(
    package: str, modules: Mapping[str, str], left_out: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Return the `__getattr__` of a package; `modules` maps each public name to its module.

    `left_out` maps names of upstream that do not exist here to the reasons. They raise an
    `ImportError`, as `from package import name` would hide the text of an `AttributeError`.
    """

    def load(name: str) -> object:
        if left_out and name in left_out:
            raise ImportError(f"{package}.{name} is left out: {left_out[name]}")
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(modules[name]), name)
        setattr(import_module(package), name, value)  # later look-ups do not call this
        return value

    return load
