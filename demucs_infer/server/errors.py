"""Convert failures to error responses: their HTTP status, error code and JSON body."""

import binascii
import logging
import os
import re
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from demucs_infer.batch.request import ModelSpec
from demucs_infer.checkpoints.cache import cache_folder
from demucs_infer.errors import (
    AudioReadError,
    DemucsError,
    ModelLoadingError,
    format_error,
    is_disk_full,
)
from demucs_infer.options import OPTIONS

logger = logging.getLogger(__name__)

STATUS = {
    "bad_form": 400,
    "bad_request": 400,
    "disconnected": 400,
    "no_client": 400,
    "not_json": 400,
    "no_key": 401,
    "foreign_origin": 403,
    "url_not_allowed": 403,
    "no_such_job": 404,
    "no_such_model": 404,
    "no_such_stem": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "contradiction": 406,
    "several_stems": 406,
    "unknown_type": 406,
    "too_slow": 408,
    "cancelled": 409,
    "not_done": 409,
    "expired": 410,
    "too_large": 413,
    "too_long": 413,
    "too_many_instances": 413,
    "bad_range": 416,
    "unknown_host": 421,
    "bad_base64": 422,
    "cannot_separate": 422,
    "empty_audio": 422,
    "invalid_parameters": 422,
    "invalid_request": 422,
    "invalid_url": 422,
    "no_file": 422,
    "output_failed": 422,
    "remote_failed": 422,
    "several_files": 422,
    "several_instances": 422,
    "too_much_work": 422,
    "unknown_model": 422,
    "unreadable_audio": 422,
    "too_many": 429,
    "failed": 500,
    "busy": 503,
    "model_unavailable": 503,
    "stopping": 503,
    "out_of_time": 504,
    "no_room": 507,
}
"""The status of every error code."""

_CODES: dict[type[Exception], str] = {
    AudioReadError: "unreadable_audio",
    ModelLoadingError: "model_unavailable",
    DemucsError: "invalid_parameters",  # the model cannot do what the request asks for
    ValueError: "invalid_parameters",
    RequestValidationError: "invalid_request",
    binascii.Error: "bad_base64",
    TimeoutError: "too_slow",
    ClientDisconnect: "disconnected",
}
"""Error codes of the exceptions that a bad request can cause; the most specific class counts."""

_HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 416: "bad_range"}
"""Error codes of requests that the web framework itself refuses, by HTTP status."""

_RETRY_AFTER = {"model_unavailable": 60, "no_room": 60, "stopping": 30, "not_done": 1}
"""Seconds after which a retry makes sense, by code."""

_UNION_MEMBER = re.compile(r"constrained-|literal\[")
_LOCATION = re.compile(
    r"\w+://[^\s'\"]*[^\s'\".,:;]|(?<![\w.])(?:/[\w.+~@-]+){2,}/?|[A-Za-z]:\\[^\s'\":]+"
)


@dataclass(eq=False)
class ApiError(Exception):
    """A failed request; becomes `{"error": {"code", "message"}}` with the status of its code."""

    code: str
    message: str
    retry_after: int | None = None
    """Seconds after which a retry makes sense; by default that of the code."""

    status: int = 0
    """The HTTP status; by default that of the code."""

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.status = self.status or STATUS[self.code]
        if self.retry_after is None:
            self.retry_after = _RETRY_AFTER.get(self.code)

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the body of the response."""
        return {"error": {"code": self.code, "message": self.public_message}}

    @property
    def public_message(self) -> str:
        """The message without paths of this machine."""
        return hide_paths(self.message)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def from_exception(error: Exception, message: str | None = None) -> ApiError:
    """Return the `ApiError` for an exception, and log exceptions that no request should cause.

    `message` replaces the exception's own text.
    """
    if isinstance(error, ApiError):
        return error
    if is_disk_full(error):
        logger.error("disk full: %s", error)
        return disk_full()
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code, "refused")
        return ApiError(code, message or str(error.detail), status=error.status_code)
    code = next((_CODES[base] for base in type(error).__mro__ if base in _CODES), "failed")
    if code == "failed":
        if isinstance(error, OSError | sqlite3.Error):  # of the disk, and no bug
            logger.error("unexpected error: %s", format_error(error))
        else:
            logger.error("unexpected error", exc_info=error)
        return ApiError(code, message or "internal error: see the server log")
    if isinstance(error, ValidationError | RequestValidationError):
        return ApiError(code, message or describe_invalid_fields(error))
    return ApiError(code, message or str(error))


def describe_invalid_fields(
    error: ValidationError | RequestValidationError, names: Collection[str] = ()
) -> str:
    """Return what is wrong with each field, one clause per field; `names` are the valid ones."""
    # FastAPI puts the place, such as "query", before the name of a parameter.
    first = -1 if isinstance(error, RequestValidationError) else 0
    return "; ".join(
        f"{'.'.join(_name_parts(problem['loc'][first:])) or 'body'}: "
        f"{_describe_unknown(problem, names) or problem['msg']}"
        for problem in list(error.errors())[:8]
    )


def _describe_unknown(problem: Mapping[str, Any], names: Collection[str]) -> str:
    """Return advice for a field that does not exist, or an empty string for other problems."""
    if problem["type"] != "extra_forbidden":
        return ""
    name = str(problem["loc"][-1])
    if name in OPTIONS and not OPTIONS[name].is_in("http"):
        return f"not possible over HTTP; {OPTIONS[name].setting.not_in['http']}"
    similar = get_close_matches(name, names, 1)
    return "unknown parameter" + (f"; did you mean {similar[0]}?" if similar else "")


def _name_parts(place: tuple[int | str, ...]) -> list[str]:
    """Return the names in the place of an error, without the members of a union."""
    return [str(part) for part in place if not _UNION_MEMBER.match(str(part))]


def model_unavailable(model: ModelSpec, error: Exception) -> ApiError:
    """Return the error for a model that cannot be loaded; log it with all details."""
    logger.error("model %s cannot be loaded: %s", model.name, error)
    message = f"the model {model.name!r} cannot be loaded"
    if not isinstance(error, ModelLoadingError):  # a bug, whose message is not for clients
        return ApiError("model_unavailable", f"{message}: see the server log")
    reason = str(error)
    for folder in (model.repo, model.cache_dir, cache_folder()):
        for path in (folder, folder.resolve()) if folder else ():
            reason = reason.replace(f"{path}{os.sep}", "")
    return ApiError("model_unavailable", f"{message}: {reason}")


def no_such_job() -> ApiError:
    """Return the error for a job that does not exist, or belongs to another client."""
    return ApiError("no_such_job", "no job has this id: it may have expired")


def disk_full() -> ApiError:
    """Return the error for a full disk, which is no fault of the client."""
    return ApiError("no_room", "server disk is full: try again later")


def stopping() -> ApiError:
    """Return the error for requests that arrive, or still wait, while the server shuts down."""
    return ApiError("stopping", "the server is shutting down: try again later")


def too_large(max_bytes: int) -> ApiError:
    """Return the error for a body or a file above the limit."""
    return ApiError("too_large", f"the upload exceeds {max_bytes} bytes: send a smaller file")


def hide_paths(message: str) -> str:
    """Return `message` on one line of at most 600 characters, without paths of this machine."""
    line = " ".join(_LOCATION.sub("the file", message).split())
    return line if len(line) <= 600 else f"{line[:599]}…"
