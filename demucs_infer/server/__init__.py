"""An HTTP server for separations: `create_app(ServerSettings())` is an ASGI application.

`demucs-infer serve` runs it. Requires the `serve` extra.
"""

from demucs_infer.system.lazy import make_getattr

__all__ = ["ServerSettings", "create_app"]

_LAZY_IMPORTS = {
    "ServerSettings": "demucs_infer.server.settings",
    "create_app": "demucs_infer.server.app",
}

__getattr__ = make_getattr(__name__, _LAZY_IMPORTS)
