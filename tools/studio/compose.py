"""Compose a song from a seed: sections, chords, grooves, bass lines, accompaniment, melodies.

A step is a sixteenth of a bar of four quarters; all times that leave this module are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from tools.studio.midi import Note, Part
from tools.studio.styles import CRASH, KICK, PROGRESSIONS, SNARE, STYLES, TOMS, Groove, Style

MAJOR = (0, 2, 4, 5, 7, 9, 11)
MINOR = (0, 2, 3, 5, 7, 8, 10)
STEPS = 16

ROLES = ("drums", "bass", "comp", "pad", "lead", "vocals")
ARRANGEMENTS = {  # how likely each role plays in a section
    "intro": (0.5, 0.5, 0.9, 0.4, 0.5, 0.0),
    "verse": (0.95, 0.95, 0.95, 0.3, 0.2, 1.0),
    "chorus": (1.0, 1.0, 1.0, 0.8, 0.4, 1.0),
    "solo": (1.0, 1.0, 0.9, 0.4, 1.0, 0.0),
    "break": (0.35, 0.4, 0.7, 0.9, 0.3, 0.6),
    "outro": (0.9, 0.9, 0.9, 0.6, 0.7, 0.3),
}


@dataclass(frozen=True, slots=True)
class Section:
    """Some bars with one groove, one progression and a fixed set of players."""

    name: str
    first_bar: int
    bars: int
    degrees: tuple[int, ...]
    groove: Groove
    playing: frozenset[str]
    energy: float


@dataclass(frozen=True, slots=True)
class Song:
    """Everything that was composed."""

    style: Style
    tempo: float
    tonic: int
    scale: tuple[int, ...]
    seconds: float
    sections: tuple[Section, ...]
    drums: tuple[Part, ...]
    bass: tuple[Part, ...]
    other: tuple[Part, ...]
    melody: tuple[Note, ...]
    harmony: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """From bars and steps to seconds, with swing and a human's inaccuracy."""

    step: float
    swing: float
    spread: float
    rng: Generator

    def __call__(self, bar: float, step: float) -> float:
        """Return the second at which a step of a bar is played."""
        late = self.swing * self.step if round(step) % 4 == 2 and self.swing > 0.3 else 0.0
        late += self.swing * self.step if round(step) % 2 == 1 else 0.0
        exact = (bar * STEPS + step) * self.step + late
        return max(0.0, exact + self.rng.normal(0, self.spread))


def mutate(groove: Groove, rng: Generator) -> Groove:
    """Return the groove with a few hits added or removed."""
    changed = {}
    for drum, row in groove.items():
        steps = list(row)
        for index in range(len(steps)):
            if rng.random() < (0.06 if drum in (KICK, SNARE) else 0.03):
                steps[index] = "." if steps[index] != "." else "o" if drum == SNARE else "x"
        changed[drum] = "".join(steps)
    return changed


def plan_sections(style: Style, bars: int, rng: Generator) -> tuple[Section, ...]:
    """Plan sections that fill `bars` bars."""
    order = ["intro", "verse", "chorus", "verse", "solo", "chorus", "break", "chorus", "outro"]
    if rng.random() < 0.5:
        order = order[1:]
    if rng.random() < 0.3:
        order.insert(0, "chorus")
    themes = {name: PROGRESSIONS[rng.integers(len(PROGRESSIONS))] for name in ARRANGEMENTS}
    grooves = {
        name: mutate(style.grooves[rng.integers(len(style.grooves))], rng) for name in ARRANGEMENTS
    }
    sections: list[Section] = []
    bar = 0
    while bar < bars:
        name = order[len(sections) % len(order)]
        length = int(rng.choice([2, 4, 4, 4, 8])) if name in ("verse", "chorus") else 4
        odds = ARRANGEMENTS[name]
        playing = frozenset(
            role for role, chance in zip(ROLES, odds, strict=True) if rng.random() < chance
        ) or frozenset({"comp"})
        energy = float({"intro": 0.7, "break": 0.6, "chorus": 1.0}.get(name, 0.85))
        section = Section(name, bar, length, themes[name], grooves[name], playing, energy)
        sections.append(section)
        bar += length
    return tuple(sections)


