"""Every exception and every error code has one HTTP status."""

import ast
import errno
from pathlib import Path

import pytest
from starlette.exceptions import HTTPException

import demucs_infer.server
from demucs_infer.errors import (
    AudioReadError,
    ConfigError,
    DownloadError,
    ModelNotFound,
    SeparationError,
)
from demucs_infer.server.errors import STATUS, ApiError, from_exception, hide_paths

PACKAGE = Path(demucs_infer.server.__file__).parent


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AudioReadError("x: not audio"), (422, "unreadable_audio")),
        (ModelNotFound("x", ["y"]), (503, "model_unavailable")),
        (DownloadError("offline"), (503, "model_unavailable")),
        (ConfigError("no such stem"), (422, "invalid_parameters")),
        (SeparationError("NaN"), (422, "invalid_parameters")),
        (ValueError("overlap = 2"), (422, "invalid_parameters")),
        (TimeoutError(), (408, "too_slow")),
        (OSError(errno.ENOSPC, "full"), (507, "no_room")),
        (OSError(errno.EIO, "broken"), (500, "failed")),
        (RuntimeError("bug"), (500, "failed")),
        (HTTPException(405), (405, "method_not_allowed")),
        (HTTPException(418), (418, "refused")),
        (ApiError("expired", "gone"), (410, "expired")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value[1],
)
def test_exception_has_status_and_code(error: Exception, expected: tuple[int, str]) -> None:
    result = from_exception(error)
    assert (result.status, result.code) == expected


def test_unexpected_exception_reveals_no_details() -> None:
    assert "secret" not in from_exception(RuntimeError("secret")).message


def test_every_error_code_in_the_code_has_a_status() -> None:
    codes = {
        call.args[0].value
        for path in PACKAGE.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == "ApiError"
        and isinstance(call.args[0], ast.Constant)
    }
    assert len(codes) > 20 and codes <= set(STATUS)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("/srv/models/a.th: broken", "the file: broken"),
        (r"C:\models\a.th: broken", "the file: broken"),
        ("https://example.org/a/b.th: HTTP 404", "the file: HTTP 404"),
        ("expected audio/wav or audio/flac", "expected audio/wav or audio/flac"),
        ("shifts / (1 - overlap)", "shifts / (1 - overlap)"),
    ],
    ids=["path", "windows path", "url", "media types", "formula"],
)
def test_messages_reveal_no_paths(message: str, expected: str) -> None:
    assert hide_paths(message) == expected
