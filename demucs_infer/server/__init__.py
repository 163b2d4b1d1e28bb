"""The model behind HTTP: `create_app(ServerSettings())` is an ASGI application.

`demucs-infer serve` runs it. It needs the `serve` extra.
"""

from importlib import import_module

__all__ = ["ServerSettings", "create_app"]

_HOME = {"ServerSettings": "demucs_infer.server.settings", "create_app": "demucs_infer.server.app"}


def __getattr__(name: str) -> object:
    """A public name on first use: settings alone need no web framework."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
