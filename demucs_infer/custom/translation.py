"""Collect a configuration of another package in the format of `Config`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Translation:
    """A configuration in the format of `Config`, and what could not be translated."""

    data: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    """The path in the file of each path in `data`."""

    def rename(self, problem: str) -> str:
        """Return a problem of `data` with its path in the file."""
        path, colon, text = problem.partition(":")
        if path in self.paths:
            return f"{self.paths[path]}{colon}{text}"
        section, dot, key = path.partition(".")
        return f"{self.paths.get(section, section)}{dot}{key}{colon}{text}"

    def add(self, source: str, target: str, value: object) -> None:
        """Set the key `target` to the value of the key `source` of the file."""
        section, _, key = target.partition(".")
        values = self.data.setdefault(section, {})
        assert isinstance(values, dict)
        values[key] = value
        self.paths[target] = source
        self.paths.setdefault(section, source.partition(".")[0])
