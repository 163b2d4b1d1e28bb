"""Import public names on first use, so that importing a package costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module


def make_getattr(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return the `__getattr__` of a package; `modules` has the module of every public name."""

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(modules[name]), name)
        setattr(import_module(package), name, value)  # found without this function from now on
        return value

    return load
