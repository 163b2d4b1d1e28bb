"""Find the tracks that command-line arguments refer to: files, folders, patterns, stdin."""

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
"""Suffixes of tracks in a folder; a file that is an argument itself needs none of them."""


@dataclass(frozen=True, slots=True)
class DiscoveredTrack:
    """A track, and the output subfolder that mirrors its input folder."""

    source: str
    """A path, or `-` for standard input."""

    folder: Path = Path()
    is_discovered: bool = False
    """Whether the track was found in a folder or by a pattern, and not given by its own path."""

    @property
    def name(self) -> str:
        """The file name, or `stdin`."""
        return "stdin" if self.source == STDIN else Path(self.source).name


def find_tracks(arguments: Iterable[str], *, skip: Sequence[Path] = ()) -> list[DiscoveredTrack]:
    """Return all tracks in the order of the arguments, without duplicates.

    Folders in `skip` are not searched. An argument that matches no file is returned as a track, so
    that the error is reported when that track is read.
    """
    skipped_folders = [folder.resolve() for folder in skip]
    tracks: dict[str, DiscoveredTrack] = {}
    for argument in arguments:
        for track in _expand(argument, skipped_folders):
            key = track.source if track.source == STDIN else str(Path(track.source).resolve())
            tracks.setdefault(key, track)
    return list(tracks.values())


def _expand(argument: str, skipped_folders: Sequence[Path]) -> Iterator[DiscoveredTrack]:
    if argument == STDIN:
        yield DiscoveredTrack(STDIN)
    elif os.path.isdir(argument):  # noqa: PTH112 (Path.is_dir raises for some invalid names)
        yield from _search(Path(argument), skipped_folders)
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        # Shells that do not expand patterns (Windows) pass them on as typed.
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute ones too)
        files = [match for match in matches if not Path(match).is_dir() and not is_stream(match)]
        if "**" in argument:
            files = [match for match in files if is_audio(match)]
        if not files:
            yield DiscoveredTrack(argument)
        for match in files:
            yield DiscoveredTrack(match, is_discovered=True)
    else:
        yield DiscoveredTrack(argument)


def is_audio(name: str) -> bool:
    """Return whether a file in a folder is a track, by its suffix."""
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


def is_stream(path: str | Path) -> bool:
    """Return whether the path is a pipe or a device, which cannot be read twice."""
    path = Path(path)
    return path.is_fifo() or path.is_char_device() or path.is_block_device() or path.is_socket()


def _search(top: Path, skipped_folders: Sequence[Path]) -> Iterator[DiscoveredTrack]:
    """Yield the audio files in a folder and its subfolders, except hidden ones."""
    for root, subfolders, files in os.walk(top):
        folder = Path(root)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and (folder / name).resolve() not in skipped_folders
        )
        for name in sorted(files):
            if not name.startswith(".") and is_audio(name) and not is_stream(folder / name):
                relative = folder.relative_to(top)
                yield DiscoveredTrack(str(folder / name), relative, is_discovered=True)
