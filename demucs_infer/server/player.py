"""Write the player of the page and the stems into one HTML file that needs no server."""

import html
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path

_STATIC = Path(__file__).parent / "page"
_READ_BYTES = 3 << 18
"""Bytes per read; a multiple of three, so that the pieces of base64 can be joined."""

_HTML_HEAD = """<!doctype html>
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

_SCRIPT = """
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


def write_player(
    path: Path, stems: Mapping[str, str | os.PathLike[str]], title: str = "stems"
) -> Path:
    """Write a page that plays `stems` to `path`; the file appears complete or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_iter_html({name: Path(stem) for name, stem in stems.items()}, title))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _iter_html(stems: Mapping[str, Path], title: str) -> Iterator[str]:
    yield _HTML_HEAD.format(
        title=html.escape(title),
        style=(_STATIC / "style.css").read_text("utf-8"),
        stems=html.escape(", ".join(stems)),
    )
    for name, path in stems.items():
        attributes = f'data-stem="{html.escape(name)}" data-file="{html.escape(path.name)}"'
        yield f'<script type="text/plain" {attributes}>'
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                yield b64encode(data).decode("ascii")
        yield "</script>\n"
    code = (_STATIC / "player.js").read_text("utf-8").replace("\nexport ", "\n")
    yield f'<script type="module">\n{code}{_SCRIPT}</script>\n</body>\n</html>\n'
