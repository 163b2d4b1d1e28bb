"""Draw stems and scores as SVG and PNG, without a plotting library.

matplotlib would be a large dependency for three kinds of pictures, and cannot write HTML pages.
Shapes: C channels, T samples, F bands, N columns.
"""

import html
import math
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles

import torch
from torch import Tensor

_HUES = {"drums": 345, "bass": 38, "other": 160, "vocals": 232, "guitar": 18, "piano": 286}
_OTHER_HUES = (200, 80, 310, 130, 260, 50, 0, 180)
_FFT_SIZE = 4096
_LOWEST_HERTZ = 40.0
_DYNAMIC_RANGE = 80.0
"""Decibels between black and the brightest color."""

_NUMBER = re.compile(r"-?[\d.]*")
"""A number, or a dash or nothing in its place."""

_NUM_COLORS = 48
"""Steps of the color map: fewer make smaller files."""

_COLORS = torch.tensor(
    [(0, 0, 4), (43, 14, 92), (120, 28, 109), (196, 60, 78), (245, 125, 21), (252, 255, 164)]
)
"""A color map that becomes steadily lighter, so that it can also be read in grayscale."""


def find_hue(stem: str, index: int) -> int:
    """Return the hue of a stem in degrees, the same as in the player of the server."""
    return _HUES.get(stem, _OTHER_HUES[index % len(_OTHER_HUES)])


def measure_peaks(samples: Tensor, columns: int) -> list[float]:
    """Cut (C, T) into up to `columns` equal parts; return the largest absolute sample of each."""
    track = samples.abs().amax(0)
    step = max(1, math.ceil(len(track) / columns))
    return [float(part.max()) for part in track.split(step)]


