"""An HTTP server for separations: `create_app(ServerSettings())` is an ASGI application.

`demucs-infer serve` runs it. Requires the `serve` extra.
"""

from importlib import import_module

__all__ = ["ServerSettings", "create_app"]

_LAZY_IMPORTS = {
    "ServerSettings": "demucs_infer.server.settings",
    "create_app": "demucs_infer.server.app",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, as the settings alone need no web framework."""
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_LAZY_IMPORTS[name]), name)
    globals()[name] = value
    return value
