"""Import public names on first use, so that importing a package costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module


def make_getattr(
    package: str, modules: Mapping[str, str], left_out: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Return the `__getattr__` of a package; `modules` has the module of every public name.

    `left_out` has names of upstream that are not here, and the reasons. They raise an
    `ImportError`: `from package import name` would hide the text of an `AttributeError`.
    """

    def load(name: str) -> object:
        if left_out and name in left_out:
            raise ImportError(f"{package}.{name} is left out: {left_out[name]}")
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(modules[name]), name)
        setattr(import_module(package), name, value)  # found without this function from now on
        return value

    return load
