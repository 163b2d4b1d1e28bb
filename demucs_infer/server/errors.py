"""How a request is turned down: a status, a word for programs, a sentence for people."""

import re
from dataclasses import dataclass

_PATH = re.compile(r"(?<![\w.])(?:/[\w.+~@-]+){2,}/?|[A-Za-z]:\\[^\s'\"]+")


@dataclass(eq=False)
class ApiError(Exception):
    """Becomes `{"error": {"code", "message"}}` with its status."""

    status: int
    code: str
    message: str
    retry_after: int | None = None
    """Seconds after which another try may be worth it."""

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def as_json(self) -> dict[str, dict[str, str]]:
        """The body of the answer."""
        return {"error": {"code": self.code, "message": without_paths(self.message)}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def no_room() -> ApiError:
    """The disk of the server is full, which is no fault of whoever asks."""
    return ApiError(507, "no_room", "the server has no room left on its disk; try again later", 60)


def without_paths(message: str) -> str:
    """`message` without a path of this machine, and as one line of sensible length."""
    plain = " ".join(_PATH.sub("the file", message).split())
    return plain if len(plain) <= 600 else f"{plain[:599]}…"
