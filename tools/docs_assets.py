"""Make the pictures and sounds of README and docs, from real runs.

python -m tools.docs_assets chart            # bars of speed and memory, from results.json
python -m tools.docs_assets listen           # songs of the demo, their stems and spectrograms
python -m tools.docs_assets terminal         # a recording of `demucs-infer --demo`
python -m tools.docs_assets page             # the page of the server, light and dark
python -m tools.docs_assets windows          # how windows overlap
"""

from __future__ import annotations

import argparse
import fcntl
import html
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs/assets"
BENCH = ROOT / "tests/bench/results.json"
SONGS = {"demo": 0, "second": 3, "third": 7}
"""Seeds of the songs to listen to, by name."""

_SECONDS = 8.0
_KILOBITS = 64
_COLUMNS, _ROWS = 84, 14
_ACCENT, _GRAY = "#6a5cff", "#9a9aa8"


# ── chart ──


def make_chart() -> str:
    """Return bars of speed, as multiples of real time, and of peak memory."""
    bench = json.loads(BENCH.read_text("utf-8"))
    charts = (("speed, × real time (longer is better)", "speed"), ("peak memory, MiB", "peak_mib"))
    row, left, width = 34, 250, 360
    others = list(dict.fromkeys(name for case in bench["cases"] for name in case.get("others", ())))
    colors = (_ACCENT, _GRAY, *("#c9b8f5", "#5f5f6e", "#d6a44c")[: len(others)])
    parts, y = [], 18
    for title, key in charts:
        parts.append(f'<text x="0" y="{y}" font-weight="bold">{title}</text>')
        y += 12
        bars = [_list_bars(case, key, others) for case in bench["cases"]]
        top = max(value for values in bars for value in values if value)
        for case, values in zip(bench["cases"], bars, strict=True):
            parts.append(f'<text x="0" y="{y + 18}">{html.escape(case["name"])}</text>')
            pairs = [pair for pair in zip(values, colors, strict=True) if pair[0]]
            for place, (value, color) in enumerate(pairs):
                bar = value / top * width
                parts.append(
                    f'<rect x="{left}" y="{y + 4 + place * 12}" width="{bar:.1f}" height="10" '
                    f'rx="2" fill="{color}"/><text x="{left + bar + 6:.1f}" '
                    f'y="{y + 13 + place * 12}" font-size="11">{value:g}</text>'
                )
            y += row + 12 * (len(pairs) - 2)
        y += 26
    names = ("demucs-infer", bench["peer"], *others)
    legend = "".join(
        f'<rect x="{140 * place}" y="{y - 8}" width="12" height="10" fill="{color}"/>'
        f'<text x="{140 * place + 18}" y="{y + 1}">{html.escape(name)}</text>'
        for place, (name, color) in enumerate(zip(names, colors, strict=True))
    )
    legend += f'<text x="0" y="{y + 24}" font-size="11">{html.escape(bench["machine"])}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -6 700 {y + 44}" '
        'font-family="system-ui, sans-serif" font-size="13"><style>text{fill:#1c1a28}'
        ".back{fill:#fff}@media (prefers-color-scheme:dark){text{fill:#f1f0f8}.back{fill:#131220}}"
        f'</style><rect class="back" x="-12" y="-6" width="700" height="{y + 44}" rx="12"/>'
        f"{''.join(parts)}{legend}</svg>\n"
    )


def _list_bars(case: dict[str, Any], key: str, others: list[str]) -> list[float]:
    """Return the values of all programs in a case; 0 for one that was not measured."""
    measured = case.get("others", {})
    return [*case[key], *(measured[name][key] if name in measured else 0 for name in others)]


# ── listen ──


def make_listening() -> None:
    """Write the songs, their stems by `tiny`, and a spectrogram of each."""
    from demucs_infer import Separator
    from demucs_infer.audio.writer import AudioWriter
    from demucs_infer.demo import song
    from demucs_infer.pictures import draw_spectrogram

    folder = ASSETS / "listen"
    folder.mkdir(parents=True, exist_ok=True)
    separator = Separator("tiny", device="cpu")
    for name, seed in SONGS.items():
        piece = song(_SECONDS, seed)
        stems = {"mixture": piece.mix, **separator.run(piece.mix).outputs}
        for stem, samples in stems.items():
            path = folder / f"{name}-{stem}"
            quiet = samples / max(1.0, float(samples.abs().max()))
            with AudioWriter(
                path.with_suffix(".mp3"), piece.sample_rate, len(samples), bitrate=_KILOBITS
            ) as writer:
                writer.write(quiet)
            picture = draw_spectrogram(samples, piece.sample_rate, bands=72, columns=240)
            path.with_suffix(".png").write_bytes(picture)


# ── terminal ──