def draw_waveform(
    samples: Tensor, *, hue: int = 232, width: int = 600, height: int = 48, top: float | None = None
) -> str:
    """Return an SVG of the waveform (C, T); `top` is the amplitude at the edge of the picture."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="waveform">'
        f"{_waveform_path(samples, hue, width, height, top)}</svg>"
    )


def _waveform_path(
    samples: Tensor, hue: int, width: int, height: int, top: float | None = None
) -> str:
    peaks = measure_peaks(samples, max(1, width // 2))
    scale = top or max(*peaks, 0.05)
    step, middle = width / len(peaks), height / 2
    bars = (
        f"M{(index + 0.5) * step:.1f} {middle - size:.1f}V{middle + size:.1f}"
        for index, peak in enumerate(peaks)
        for size in (max(0.5, peak / scale * middle * 0.94),)
    )
    return (
        f'<path d="{"".join(bars)}" stroke="hsl({hue} 65% 52%)" stroke-width="{step * 0.7:.2f}"/>'
    )


def measure_spectrogram(
    samples: Tensor, sample_rate: int, *, bands: int = 96, columns: int = 480
) -> Tensor:
    """Return decibels below the loudest point: (C, T) -> (F, N), low frequencies first.

    The bands are spaced logarithmically from 40 Hz to half the sample rate.
    """
    track = samples.mean(0)
    track = torch.nn.functional.pad(track, (0, max(0, _FFT_SIZE - len(track))))
    hop = max(1, (len(track) - _FFT_SIZE) // max(1, columns - 1))
    power = (
        torch.stft(
            track, _FFT_SIZE, hop, window=torch.hann_window(_FFT_SIZE), return_complex=True,
            center=False,
        )
        .abs()
        .square()[:, :columns]
    )  # fmt: skip
    edges = torch.logspace(math.log10(_LOWEST_HERTZ), math.log10(sample_rate / 2), bands + 1)
    bins = (edges / sample_rate * _FFT_SIZE).round().long().clamp(max=_FFT_SIZE // 2)
    rows = [power[low : max(low + 1, high)].mean(0) for low, high in zip(bins, bins[1:])]
    decibels = 10 * torch.log10(torch.stack(rows) + 1e-12)
    return decibels - decibels.max()


def draw_spectrogram(
    samples: Tensor, sample_rate: int, *, bands: int = 96, columns: int = 480
) -> bytes:
    """Return a PNG of the spectrogram (C, T), low frequencies at the bottom."""
    decibels = measure_spectrogram(samples, sample_rate, bands=bands, columns=columns)
    place = torch.linspace(0, len(_COLORS) - 1, _NUM_COLORS)
    below = place.floor().long().clamp(max=len(_COLORS) - 2)
    share = (place - below)[:, None]
    palette = _COLORS[below] * (1 - share) + _COLORS[below + 1] * share
    levels = (1 + decibels / _DYNAMIC_RANGE).clamp(0, 1) * (_NUM_COLORS - 1)
    return encode_png(levels.flip(0).round().to(torch.uint8), palette.round().to(torch.uint8))


def encode_png(pixels: Tensor, palette: Tensor) -> bytes:
    """Encode pixels (rows, columns), which are indices of the colors of a palette, as a PNG."""
    rows, columns = pixels.shape
    lines = b"".join(b"\0" + bytes(row.tolist()) for row in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(palette.flatten().tolist())),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def draw_stems(stems: Mapping[str, Tensor], sample_rate: int, title: str = "") -> str:
    """Return an SVG with the waveform and the spectrogram of each stem (C, T), one row per stem."""
    width, wave, picture, gap, head = 640, 56, 96, 14, 30
    row = wave + picture + gap
    top = max(0.05, *(float(stem.abs().max()) for stem in stems.values()))
    seconds = max(stem.shape[-1] for stem in stems.values()) / sample_rate
    left = 84
    parts = []
    for index, (name, samples) in enumerate(stems.items()):
        y, hue = head + index * row, find_hue(name, index)
        png = b64encode(draw_spectrogram(samples, sample_rate)).decode("ascii")
        parts.append(
            f'<text x="8" y="{y + wave / 2 + 5}" font-weight="bold" fill="hsl({hue} 65% 42%)">'
            f"{html.escape(name)}</text>"
            f'<g transform="translate({left} {y})">'
            f"{_waveform_path(samples, hue, width, wave, top)}"
            f'<image y="{wave}" width="{width}" height="{picture}" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{png}"/></g>'
            f'<text x="{left - 8}" y="{y + wave + 12}" class="axis" text-anchor="end">'
            f"{sample_rate / 2000:g} kHz</text>"
            f'<text x="{left - 8}" y="{y + wave + picture - 2}" class="axis" text-anchor="end">'
            f"{_LOWEST_HERTZ:g} Hz</text>"
        )
    height = head + len(stems) * row + 12
    ticks = "".join(
        f'<text x="{left + width * share:g}" y="{height - 6}" class="axis" text-anchor="middle">'
        f"{_format_clock(seconds * share)}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24} {height}" '
        f'font-family="sans-serif" font-size="14"><style>.axis{{font-size:11px;fill:#777}}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="20">{html.escape(title)}</text>{"".join(parts)}{ticks}</svg>\n'
    )


def _format_clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def draw_boxplot(groups: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return an SVG with one box per group: quartiles, median, range, and every value as a dot."""
    values = [value for group in groups.values() for value in group if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = math.floor(low - 0.5), math.ceil(high + 0.5)
    left, width, row = 90, 520, 34

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * width

    parts = []
    for index, (name, group) in enumerate(groups.items()):
        y, hue = 12 + index * row + row / 2, find_hue(name, index)
        numbers = sorted(value for value in group if math.isfinite(value))
        label = html.escape(name)
        parts.append(f'<text x="{left - 8}" y="{y + 5}" text-anchor="end">{label}</text>')
        if not numbers:
            continue
        first, _, third = quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3
        first, third = max(first, numbers[0]), min(third, numbers[-1])
        color = f"hsl({hue} 65% 52%)"
        parts.append(
            f'<path d="M{x(numbers[0]):.1f} {y}H{x(numbers[-1]):.1f}" stroke="{color}"/>'
            f'<rect x="{x(first):.1f}" y="{y - 9}" width="{max(1, x(third) - x(first)):.1f}" '
            f'height="18" fill="{color}" fill-opacity=".25" stroke="{color}"/>'
            f'<path d="M{x(median(numbers)):.1f} {y - 9}v18" stroke="{color}" stroke-width="3"/>'
        )
        parts += [
            f'<circle cx="{x(value):.1f}" cy="{y}" r="2.5" fill="{color}"/>' for value in numbers
        ]
    bottom = 12 + len(groups) * row
    ticks = _choose_ticks(low, high)
    parts += [
        f'<path d="M{x(tick):.1f} 12V{bottom}" stroke="#8884" />'
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    parts.append(
        f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">{unit}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {bottom + 42}" '
        f'font-family="sans-serif" font-size="13" fill="currentColor" role="img" '
        f'aria-label="{html.escape(unit)}">{"".join(parts)}</svg>'
    )


def draw_line(points: Iterable[tuple[float, float]], label: str) -> str:
    """Return an SVG of a curve with both axes from zero, their largest values, and a label."""
    curve = [*points]
    width, height, left = 560, 160, 60
    right = max((x for x, _ in curve), default=1.0) or 1.0
    top = max((y for _, y in curve), default=1.0) or 1.0
    places = " ".join(
        f"{left + x / right * width:.1f},{12 + height - y / top * height:.1f}" for x, y in curve
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height + 50}" '
        f'font-family="sans-serif" font-size="13" fill="currentColor" role="img" '
        f'aria-label="{html.escape(label)}">'
        f'<path d="M{left} 12v{height}h{width}" fill="none" stroke="#888"/>'
        f'<polyline points="{places}" fill="none" stroke="hsl(232 65% 52%)" stroke-width="2"/>'
        f'<text x="{left - 6}" y="18" text-anchor="end">{top:.3g}</text>'
        f'<text x="{left + width}" y="{height + 28}" text-anchor="end">{right:.3g} s</text>'
        f'<text x="{left}" y="{height + 44}">{html.escape(label)}</text></svg>'
    )


def _choose_ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1e9) if (high - low) / step <= 10)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def make_page(title: str, parts: Iterable[str]) -> str:
    """Return a complete HTML page, which is light or dark like the system of its reader."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem .8rem; border-bottom: 1px solid #8884; }}
.number {{ text-align: right; }}
svg {{ max-width: 45rem; width: 100%; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def make_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table; every cell is escaped. Columns of numbers are aligned on the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    shapes = [
        " class=number" if all(_NUMBER.fullmatch(row[at]) for row in texts) else ""
        for at in range(len(header))
    ]
    head = "".join(
        f"<th{shape}>{html.escape(cell)}</th>" for shape, cell in zip(shapes, header, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{shape}>{html.escape(cell)}</td>" for shape, cell in zip(shapes, row, strict=True)
        )
        + "</tr>\n"
        for row in texts
    )
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}'
        "</tbody></table></div>"
    )
