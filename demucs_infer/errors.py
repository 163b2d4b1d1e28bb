"""Everything this package raises on purpose.

DemucsError
├── ModelLoadingError     a network could not be had
│   ├── ModelNotFound     no such name, or no such file
│   ├── CheckpointError   the file is there but is not what it claims to be
│   └── DownloadError     the file could not be fetched, or may not be
├── AudioError
│   ├── AudioInputError   what was passed is no sound: a shape, a type, a rate (also a ValueError)
│   ├── AudioReadError    no decoder could read the input
│   └── AudioWriteError   the output could not be written
├── ConfigError           a configuration that contradicts itself
└── SeparationError       the network answered something that is not audio

A wrong setting is a `ValueError`; it is the caller's bug, not ours.
"""

import difflib
import errno
import re
from collections.abc import Iterable


class DemucsError(Exception):
    """Base class: whatever the song or the model, `except DemucsError` is enough."""


class ModelLoadingError(DemucsError):
    """A network could not be had."""


class ModelNotFound(ModelLoadingError):
    """No model of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        # Eight hexadecimal digits name one network of a bag; nobody types them by heart.
        names = [each for each in known if not re.fullmatch("[0-9a-f]{8}", each)] or known
        others = f"Known models: {', '.join(names)}." if names else "There is none here at all."
        super().__init__(f"no model named {name!r}.{hint} {others}")
        self.name = name


class CheckpointError(ModelLoadingError):
    """The file exists but cannot be trusted or understood."""


class DownloadError(ModelLoadingError):
    """The file could not be fetched, or may not be because we are offline."""


class AudioError(DemucsError):
    """Something about a file of sound."""


class AudioInputError(AudioError, ValueError):
    """What was passed is no sound, or no longer one; the message says what to pass."""


class AudioReadError(AudioError):
    """No decoder could read the input."""


class AudioWriteError(AudioError):
    """The output could not be written; nothing is left of it."""


class ConfigError(DemucsError):
    """A configuration that contradicts itself; the message lists every problem."""


class SeparationError(DemucsError):
    """The network answered something that is not audio."""


DISK_FULL = errno.ENOSPC, errno.EDQUOT
"""No room, or its owner may have no more of it."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it comes from a full disk, in whatever words it is told by now."""
    chain: list[BaseException] = []
    while error is not None and not any(error is one for one in chain):  # it may end in a ring
        chain.append(error)
        error = error.__cause__
    return any(getattr(one, "errno", None) in DISK_FULL for one in chain)  # FFmpeg's have it, too


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any kind of device."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in (
            "outofmemory",
            "out of memory",
            "can't allocate memory",
            "not enough memory",
        )
    )


def format_error(error: BaseException) -> str:
    """What is told to people, who did not ask for the name of a class where we can do better."""
    if is_out_of_memory(error):
        told = "out of memory: a shorter segment or a smaller batch size needs less"
        reason = str(error).partition("\n")[0]
        return f"{told} ({reason})" if reason else told
    if isinstance(error, DemucsError | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"