def record(words: list[str], folder: Path) -> list[tuple[float, str]]:
    """Run a command in a terminal, and return what its screen showed, with times."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvp(sys.executable, [sys.executable, "-m", "demucs_infer", *words])
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    start, text = time.monotonic(), ""
    screens = []
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # the command has ended
            break
        if not data:
            break
        text += data.decode("utf-8", "replace")
        screens.append((time.monotonic() - start, render(text)))
    os.waitpid(pid, 0)
    os.close(master)
    return screens


def render(text: str) -> str:
    """Return the lines that a terminal shows after `text`; a carriage return starts a line anew."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n"))
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def make_recording() -> str:
    """Return an animated SVG of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        screens = record(["--demo", "--progress", "bar"], Path(folder))
    prompt = "$ demucs-infer --demo"
    frames = [(0.0, prompt)]
    for seconds, screen in screens:
        if seconds - frames[-1][0] > 0.15:
            frames.append((seconds, f"{prompt}\n{screen}"))
    frames.append((screens[-1][0], f"{prompt}\n{screens[-1][1]}\n$ "))
    total = frames[-1][0] + 4.0
    height = 20 * (2 + max(len(screen.splitlines()) for _, screen in frames)) + 24
    groups = []
    for index, (start, screen) in enumerate(frames):
        is_last = index == len(frames) - 1
        end = total if is_last else frames[index + 1][0]
        lines = "".join(
            f'<text x="16" y="{54 + 20 * row}" xml:space="preserve">{html.escape(line)}</text>'
            for row, line in enumerate(screen.splitlines())
        )
        # A value holds until the next key time. Where nothing moves, only the last frame is seen.
        times = {0.0: 0, start / total: 1} | ({} if is_last else {end / total: 0})
        values = (
            f'values="{";".join(map(str, times.values()))}" '
            f'keyTimes="{";".join(f"{moment:.4f}" for moment in times)}"'
        )
        animate = (
            f'<animate attributeName="opacity" calcMode="discrete" {values} dur="{total:.1f}s" '
            'repeatCount="indefinite"/>'
        )
        groups.append(f'<g opacity="{int(is_last)}">{animate}{lines}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" fill="#e8e6f5">'
        f'<rect width="760" height="{height}" rx="10" fill="#15132a"/>'
        '<g fill="#ff5f57"><circle cx="20" cy="18" r="5"/></g><circle cx="38" cy="18" r="5" '
        'fill="#febc2e"/><circle cx="56" cy="18" r="5" fill="#28c840"/>'
        f"{''.join(groups)}</svg>\n"
    )


# ── page ──


def photograph_page() -> None:
    """Separate the demo song on the page of a real server, and take pictures of it."""
    from playwright.sync_api import sync_playwright

    from demucs_infer.audio.writer import save_audio
    from demucs_infer.demo import song

    with tempfile.TemporaryDirectory() as folder:
        piece = song(_SECONDS)
        track = Path(folder, "demo song.wav")
        save_audio(piece.mix, track, piece.sample_rate)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = ["serve", "--models", "tiny", "--port", str(port), "--data-dir", folder]
        server = subprocess.Popen([sys.executable, "-m", "demucs_infer", *words])
        try:
            _wait_for(port)
            with sync_playwright() as play:
                browser = play.chromium.launch(
                    executable_path="/usr/bin/chromium", args=["--no-sandbox"]
                )
                for scheme in ("light", "dark"):
                    _photograph(browser, scheme, f"http://127.0.0.1:{port}/", track)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server did not start")


def _photograph(browser: Any, scheme: str, url: str, track: Path) -> None:
    context = browser.new_context(
        viewport={"width": 900, "height": 640}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    page.set_input_files("#files", str(track))
    page.wait_for_selector(".stems canvas", timeout=120_000)
    page.locator(".seek").fill("3.2")
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(300)
    page.locator(".song").first.screenshot(path=str(ASSETS / f"page-{scheme}.png"))
    context.close()


# ── windows ──


def draw_windows() -> str:
    """Return a picture of five windows that overlap by a quarter, and of the weights' sum."""
    from demucs_infer.engine.plan import plan_chunks

    chunks = plan_chunks(22, segment=8, stride=6, window=lambda _: 8)
    scale, left = 26, 90
    parts = []
    for index, chunk in enumerate(chunks):
        y = 46 + 30 * index
        parts.append(
            f'<path d="M{left + chunk.start * scale} {y + 20}L{left + (chunk.start + 4) * scale} '
            f'{y}L{left + min(chunk.start + 8, 22) * scale} {y + 20}z" fill="{_ACCENT}" '
            f'fill-opacity=".35" stroke="{_ACCENT}"/><text x="0" y="{y + 16}">window '
            f"{index + 1}</text>"
        )
    bottom = 46 + 30 * len(chunks) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 700 {bottom + 50}" '
        'font-family="system-ui, sans-serif" font-size="13"><style>text{fill:#1c1a28}'
        ".back{fill:#fff}@media (prefers-color-scheme:dark){text{fill:#f1f0f8}.back{fill:#131220}}"
        f'</style><rect class="back" x="-10" width="700" height="{bottom + 50}" rx="12"/>'
        f'<text x="0" y="28">track</text><rect x="{left}" y="14" width="{22 * scale}" height="18" '
        f'fill="{_GRAY}" fill-opacity=".5"/>{"".join(parts)}'
        f'<text x="0" y="{bottom + 14}">result</text>'
        f'<rect x="{left}" y="{bottom}" width="{22 * scale}" height="18" fill="{_ACCENT}"/>'
        f'<text x="{left}" y="{bottom + 38}">Outputs that overlap are weighted by the '
        "triangles, and divided by their sum.</text></svg>\n"
    )


def main() -> None:
    """Make the parts that are named, or all."""
    makers = {
        "chart": lambda: (ASSETS / "bench.svg").write_text(make_chart(), "utf-8"),
        "listen": make_listening,
        "terminal": lambda: (ASSETS / "terminal.svg").write_text(make_recording(), "utf-8"),
        "page": photograph_page,
        "windows": lambda: (ASSETS / "windows.svg").write_text(draw_windows(), "utf-8"),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*makers, []], metavar="PART")
    ASSETS.mkdir(parents=True, exist_ok=True)
    for part in parser.parse_args().parts or makers:
        makers[part]()


if __name__ == "__main__":
    main()
