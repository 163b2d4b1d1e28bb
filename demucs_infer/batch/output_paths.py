"""Determine the output files of each track, and detect tracks that would share one."""

import os
import re
import sys
import unicodedata
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from demucs_infer.audio.filenames import stem_path, stem_paths, valid_template
from demucs_infer.options import TRACK_TEMPLATE


def model_folder(model: str) -> str:
    """Return the name of a model's output subfolder: `hf://user/name` -> `user_name`."""
    name = re.sub(r"[/\\\x00-\x1f]", "_", model.removeprefix("hf://"))
    return name if name.strip(".") else "_" * max(len(name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPaths:
    """The output files of one track, which are always inside `folder`."""

    folder: Path
    """The model's output folder, or a subfolder of it that mirrors the input's folder."""

    track: str
    """The input's file name."""

    extension: str = "wav"
    """The suffix of the files, without the dot."""

    template: str = TRACK_TEMPLATE

    def __post_init__(self) -> None:
        valid_template(self.template)

    def stems(self, names: Iterable[str]) -> dict[str, Path]:
        """Return the path of each stem."""
        return stem_paths(
            self.folder, names, self.template, track=self.track, extension=self.extension
        )

    @property
    def manifest(self) -> Path:
        """The path of the manifest: that of a stem named `stems`, as JSON (`song/stems.json`)."""
        return self._json("stems")

    def with_track_suffix(self, suffix: str) -> "OutputPaths":
        """Return the paths of a track with a longer name: `song-2` for the suffix `-2`."""
        name, *extension = self.track.rsplit(".", 1)  # as in `stem_paths`
        return replace(self, track=".".join([f"{name}{suffix}", *extension]))

    @property
    def track_name(self) -> str:
        """The name that replaces `{track}` in the template."""
        return self.track.rsplit(".", 1)[0]

    @property
    def scores(self) -> Path:
        """The path of the cached scores of the stems."""
        return self._json("scores")

    def _json(self, stem: str) -> Path:
        path = stem_path(
            self.folder, stem, self.template, track=self.track, extension=self.extension
        )
        if self.template.endswith(".{ext}"):
            return path.with_name(f"{path.name.removesuffix(f'.{self.extension}')}.json")
        # A dot in a name does not start a suffix, unless the template ends with a suffix.
        if re.search(r"\.[^{}./\\]+$", self.template):
            return path.with_suffix(".json")
        return path.with_name(f"{path.name}.json")


def find_collisions(
    inputs: Iterable[str], outputs: Iterable[tuple[str, Iterable[Path]]]
) -> dict[int, str]:
    """Return a message for each track whose files collide, by the index of the track.

    `outputs` has the name and the files of each track. Two tracks must not have a file in common,
    and no file may overwrite one of the `inputs`.
    """
    input_keys = {_path_key(Path(source)) for source in inputs}
    owners: dict[str, int] = {}
    names: list[str] = []
    problems: dict[int, str] = {}
    for index, (source, paths) in enumerate(outputs):
        names.append(source)
        for path in paths:
            key = _path_key(path)
            owner = owners.setdefault(key, index)
            if key in input_keys:
                problems.setdefault(index, f"{source} would overwrite the input {path}")
            elif owner != index:
                problems.setdefault(index, f"{names[owner]} and {source} would both become {path}")
    return problems


def excerpt_suffix(start: float, duration: float | None) -> str:
    """Return a suffix such as ` [10-20 s]` for a track of which only a part is separated.

    It prevents the stems of the part from replacing those of the whole track.
    """
    if not start and duration is None:
        return ""
    stop = "" if duration is None else f"{start + duration:g}"
    return f" [{start:g}-{stop} s]"


def add_types(
    outputs: Mapping[str, OutputPaths], discovered: Container[str], stems: Iterable[str]
) -> dict[str, OutputPaths]:
    """Return new outputs for tracks in `discovered` that share a name: `song-mp3`, `song-flac`.

    Unlike numbers, these suffixes do not change when other tracks are added to the folder.
    """
    stems = tuple(stems)
    sharing: dict[str, list[str]] = {}
    for source, output in outputs.items():
        for path in output.stems(stems).values():
            sharing.setdefault(_path_key(path), []).append(source)
    renamed = {source for sources in sharing.values() if len(sources) > 1 for source in sources}
    return {
        source: outputs[source].with_track_suffix(Path(source).suffix.lower().replace(".", "-"))
        for source in outputs
        if source in renamed and source in discovered
    }


def resolve_collisions(
    inputs: Iterable[str], outputs: Mapping[str, OutputPaths], stems: Iterable[str]
) -> dict[str, OutputPaths]:
    """Return the outputs by track, with `-2`, `-3`, ... added to names that are in use."""
    used_keys = {_path_key(Path(source)) for source in inputs}
    stems = tuple(stems)
    resolved = {}
    for source, output in outputs.items():
        number, candidate = 1, output
        while used_keys & (keys := {_path_key(path) for path in candidate.stems(stems).values()}):
            if "{track}" not in output.template:
                raise ValueError(
                    f"cannot number tracks: no {{track}} in the template {output.template!r}"
                )
            number += 1
            candidate = output.with_track_suffix(f"-{number}")
        used_keys |= keys
        resolved[source] = candidate
    return resolved


def _path_key(path: Path) -> str:
    """Return a key that is equal for two paths of the same file on this system."""
    return fold_case(os.path.normcase(path.absolute()))


def fold_case(text: str) -> str:
    """Return a key that is equal for two names of the same file on this system."""
    if sys.platform == "darwin":
        text = unicodedata.normalize("NFC", text)
    return text.casefold() if sys.platform in {"darwin", "win32"} else text
