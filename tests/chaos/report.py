"""Collect what a subject counted and found."""

import json
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_EXAMPLES = 5  # of one kind of finding


@dataclass
class Report:
    """Figures of one run, and its findings: whatever contradicts a promise."""

    subject: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def find(self, kind: str, example: str) -> None:
        """Count a finding, and keep the first examples of its kind."""
        self.counts[f"finding: {kind}"] += 1
        examples = self.findings.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(example)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        usages = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        return {
            "subject": self.subject,
            "seed": self.seed,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.monotonic() - self._start, 1),
            "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
            "counts": dict(sorted(self.counts.items())),
            "figures": self.figures,
            "findings": self.findings,
        }

    def write(self, path: Path) -> None:
        """Write it as a JSON file."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Limits:
    """How long a run goes on, and where it begins."""

    seed: int = 0
    seconds: float = 10.0
    count: int | None = None
    """Cases at most."""

    first: int = 0
    """Number of the first case: a case depends on it and the seed alone."""

    share: float = 1.0
    """Share of one core that a soak takes at most."""

    keep: Path | None = None
    """Folder for the files of findings."""
