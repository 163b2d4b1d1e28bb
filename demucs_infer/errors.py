"""Define the exceptions of this package, and format them for users.

DemucsError
├── ModelLoadingError     a model cannot be loaded (also a RuntimeError, as upstream's)
│   ├── ModelNotFound     no model of that name
│   ├── CheckpointError   a file is damaged, unsupported, or not a checkpoint
│   │                     (also a pickle.UnpicklingError, as upstream's)
│   ├── CheckpointNotFound  a file does not exist (also a FileNotFoundError)
│   └── DownloadError     a file cannot be downloaded, or downloads are disabled
├── AudioError
│   ├── AudioInputError   invalid shape, type or sample rate of the input (also a ValueError)
│   ├── AudioReadError    no decoder can read the input
│   └── AudioWriteError   the output cannot be written; from `save_audio` also a
│                         FileNotFoundError (no folder) or a ValueError (unknown suffix)
├── ConfigError           an invalid configuration
└── SeparationError       the output of the network is not valid audio

Invalid arguments raise a plain `ValueError`.
"""

import difflib
import errno
import re
from collections.abc import Iterable
from pickle import UnpicklingError

_MAX_NAME = 100  # characters of a name in a message; a file may name anything
_SIGNATURE = "[0-9a-f]{7,9}"


class DemucsError(Exception):
    """Base class of all errors of this package."""


class ModelLoadingError(DemucsError, RuntimeError):
    """A model cannot be loaded; also a `RuntimeError`, as in upstream."""


class ModelNotFound(ModelLoadingError):
    """There is no model of that name; the message suggests similar names.

    `in_folder` is true if a folder was searched and not the catalog.
    """

    def __init__(self, name: str, names: Iterable[str], *, in_folder: bool = False) -> None:
        # Networks of bags have hexadecimal names, which are suggested only for such a name.
        is_signature = re.fullmatch(_SIGNATURE, name)
        candidates = sorted(
            candidate
            for candidate in names
            if in_folder or is_signature or not re.fullmatch(_SIGNATURE, candidate)
        )
        similar = " or ".join(map(repr, difflib.get_close_matches(name, candidates, n=2)))
        hint = f" Did you mean {similar}?" if similar else ""
        listing = (
            "list_models(repo) lists all models of the folder"
            if in_folder
            else "list_models() and `demucs-infer models ls` list all models"
        )
        shown = name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."
        super().__init__(f"no model named {shown!r}.{hint} {listing}.")
        self.name = name


class CheckpointError(ModelLoadingError, UnpicklingError):
    """A file is damaged, unsupported, or not a checkpoint."""


class CheckpointNotFound(ModelLoadingError, FileNotFoundError):
    """The file of a model does not exist; also a `FileNotFoundError`, as in upstream."""


class DownloadError(ModelLoadingError):
    """A file cannot be downloaded, or downloads are disabled."""


class AudioError(DemucsError):
    """Audio cannot be read or written."""


class AudioInputError(AudioError, ValueError):
    """The input is not valid audio."""


class AudioReadError(AudioError):
    """No decoder can read the input."""


class AudioWriteError(AudioError):
    """The output cannot be written; no partial file is left."""


class FolderNotFound(AudioWriteError, FileNotFoundError):
    """The folder of the output of `save_audio` does not exist; an error of upstream's kind too."""


class UnknownSuffix(AudioWriteError, ValueError):
    """The suffix of the output of `save_audio` is not a format; an error of upstream's kind too."""


class ConfigError(DemucsError):
    """A configuration is invalid; the message lists every problem."""


class SeparationError(DemucsError):
    """The output of the network is not valid audio."""


DISK_FULL = errno.ENOSPC, errno.EDQUOT
"""Error numbers of a full disk or an exceeded quota."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is due to a full disk."""
    chain: list[BaseException] = []
    while error is not None and not any(error is link for link in chain):  # causes may be cyclic
        chain.append(error)
        error = error.__cause__
    return any(
        getattr(link, "errno", None) in DISK_FULL for link in chain
    )  # FFmpeg's errors have one too


_OUT_OF_MEMORY = (
    "outofmemory",
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "can't start new thread",
    "brokenthreadpool",  # whose threads could not be set up
    "failed to map segment from shared object",
)
_NO_PRIMITIVE = "could not create a primitive"  # how oneDNN says it, without a descriptor behind


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is due to a lack of memory, on any kind of device."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, RuntimeError | ImportError) and (
        any(phrase in text for phrase in _OUT_OF_MEMORY) or text.endswith(_NO_PRIMITIVE)
    )


def format_error(error: BaseException) -> str:
    """Format an exception for end users, hiding class names where possible."""
    if is_out_of_memory(error):
        message = "out of memory: a shorter segment or a smaller batch size needs less"
        reason = str(error).partition("\n")[0]
        return f"{message} ({reason})" if reason else message
    if isinstance(error, DemucsError | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"
