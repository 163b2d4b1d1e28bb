"""The player of the page as one HTML file with the stems inside, to open without a server."""

import html
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

_STATIC = Path(__file__).parent / "page"
_PIECE = 3 << 18
"""Bytes at a time; a multiple of three, so that pieces of base64 join."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header class="top"><div><h1>{title}</h1><p>{stems}</p></div></header>
<main class="card">
<div class="player"></div>
<p class="notice" role="alert" hidden>This browser cannot play these files; use wav or mp3.</p>
</main>
"""

_START = """
const root = document.querySelector(".player");
const blocks = [...document.querySelectorAll("script[data-stem]")];
const stems = blocks.map((block) => {
  const bytes = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
  block.remove();
  const url = URL.createObjectURL(new Blob([bytes]));
  const { stem, file } = block.dataset;
  return { name: stem, file, url, bytes: async () => bytes.buffer.slice(0) };
});
mountPlayer(root, stems, { title: document.title }).catch(() => {
  document.querySelector(".notice").hidden = false;
});
"""


def player_html(stems: Mapping[str, str | os.PathLike[str]], title: str = "stems") -> str:
    """A page that plays the files of `stems` in step, and needs nothing else."""
    return "".join(_parts({name: Path(path) for name, path in stems.items()}, title))


def write_player(
    path: Path, stems: Mapping[str, str | os.PathLike[str]], title: str = "stems"
) -> Path:
    """The same as a file, which appears complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_parts({name: Path(one) for name, one in stems.items()}, title))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _parts(stems: Mapping[str, Path], title: str) -> Iterator[str]:
    yield _HEAD.format(
        title=html.escape(title),
        style=(_STATIC / "style.css").read_text("utf-8"),
        stems=html.escape(", ".join(stems)),
    )
    for name, path in stems.items():
        names = f'data-stem="{html.escape(name)}" data-file="{html.escape(path.name)}"'
        yield f'<script type="text/plain" {names}>'
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield b64encode(piece).decode("ascii")
        yield "</script>\n"
    code = (_STATIC / "player.js").read_text("utf-8").replace("\nexport ", "\n")
    yield f'<script type="module">\n{code}{_START}</script>\n</body>\n</html>\n'
