"""Which file each stem goes to: a template, filled in without ever leaving the folder."""

import hashlib
import os
import re
import string
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

FIELDS = ("track", "trackext", "stem", "ext")
"""What a template may name."""

_MAX_BYTES = 255  # of one path component, on every file system in use
# Separators, control characters, and halves of letters that no file system stores.
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]")
_WINDOWS_UNSAFE = re.compile(r'[<>:"|?*]')
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"}
_WINDOWS_DEVICES |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789"}


@lru_cache(maxsize=64)  # a catalogue asks for every track
def valid_template(template: str) -> str:
    """`template` if it names files inside the folder and tells the stems apart."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template=!r} is not a template: {error}") from error
    used = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in used:
        if name not in FIELDS or spec or conversion:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(f"{template=!r} may hold only {known}, as they are")
    if "stem" not in {name for name, _, _ in used}:
        raise ValueError(f"{template=!r} lacks {{stem}}: every stem would be the same file")
    steps = re.split(r"[/\\]", template)
    if ".." in steps or not steps[0] or not steps[-1] or re.match("[A-Za-z]:", template):
        raise ValueError(f"{template=!r} must stay inside the output folder")
    return template


def stem_paths(
    folder: Path,
    stems: Iterable[str],
    template: str = "{stem}.{ext}",
    *,
    track: str = "track",
    extension: str = "wav",
) -> dict[str, Path]:
    """The file of every stem; `track` is the name of the input, with its suffix if it has one."""
    valid_template(template)
    parts = track.rsplit(".", 1)  # without a suffix, both fields are the whole name
    fields = {"track": parts[0], "trackext": parts[-1], "ext": extension}
    paths: dict[str, Path] = {}
    for stem in stems:
        relative = _fill(template, {**fields, "stem": stem})
        paths[stem] = folder / relative
    if len({str(path).casefold() for path in paths.values()}) < len(paths):
        raise ValueError(f"{template=!r} gives two of {', '.join(paths)} the same file")
    return paths


def _fill(template: str, fields: dict[str, str]) -> Path:
    safe = {key: _component(value) for key, value in fields.items()}
    filled = Path(template.format(**safe))
    too_long = max(len(_encoded(part)) for part in filled.parts) - _MAX_BYTES
    if too_long > 0:
        safe["track"] = _shortened(safe["track"], too_long)
        filled = Path(template.format(**safe))
    return filled


def _component(value: str, *, windows: bool = os.name == "nt") -> str:
    """A name that cannot be a path: neither a separator nor a way up, nor a Windows device."""
    plain = _UNSAFE.sub("_", value)
    if windows:
        plain = _WINDOWS_UNSAFE.sub("_", plain)
        plain = re.sub(r"[ .]+$", lambda end: "_" * len(end[0]), plain)
        if plain.partition(".")[0].rstrip(" ").lower() in _WINDOWS_DEVICES:
            plain = f"_{plain}"
    return "_" * max(len(plain), 1) if plain in ("", ".", "..") else plain


def _shortened(name: str, by: int) -> str:
    """At least `by` bytes less, and still another name for another track."""
    digest = hashlib.sha256(_encoded(name)).hexdigest()[:8]
    kept = max(len(_encoded(name)) - by - len(digest) - 1, 0)
    return f"{_encoded(name)[:kept].decode(errors='ignore')}~{digest}"


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names need not be UTF-8