@dataclass(frozen=True, slots=True)
class Composer:
    """Writes one song; every method draws from the same generator, in a fixed order."""

    rng: Generator
    style: Style
    clock: Clock
    tonic: int
    scale: tuple[int, ...]
    sections: tuple[Section, ...]

    def pitch(self, degree: int) -> int:
        """Return a scale degree of any octave in semitones above the tonic."""
        return 12 * (degree // 7) + self.scale[degree % 7]

    def chord(self, degree: int, seventh: bool) -> list[int]:
        """Return the tones of a chord in semitones above the tonic."""
        return [self.pitch(degree + third) for third in ((0, 2, 4, 6) if seventh else (0, 2, 4))]

    def bars(self, role: str) -> list[tuple[Section, int, int]]:
        """Return (section, bar in the song, degree) of each bar in which `role` plays."""
        return [
            (section, section.first_bar + index, section.degrees[index % len(section.degrees)])
            for section in self.sections
            if role in section.playing
            for index in range(section.bars)
        ]

    def velocity(self, energy: float, accent: float = 1.0) -> int:
        """Draw a MIDI velocity."""
        return int(np.clip(self.rng.normal(96, 7) * (0.6 + 0.4 * energy) * accent, 20, 127))

    # ── drums ──

    def drums(self) -> list[Note]:
        """Compose the drum part."""
        notes: list[Note] = []
        for section, bar, _ in self.bars("drums"):
            last = bar == section.first_bar + section.bars - 1
            fill = int(self.rng.choice([4, 8])) if last and self.rng.random() < 0.7 else 0
            if bar == section.first_bar and self.rng.random() < 0.7:
                notes.append(self.hit(bar, 0, CRASH, section.energy, 1.0))
            for drum, row in section.groove.items():
                for step, mark in enumerate(row[: STEPS - fill]):
                    if mark != ".":
                        accent = (0.5 if mark == "o" else 1.0) * (1.0 if step % 4 == 0 else 0.88)
                        notes.append(self.hit(bar, step, drum, section.energy, accent))
            notes += self.fill(bar, STEPS - fill, section.energy)
        return notes

    def hit(self, bar: int, step: int, drum: int, energy: float, accent: float) -> Note:
        """Make one drum note."""
        start = self.clock(bar, step)
        return Note(start, start + 0.2, drum, self.velocity(energy, accent))

    def fill(self, bar: int, first: int, energy: float) -> list[Note]:
        """Compose a drum fill from step `first` to the end of a bar."""
        drums = (SNARE, *TOMS)
        at = 0
        notes = []
        for step in range(first, STEPS):
            if self.rng.random() < 0.8:
                at = min(at + int(self.rng.integers(0, 3)), len(drums) - 1)
                notes.append(self.hit(bar, step, drums[at], energy, 0.8 + 0.2 * step / STEPS))
        return notes

    # ── bass ──

    def bass_line(
        self, kind: str, degree: int, following: int, groove: Groove
    ) -> list[tuple[int, int, int]]:
        """Return (step, length in steps, semitones above the tonic) of the notes of one bar."""
        root, fifth, octave = self.pitch(degree), self.pitch(degree + 4), self.pitch(degree) + 12
        if kind == "eighths":
            return [(step, 2, root) for step in range(0, 16, 2)]
        if kind == "sixteenths":
            return [(step, 1, octave if step % 4 == 2 else root) for step in range(16)]
        if kind == "octaves":
            return [(step, 2, octave if step % 4 else root) for step in range(0, 16, 2)]
        if kind == "offbeat":
            return [(step, 2, root) for step in range(2, 16, 4)]
        if kind == "long":
            return [(0, 15, root)]
        if kind == "halves":
            return [(0, 7, root), (8, 7, fifth if self.rng.random() < 0.6 else root)]
        if kind == "tumbao":
            return [(0, 3, root), (6, 5, fifth), (12, 4, self.pitch(following))]
        if kind == "walking":
            goal = self.pitch(following)
            near = goal + int(self.rng.choice([-1, 1, 2]))
            return [(0, 4, root), (4, 4, self.pitch(degree + 2)), (8, 4, fifth), (12, 4, near)]
        row = groove.get(KICK, "x...x...")
        kicks = [step for step, mark in enumerate(row) if mark != "."] or [0]
        gaps = [after - step for step, after in zip(kicks, [*kicks[1:], 16], strict=True)]
        tones = [root] + [int(self.rng.choice([root, root, fifth, octave])) for _ in kicks[1:]]
        return list(zip(kicks, gaps, tones, strict=True))

    def bass(self, kind: str) -> list[Note]:
        """Compose the bass part."""
        notes = []
        bars = self.bars("bass")
        for index, (section, bar, degree) in enumerate(bars):
            following = bars[(index + 1) % len(bars)][2]
            line = self.bass_line(kind, degree, following, section.groove)
            for step, length, semitones in line:
                pitch = 28 + (self.tonic + semitones - 28) % 12 + (12 if semitones >= 12 else 0)
                start = self.clock(bar, step)
                held = length * self.clock.step * self.rng.uniform(0.75, 0.98)
                notes.append(Note(start, start + held, pitch, self.velocity(section.energy)))
        return notes

    # ── the rest of the band ──

    def voicing(self, degree: int, low: int) -> list[int]:
        """Return the MIDI pitches of a chord in the octave above `low`."""
        tones = self.chord(degree, bool(self.rng.random() < self.style.sevenths))
        return sorted(low + (self.tonic + tone - low) % 12 for tone in tones)

    def comp(self, kind: str, low: int, role: str = "comp") -> list[Note]:
        """Compose chords: held, struck on a rhythm, strummed, or broken."""
        rhythm = [step for step in range(0, 16, 2) if step == 0 or self.rng.random() < 0.4]
        notes = []
        for section, bar, degree in self.bars(role):
            tones = self.voicing(degree, low)
            if kind == "held":
                plan = [(0, 15.5, tone, 0.0) for tone in tones]
            elif kind == "broken":
                pattern = [*tones, tones[0] + 12, *reversed(tones[1:])]
                plan = [(s, 3, pattern[s // 2 % len(pattern)], 0.0) for s in range(0, 16, 2)]
            else:
                delay = 0.018 if kind == "strum" else 0.0
                gaps = [after - s for s, after in zip(rhythm, [*rhythm[1:], 16], strict=True)]
                plan = [
                    (step, gap * (0.9 if kind == "strum" else 0.7), tone, delay * index)
                    for step, gap in zip(rhythm, gaps, strict=True)
                    for index, tone in enumerate(tones)
                ]
            for step, length, tone, late in plan:
                start = self.clock(bar, step) + late
                stop = start + length * self.clock.step
                notes.append(Note(start, stop, tone, self.velocity(section.energy, 0.85)))
        return notes

    def phrase(self, busy: float) -> list[tuple[int, int]]:
        """Draw (step, length) of the notes of two bars, with a rest at the end."""
        steps, at = [], int(self.rng.choice([0, 0, 2, 4]))
        end = 2 * STEPS - int(self.rng.choice([4, 6, 8]))
        while at < end:
            length = int(self.rng.choice([1, 2, 3, 4, 6, 8], p=self._lengths(busy)))
            steps.append((at, min(length, end - at + 2)))
            at += length + (2 if self.rng.random() < 0.12 else 0)
        return steps

    @staticmethod
    def _lengths(busy: float) -> list[float]:
        weights = np.array([0.5 * busy, 3 * busy, 1.0, 2.0, 1.0, 0.7])
        return list(weights / weights.sum())

    def line(self, role: str, low: int, busy: float) -> list[Note]:
        """Compose a melody of repeated two-bar phrases, in steps and small leaps near the chord."""
        motifs = [self.phrase(busy) for _ in range(3)]
        notes: list[Note] = []
        degree = int(self.rng.integers(0, 7))
        for index, (section, bar, chord) in enumerate(self.bars(role)):
            if index % 2:
                continue
            motif = motifs[int(self.rng.choice([0, 0, 1, 2]))]
            for step, length in motif:
                degree += int(self.rng.choice([-2, -1, -1, 0, 1, 1, 2]))
                if step % 8 == 0:  # strong beats take a tone of the chord
                    degree = chord + int(self.rng.choice([0, 2, 4]))
                degree = int(np.clip(degree, 0, 10))
                start = self.clock(bar, step)
                stop = start + length * self.clock.step * 0.97
                pitch = low + (self.tonic - low) % 12 + self.pitch(degree)
                notes.append(Note(start, stop, pitch, self.velocity(section.energy)))
        return notes

    def third_below(self, melody: list[Note]) -> list[Note]:
        """Compose the harmony voice of the choruses."""
        spans = [s for s in self.sections if s.name == "chorus"]
        bar = STEPS * self.clock.step
        below = []
        for note in melody:
            if any(s.first_bar <= note.start / bar < s.first_bar + s.bars for s in spans):
                tones = [(p - self.tonic) % 12 for p in (note.pitch - 3, note.pitch - 4)]
                drop = 3 if tones[0] in self.scale else 4
                below.append(Note(note.start, note.stop, note.pitch - drop, note.velocity))
        return below

    def other(self) -> list[Part]:
        """Compose the accompaniment."""
        rng, style = self.rng, self.style
        kind = str(rng.choice(["struck", "strum", "broken", "held"]))
        low = int(rng.integers(48, 58))
        pan = float(rng.uniform(0.1, 0.9) * rng.choice([-1, 1]))
        parts = [
            Part(program=int(rng.choice(style.comps)), notes=self.comp(kind, low), pan=pan),
            Part(program=int(rng.choice(style.pads)), notes=self.comp("held", 55, "pad"),
                 pan=float(rng.uniform(-0.3, 0.3)), gain_db=-5),
            Part(program=int(rng.choice(style.leads)), notes=self.line("lead", 64, 1.2),
                 pan=float(rng.uniform(-0.6, 0.6)), gain_db=-2),
        ]  # fmt: skip
        if rng.random() < 0.5:  # a second player opposite to the first
            second = str(rng.choice(["struck", "strum", "broken"]))
            program = int(rng.choice(style.comps))
            notes = self.comp(second, low + 7)
            parts.append(Part(program=program, notes=notes, pan=-pan, gain_db=-2))
        return parts


def compose(rng: Generator, seconds: float) -> Song:
    """Compose a song of `seconds` from the next numbers of the generator."""
    style = STYLES[str(rng.choice(list(STYLES)))]
    tempo = float(rng.uniform(*style.tempo))
    step = 60 / tempo / 4
    clock = Clock(step, style.swing, float(rng.uniform(0.001, 0.008)), rng)
    bars = int(np.ceil(seconds / (STEPS * step)))
    tonic = int(rng.integers(12))
    scale = MINOR if rng.random() < 0.45 else MAJOR
    sections = plan_sections(style, bars, rng)
    writer = Composer(rng, style, clock, tonic, scale, sections)
    drums = Part(program=int(rng.choice(style.kits)), notes=writer.drums(), drums=True)
    kind = str(rng.choice(style.bass_lines))
    bass = Part(program=int(rng.choice(style.basses)), notes=writer.bass(kind))
    other = writer.other()
    melody = writer.line(
        "vocals", int(rng.choice([43, 46, 50, 54, 57])), float(rng.uniform(0.4, 1.4))
    )
    harmony = writer.third_below(melody) if rng.random() < 0.45 else []
    parts = ((drums,), (bass,), tuple(other), tuple(melody), tuple(harmony))
    return Song(style, tempo, tonic, scale, seconds, sections, *parts)
