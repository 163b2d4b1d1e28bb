"""Write the player of the page and the stems into one HTML file that needs no server.

Uncompressed stems are encoded to Opus for it: four stems of four minutes are 20 MB, not 210 MB.
"""

import html
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.writer import AudioWriter

_STATIC = Path(__file__).parent / "page"
_MODULES = ("texts.js", "stretch.js", "transport.js", "draw.js", "player.js")
"""The modules of the player; each needs only those before it."""

_IMPORT = re.compile(r"^import .*?;\n", re.MULTILINE | re.DOTALL)
_READ_BYTES = 3 << 18
"""Bytes per read; a multiple of three, so that the pieces of base64 can be joined."""

_COMPRESSED = {".mp3", ".ogg", ".opus", ".m4a"}
"""Suffixes of files that browsers play as they are; all others are encoded."""

_KILOBITS = 128
_BASE64_RATIO = 4 / 3

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
<header class="top"><div><h1>{title}</h1><p class="names"></p></div></header>
<main class="card">
<div class="player"><p class="status" role="status"></p></div>
<p class="notice" role="alert" data-text="unplayableFiles" hidden></p>
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
document.querySelector(".names").textContent = stems.map(({ name }) => nameOfStem(name)).join(", ");
document.querySelector(".status").textContent =
  t("loading", { stems: t("stemCount", { count: stems.length }) });
translate(document);
const showNotice = () => {
  document.querySelector(".notice").hidden = false;
  root.replaceChildren();
};
decodeStems(stems).then(({ stems: decoded, ...state }) => {
  mountPlayer(root, decoded, { ...state, title: document.title, onError: showNotice });
}).catch(showNotice);
"""


def write_player(
    path: Path, stems: Mapping[str, str | os.PathLike[str]], title: str = "stems"
) -> Path:
    """Write a page that plays `stems` to `path`; the file appears complete or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with (
            _compress({name: Path(stem) for name, stem in stems.items()}) as files,
            partial.open("w", encoding="utf-8") as page,
        ):
            page.writelines(_iter_html(files, title))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def estimate_size(stems: Mapping[str, str | os.PathLike[str]], seconds: float) -> int:
    """Return about how many bytes the page of stems of that length has."""
    paths = [Path(stem) for stem in stems.values()]
    copied = sum(path.stat().st_size for path in paths if path.suffix in _COMPRESSED)
    encoded = sum(path.suffix not in _COMPRESSED for path in paths)
    return round((copied + encoded * seconds * _KILOBITS * 1000 / 8) * _BASE64_RATIO)


@contextmanager
def _compress(stems: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield files that are small and that browsers play, by stem."""
    with TemporaryDirectory(prefix="demucs-infer-") as folder:
        files = {}
        for name, path in stems.items():
            files[name] = path
            if path.suffix not in _COMPRESSED:
                files[name] = Path(folder) / f"{path.stem}.opus"
                _encode(path, files[name])
        yield files


def _encode(source: Path, target: Path) -> None:
    reader = AudioReader(source)
    info = reader.info
    with AudioWriter(target, info.sample_rate, info.channels, bitrate=_KILOBITS) as writer:
        for block in reader.blocks():
            writer.write(block)


def _iter_html(stems: Mapping[str, Path], title: str) -> Iterator[str]:
    yield _HTML_HEAD.format(
        title=html.escape(title),
        style=(_STATIC / "style.css").read_text("utf-8"),
    )
    for name, path in stems.items():
        attributes = f'data-stem="{html.escape(name)}" data-file="{html.escape(path.name)}"'
        yield f'<script type="text/plain" {attributes}>'
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                yield b64encode(data).decode("ascii")
        yield "</script>\n"
    code = "".join(map(_read_module, _MODULES))
    yield f'<script type="module">\n{code}{_SCRIPT}</script>\n</body>\n</html>\n'


def _read_module(name: str) -> str:
    """Return a module as part of a script that has all modules."""
    code = _IMPORT.sub("", (_STATIC / name).read_text("utf-8"))
    return code.replace("\nexport ", "\n")
