"""What a style of music is made of: tempo, grooves, chords and the instruments that play it.

A groove is one bar of sixteen steps a drum: `x` a hit, `o` a quiet one, `.` none.
"""

from __future__ import annotations

from dataclasses import dataclass

KICK, SIDE, SNARE, CLAP = 36, 37, 38, 39
CLOSED, PEDAL, OPEN, CRASH, RIDE = 42, 44, 46, 49, 51
TAMBOURINE, SHAKER, CLAVES, CONGA, LOW_CONGA, COWBELL = 54, 70, 75, 63, 64, 56
TOMS = (50, 48, 47, 45, 43, 41)

Groove = dict[int, str]

EIGHTHS = "x.x.x.x.x.x.x.x."
OFFBEATS = "..x...x...x...x."
SIXTEENTHS = "xoxoxoxoxoxoxoxo"
BACKBEAT = "....x.......x..."

GROOVES: dict[str, tuple[Groove, ...]] = {
    "rock": (
        {KICK: "x.......x.x.....", SNARE: BACKBEAT, CLOSED: EIGHTHS},
        {KICK: "x..x....x..x..x.", SNARE: BACKBEAT, CLOSED: EIGHTHS},
        {KICK: "x.x.....x.x...x.", SNARE: "....x.......x..o", RIDE: "x...x...x...x..."},
        {KICK: "x...x...x...x...", SNARE: BACKBEAT, OPEN: "x...x...x...x..."},
    ),
    "dance": (
        {KICK: "x...x...x...x...", CLAP: BACKBEAT, OPEN: OFFBEATS},
        {KICK: "x...x...x...x...", SNARE: BACKBEAT, CLOSED: SIXTEENTHS, SHAKER: SIXTEENTHS},
        {KICK: "x...x...x...x..x", CLAP: BACKBEAT, OPEN: OFFBEATS, TAMBOURINE: EIGHTHS},
    ),
    "funk": (
        {KICK: "x..x..x...x..x..", SNARE: "....x..o.o..x..o", CLOSED: SIXTEENTHS},
        {KICK: "x.x....x..x.....", SNARE: "....x..o.o.ox...", CLOSED: "x.x.x.x.x.xox.x."},
        {
            KICK: "x..x....x.x..x..",
            SNARE: "o...x..o.o..x.o.",
            OPEN: "......x.......x.",
            CLOSED: EIGHTHS,
        },
    ),
    "ballad": (
        {KICK: "x.......x.......", SIDE: BACKBEAT, CLOSED: EIGHTHS},
        {KICK: "x.........x.....", SNARE: "........x.......", CLOSED: EIGHTHS},
        {KICK: "x......xx.......", SNARE: BACKBEAT, RIDE: EIGHTHS},
    ),
    "latin": (
        {KICK: "x..xx..xx..xx..x", SIDE: "x..x..x...x.x...", SHAKER: SIXTEENTHS},
        {
            KICK: "x..x..x.x..x..x.",
            CONGA: "..x...xx..x...xx",
            LOW_CONGA: "...x.......x....",
            CLAVES: "x..x..x...x.x...",
        },
        {
            KICK: "x...x...x...x...",
            SNARE: "...x..x....x..x.",
            CLOSED: EIGHTHS,
            COWBELL: "x...x...x...x...",
        },
    ),
    "hiphop": (
        {KICK: "x......x..x.....", SNARE: BACKBEAT, CLOSED: EIGHTHS},
        {KICK: "x..x......xx....", CLAP: BACKBEAT, CLOSED: "x.xox.x.x.xxxox."},
        {
            KICK: "x.....x...x..x..",
            SNARE: "....x.......x..o",
            CLOSED: "x.x.x.xxx.x.x.x.",
            OPEN: "..............x.",
        },
    ),
    "jazz": (
        {
            KICK: "x.......x.......",
            PEDAL: BACKBEAT,
            RIDE: "x...x.x.x...x.x.",
            SNARE: ".......o......o.",
        },
        {
            KICK: "x.....o...x.....",
            PEDAL: BACKBEAT,
            RIDE: "x...x.x.x...x.x.",
            SIDE: "............x...",
        },
    ),
    "metal": (
        {KICK: "x.xxx.xxx.xxx.xx", SNARE: BACKBEAT, CRASH: "x...............", RIDE: EIGHTHS},
        {KICK: "xxxxxxxxxxxxxxxx", SNARE: "........x.......", OPEN: "x...x...x...x..."},
        {KICK: "x..x..x.x..x..x.", SNARE: BACKBEAT, OPEN: EIGHTHS},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Ranges that a song of this style is drawn from; programs are General MIDI's, from zero."""

    tempo: tuple[int, int]
    grooves: tuple[Groove, ...]
    kits: tuple[int, ...]
    basses: tuple[int, ...]
    bass_lines: tuple[str, ...]
    comps: tuple[int, ...]
    pads: tuple[int, ...]
    leads: tuple[int, ...]
    sevenths: float = 0.1
    """How often a chord has a seventh."""
    swing: float = 0.0
    """How late every second eighth's half comes, as a part of a step."""


STYLES: dict[str, Style] = {
    "pop": Style(
        tempo=(88, 128),
        grooves=GROOVES["rock"] + GROOVES["dance"],
        kits=(0, 8, 16, 24),
        basses=(33, 34, 38, 39),
        bass_lines=("eighths", "kick", "long"),
        comps=(0, 1, 4, 5, 25, 27),
        pads=(48, 50, 88, 89, 90),
        leads=(80, 81, 11, 65, 27),
    ),
    "rock": Style(
        tempo=(95, 150),
        grooves=GROOVES["rock"],
        kits=(0, 8, 16),
        basses=(33, 34, 36),
        bass_lines=("eighths", "kick"),
        comps=(29, 30, 27, 26, 18),
        pads=(16, 18, 48),
        leads=(29, 30, 27, 81),
    ),
    "dance": Style(
        tempo=(112, 135),
        grooves=GROOVES["dance"],
        kits=(24, 25, 16),
        basses=(38, 39, 87),
        bass_lines=("offbeat", "octaves", "sixteenths"),
        comps=(4, 81, 62, 2, 90),
        pads=(50, 51, 89, 90, 94),
        leads=(80, 81, 84, 87),
    ),
    "funk": Style(
        tempo=(92, 116),
        grooves=GROOVES["funk"],
        kits=(0, 8),
        basses=(36, 37, 33, 38),
        bass_lines=("kick", "octaves", "sixteenths"),
        comps=(4, 7, 27, 28, 16),
        pads=(17, 48, 50),
        leads=(56, 65, 61, 66, 80),
        sevenths=0.7,
    ),
    "ballad": Style(
        tempo=(60, 84),
        grooves=GROOVES["ballad"],
        kits=(0, 40, 16),
        basses=(32, 33, 35),
        bass_lines=("long", "halves"),
        comps=(0, 24, 25, 4, 46),
        pads=(48, 49, 51, 89, 91),
        leads=(40, 73, 71, 65, 24),
        sevenths=0.3,
    ),
    "latin": Style(
        tempo=(90, 132),
        grooves=GROOVES["latin"],
        kits=(0, 8, 40),
        basses=(32, 33, 35),
        bass_lines=("tumbao", "halves"),
        comps=(0, 24, 25, 12, 26),
        pads=(48, 21, 89),
        leads=(56, 73, 64, 12, 24),
        sevenths=0.5,
    ),
    "hiphop": Style(
        tempo=(78, 100),
        grooves=GROOVES["hiphop"],
        kits=(25, 24, 8, 16),
        basses=(38, 39, 33),
        bass_lines=("kick", "long"),
        comps=(4, 5, 11, 0, 108),
        pads=(48, 50, 89, 92, 95),
        leads=(80, 11, 73, 75, 81),
        sevenths=0.4,
        swing=0.18,
    ),
    "jazz": Style(
        tempo=(96, 160),
        grooves=GROOVES["jazz"],
        kits=(32, 40),
        basses=(32, 35),
        bass_lines=("walking",),
        comps=(0, 1, 26, 4, 11),
        pads=(48, 61, 17),
        leads=(65, 66, 56, 71, 57),
        sevenths=0.9,
        swing=0.6,
    ),
    "metal": Style(
        tempo=(110, 165),
        grooves=GROOVES["metal"],
        kits=(16, 8),
        basses=(34, 33),
        bass_lines=("eighths", "sixteenths", "kick"),
        comps=(29, 30),
        pads=(48, 18, 49),
        leads=(30, 29, 81),
    ),
}

PROGRESSIONS = (  # degrees of the scale, one a bar
    (0, 4, 5, 3), (5, 3, 0, 4), (0, 5, 3, 4), (0, 3, 4, 3), (1, 4, 0, 0), (0, 0, 3, 4),
    (0, 2, 3, 4), (5, 4, 3, 4), (0, 6, 3, 0), (3, 4, 2, 5), (1, 4, 0, 5), (0, 4, 1, 3),
    (0, 0, 0, 0, 3, 3, 0, 0, 4, 3, 0, 4), (0, 4, 5, 2, 3, 0, 3, 4),
)  # fmt: skip
