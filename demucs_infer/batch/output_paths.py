"""The files of each track: where they go, and whether two tracks would share one."""

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from demucs_infer.audio.filenames import stem_path, stem_paths, valid_template

DEFAULT_TEMPLATE = "{track}/{stem}.{ext}"


def model_folder(model: str) -> str:
    """The folder of a model below the output folder: `hf://user/name` gives `user_name`."""
    name = re.sub(r"[/\\\x00-\x1f]", "_", model.removeprefix("hf://"))
    return name if name.strip(".") else "_" * max(len(name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPaths:
    """Where the stems of one track go; one that exists cannot leave its folder."""

    folder: Path
    """The model's folder, or the sub-folder of it that mirrors the input's."""

    track: str
    """The input's file name."""

    extension: str = "wav"
    """Of the files written, without the dot."""

    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        valid_template(self.template)

    def stems(self, names: Iterable[str]) -> dict[str, Path]:
        """The file of every stem."""
        return stem_paths(
            self.folder, names, self.template, track=self.track, extension=self.extension
        )

    @property
    def manifest(self) -> Path:
        """Where a stem named `stems` would lie, as JSON: `song/stems.json`."""
        return self._json("stems")

    def numbered(self, number: int) -> "OutputPaths":
        """The same for another track of that name: `song-2`."""
        return self.called(f"-{number}")

    def called(self, addition: str) -> "OutputPaths":
        """The same with something added to what a template calls the track."""
        name, *suffix = self.track.rsplit(".", 1)  # as templates are filled
        return replace(self, track=".".join([f"{name}{addition}", *suffix]))

    @property
    def scores(self) -> Path:
        """Where it is kept how good the stems are."""
        return self._json("scores")

    def _json(self, stem: str) -> Path:
        path = stem_path(
            self.folder, stem, self.template, track=self.track, extension=self.extension
        )
        if self.template.endswith(".{ext}"):
            return path.with_name(f"{path.name.removesuffix(f'.{self.extension}')}.json")
        # What comes after a dot is part of a name, unless the template says that it is a suffix.
        if re.search(r"\.[^{}./\\]+$", self.template):
            return path.with_suffix(".json")
        return path.with_name(f"{path.name}.json")


def collisions(
    inputs: Iterable[str], outputs: Iterable[tuple[str, Iterable[Path]]]
) -> dict[int, str]:
    """What is wrong with some of the `outputs`, each a track and its files, by their index.

    No file may be written by two of them, nor be one of the `inputs`.
    """
    reading = {_key(Path(source)) for source in inputs}
    owners: dict[str, int] = {}
    names: list[str] = []
    found: dict[int, str] = {}
    for index, (source, paths) in enumerate(outputs):
        names.append(source)
        for path in paths:
            key = _key(path)
            owner = owners.setdefault(key, index)
            if key in reading:
                found.setdefault(index, f"{source} would overwrite the input {path}")
            elif owner != index:
                found.setdefault(index, f"{names[owner]} and {source} would both become {path}")
    return found


def without_collisions(
    inputs: Iterable[str], targets: Mapping[str, OutputPaths], stems: Iterable[str]
) -> dict[str, OutputPaths]:
    """The same targets, with `-2`, `-3`, ... added to the name of a track that is taken."""
    taken = {_key(Path(source)) for source in inputs}
    stems = tuple(stems)
    settled = {}
    for source, target in targets.items():
        number, choice = 1, target
        while taken & (keys := {_key(path) for path in choice.stems(stems).values()}):
            if "{track}" not in target.template:
                raise ValueError(f"a number needs {{track}} in the template {target.template!r}")
            number += 1
            choice = target.numbered(number)
        taken |= keys
        settled[source] = choice
    return settled


def _key(path: Path) -> str:
    """Equal for two paths that are one file here: where the system folds case, so do we."""
    return folded(os.path.normcase(path.absolute()))


def folded(text: str) -> str:
    """Equal for two names that the file systems of this machine take for one."""
    if sys.platform == "darwin":
        text = unicodedata.normalize("NFC", text)
    return text.casefold() if sys.platform in {"darwin", "win32"} else text
