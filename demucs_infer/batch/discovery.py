"""Which tracks the words on a command line mean: files, folders, patterns, standard input."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"

_PLAIN = ".wav .wave .rf64 .w64 .aif .aiff .aifc .au .snd .caf .voc"
_LOSSLESS = ".flac .alac .ape .tta .wv .dff .dsf"
_LOSSY = ".mp3 .mp2 .ogg .oga .opus .spx .aac .m4a .m4b .ac3 .eac3 .dts .wma .mpc .amr .ra"
_VIDEO = ".mp4 .m4v .mov .mkv .mka .webm .flv .mpg .ts .wmv .3gp"

AUDIO_SUFFIXES = frozenset(" ".join((_PLAIN, _LOSSLESS, _LOSSY, _VIDEO)).split())
"""What is taken for a track inside a folder; a file that is named outright is always tried."""


@dataclass(frozen=True, slots=True)
class Found:
    """One track, and the sub-folder that mirrors where it was found."""

    source: str
    """A path, or `-`."""

    folder: Path = Path()

    @property
    def name(self) -> str:
        """The file's name; what comes through a pipe is called stdin."""
        return "stdin" if self.source == STDIN else Path(self.source).name


def find_tracks(words: Iterable[str], *, skip: Sequence[Path] = ()) -> list[Found]:
    """Every track that `words` mean, once each, in their order; nothing below a folder of `skip`.

    A word that means nothing is a track too: reading it will say what is wrong.
    """
    skipped = [folder.resolve() for folder in skip]
    seen: dict[str, Found] = {}
    for word in words:
        for found in _tracks_of(word, skipped):
            key = found.source if found.source == STDIN else str(Path(found.source).resolve())
            seen.setdefault(key, found)
    return list(seen.values())


def _tracks_of(word: str, skipped: Sequence[Path]) -> Iterator[Found]:
    if word == STDIN:
        yield Found(STDIN)
    elif os.path.isdir(word):  # noqa: PTH112 (a name that no file system takes is no error here)
        yield from _tracks_in(Path(word), skipped)
    elif glob.has_magic(word) and not os.path.lexists(word):
        # What a shell without patterns of its own (Windows) hands over as it was typed.
        matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207 (absolute ones too)
        files = [match for match in matches if not Path(match).is_dir() and not is_stream(match)]
        if "**" in word:
            files = [match for match in files if is_audio(match)]
        yield from map(Found, files or [word])
    else:
        yield Found(word)


def is_audio(name: str) -> bool:
    """Whether a file is taken for a track by its suffix."""
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


def is_stream(path: str | Path) -> bool:
    """Whether it is a pipe or a device: no file that can be read from its start again."""
    path = Path(path)
    return path.is_fifo() or path.is_char_device() or path.is_block_device() or path.is_socket()


def _tracks_in(top: Path, skipped: Sequence[Path]) -> Iterator[Found]:
    """The audio files of a folder and of the folders in it, hidden ones apart."""
    for here, folders, files in os.walk(top):
        folder = Path(here)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (folder / name).resolve() not in skipped
        )
        for name in sorted(files):
            if not name.startswith(".") and is_audio(name) and not is_stream(folder / name):
                yield Found(str(folder / name), folder.relative_to(top))
