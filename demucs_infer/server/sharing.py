"""Give finished jobs a second id, with which they can be read but not changed."""

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from pathlib import Path

SHARED_PREFIX = "shared-"
KEY_BYTES = 32


class SharedIds:
    """Ids for links: digests of the jobs' own ids with a secret key."""

    def __init__(self, key: bytes, list_ids: Callable[[], Iterable[str]]) -> None:
        """Use a key, and a function that returns the ids of the jobs."""
        self._key = key
        self._list_ids = list_ids
        self._ids: dict[str, str] = {}

    def make(self, id: str) -> str:
        """Return the shared id of a job."""
        digest = hmac.new(self._key, id.encode(), hashlib.sha256).hexdigest()
        return f"{SHARED_PREFIX}{digest[:32]}"

    def find(self, shared_id: str) -> str | None:
        """Return the id of the job with this shared id."""
        if shared_id not in self._ids:
            self._ids = {self.make(id): id for id in self._list_ids()}
        return self._ids.get(shared_id)


def read_key(file: Path) -> bytes:
    """Return the key in a file, or make one: links stay valid when the server restarts."""
    if file.exists() and len(key := file.read_bytes()) == KEY_BYTES:
        return key
    key = os.urandom(KEY_BYTES)
    file.unlink(missing_ok=True)
    file.touch(0o600)  # only the server's user can read it
    file.write_bytes(key)
    return key
