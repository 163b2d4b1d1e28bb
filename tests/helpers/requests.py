"""Requests for tests, with settings by name."""

from demucs_infer.options import Request


def make_request(**settings: object) -> Request:
    """Return a request with some settings changed."""
    return Request().replace(settings)
