"""Make the file names of stems from a template, always inside the output folder."""

import hashlib
import os
import re
import string
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from demucs_infer.audio.formats import FORMATS

FIELDS = ("track", "trackext", "stem", "ext")
"""The fields that a template may use."""

_SHARED_SUFFIXES = {
    suffix.removeprefix(".")
    for kind in FORMATS.values()
    if kind.holds_all_stems
    for suffix in kind.suffixes
}
_MAX_BYTES = 255  # of one path component, on every file system in use
# Separators, control characters, and surrogates that no file system stores.
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")
_WINDOWS_UNSAFE = re.compile(r'[<>:"|?*]')
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"}
_WINDOWS_DEVICES |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789"}


@lru_cache(maxsize=64)  # called for every track
def valid_template(template: str) -> str:
    """Return `template` if it stays inside the folder and gives every stem its own file.

    Raises:
        ValueError: The template leaves the folder, has no `{stem}`, or has unknown fields.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"invalid {template=!r}: {error}") from error
    used = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in used:
        if name not in FIELDS or spec or conversion:
            fields = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(f"invalid {template=!r}: use only {fields}, without format options")
    if "stem" not in {name for name, _, _ in used}:
        raise ValueError(
            f"invalid {template=!r}: without {{stem}}, all stems would be the same file"
        )
    steps = re.split(r"[/\\]", template)
    if ".." in steps or not steps[0] or not steps[-1] or re.match("[A-Za-z]:", template):
        raise ValueError(f"invalid {template=!r}: it must stay inside the output folder")
    return template


def stem_paths(
    folder: Path,
    stems: Iterable[str],
    template: str = "{stem}.{ext}",
    *,
    track: str = "track",
    extension: str = "wav",
) -> dict[str, Path]:
    """Return the path of every stem; `track` is the file name of the input with its suffix.

    Raises:
        ValueError: The template is invalid, or two stems would be the same file.
    """
    valid_template(template)
    stems = tuple(stems)
    if extension in _SHARED_SUFFIXES:  # one file for all stems is named like the track
        name = track.rsplit(".", 1)[0]
        shared = stem_path(folder, name, template, track=track, extension=extension)
        return dict.fromkeys(stems, shared)
    paths = {
        stem: stem_path(folder, stem, template, track=track, extension=extension) for stem in stems
    }
    if len({str(path).casefold() for path in paths.values()}) < len(paths):
        raise ValueError(
            f"{template=!r} gives two of these stems the same file: {', '.join(paths)}"
        )
    return paths


def stem_path(folder: Path, stem: str, template: str, *, track: str, extension: str) -> Path:
    """Return the path of one file: the folder and the template with its fields filled in."""
    parts = track.rsplit(".", 1)  # without a suffix, both fields are the whole name
    fields = {"track": parts[0], "trackext": parts[-1], "ext": extension, "stem": stem}
    return folder / _fill(template, fields)


def _fill(template: str, fields: dict[str, str]) -> Path:
    safe = {key: _component(value) for key, value in fields.items()}
    filled = Path(template.format(**safe))
    too_long = max(len(_encode(part)) for part in filled.parts) - _MAX_BYTES
    if too_long > 0:
        safe["track"] = _shorten(safe["track"], too_long)
        filled = Path(template.format(**safe))
    return filled


def _component(value: str, *, windows: bool = os.name == "nt") -> str:
    """Return `value` as a single path component: no separator, not `..`, no Windows device."""
    plain = _UNSAFE.sub("_", value)
    if windows:
        plain = _WINDOWS_UNSAFE.sub("_", plain)
        plain = re.sub(r"[ .]+$", lambda end: "_" * len(end[0]), plain)
        if plain.partition(".")[0].rstrip(" ").lower() in _WINDOWS_DEVICES:
            plain = f"_{plain}"
    return "_" * max(len(plain), 1) if plain in ("", ".", "..") else plain


def _shorten(name: str, by: int) -> str:
    """Shorten a name by at least `by` bytes; different names stay different."""
    digest = hashlib.sha256(_encode(name)).hexdigest()[:8]
    length = max(len(_encode(name)) - by - len(digest) - 1, 0)
    return f"{_encode(name)[:length].decode(errors='ignore')}~{digest}"


def _encode(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names need not be UTF-8
