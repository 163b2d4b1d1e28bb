"""The tools of `demucs-infer mcp`.

What an agent asks for may come from a text that it has read. It therefore reads and writes files of
one folder only, replaces none, and uses models of the catalog, not files or addresses.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import anyio
from anyio import from_thread, to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from demucs_infer import __version__
from demucs_infer.api import Separator
from demucs_infer.audio.reader import probe
from demucs_infer.errors import DemucsError, format_error
from demucs_infer.events import ChunkProcessed
from demucs_infer.metrics import evaluate
from demucs_infer.options import Format, StemOptions
from demucs_infer.pretrained import DEFAULT_MODEL, list_models, model_info
from demucs_infer.results import SeparatedFiles

_INSTRUCTIONS = (
    "Separates music into stems, such as vocals and drums, with the Demucs networks, on this "
    "machine. Paths are relative to one folder. The first use of a model downloads it."
)


class Toolbox:
    """The tools, with the folder and the models that they may use."""

    def __init__(self, root: Path, repo: Path | None = None, device: str = "auto") -> None:
        self._root = root
        self._repo = repo
        self._device = device
        self._turn = anyio.Lock()
        self._separator: tuple[str, Separator] | None = None

    def list_models(self) -> list[dict[str, Any]]:
        """List the models: name, stems, bytes, whether it is downloaded, license."""
        if self._repo is not None:
            return [{"name": name} for name in self._list_names()]
        entries = []
        for name in self._list_names():
            info = model_info(name)
            entries.append(
                {
                    "name": name,
                    "stems": list(info.stems or ()),
                    "bytes": info.size,
                    "is_downloaded": info.is_cached,
                    "license": info.license,
                    "is_default": name == DEFAULT_MODEL,
                }
            )
        return entries

    def inspect_file(self, path: str) -> dict[str, Any]:
        """Read the headers of an audio file: duration, sample rate, channels, codec, tags."""
        with _report_errors():
            info = probe(self._find_file(path))
        return {
            "duration_seconds": info.duration_seconds,
            "sample_rate": info.sample_rate,
            "channels": info.channels,
            "bits": info.bits,
            "codec": info.codec,
            "container": info.container,
            "tags": dict(info.tags),
        }

    async def separate(
        self,
        path: str,
        output_folder: str,
        context: Context,
        model: str = DEFAULT_MODEL,
        stems: list[str] | None = None,
        two_stems: str | None = None,
        format: str = "wav",
    ) -> dict[str, Any]:
        """Separate a track into stems, one file each, in a folder that is new or empty.

        `stems` are those to write (default: all of the model); or `two_stems`, such as "vocals",
        for this one and the sum of all others, `no_vocals`.
        """
        source, folder = self._find_file(path), self._resolve(output_folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ToolError(f"{output_folder} exists and is not an empty folder: choose another")
        if format not in get_args(Format):
            raise ToolError(f"format {format!r}: expected one of {', '.join(get_args(Format))}")
        async with self._turn:
            with _report_errors():
                choice = StemOptions(stems=tuple(stems) if stems else None, two_stems=two_stems)
                work = partial(self._separate, source, folder, model, choice, format, context)
                files = await to_thread.run_sync(work)
        return {
            "model": model,
            "stems": {
                stem: file.relative_to(self._root).as_posix()
                for stem, file in files.paths.items()
                if file is not None
            },
            "seconds": round(files.seconds, 2),
            "warnings": list(files.warnings),
        }

    def _separate(
        self,
        source: Path,
        folder: Path,
        model: str,
        stems: StemOptions,
        format: Any,
        context: Context,
    ) -> SeparatedFiles:
        separator = self._open(model)
        separator.update_parameter(stems=stems.stems, two_stems=stems.two_stems)
        events = separator.stream_to(source, folder, format)
        try:
            for event in events:
                from_thread.check_cancelled()
                if isinstance(event, SeparatedFiles):
                    return event
                if isinstance(event, ChunkProcessed):
                    from_thread.run(context.report_progress, event.fraction, 1.0)
        finally:
            events.close()
        raise AssertionError("a stream ends with its output")

    def evaluate(self, references: str, estimates: str) -> dict[str, Any]:
        """Score stems against the true ones, in decibels; both folders are track/stem.wav."""
        with _report_errors():
            report = evaluate(self._find_folder(references), self._find_folder(estimates))
        scores: dict[str, Any] = json.loads(report.json())
        return scores

    def _open(self, name: str) -> Separator:
        """Return the separator of a model; the last one is kept."""
        if self._separator is None or self._separator[0] != name:
            names = self._list_names()
            if name not in names:
                raise ToolError(f"unknown model {name!r}: expected one of {', '.join(names)}")
            self._separator = None
            self._separator = name, Separator(name, self._repo, self._device)
        return self._separator[1]

    def _list_names(self) -> list[str]:
        models = list_models(self._repo)
        return [*models["bag"], *models["single"]]

    def _find_file(self, path: str) -> Path:
        file = self._resolve(path)
        if not file.is_file():
            raise ToolError(f"{path} is not a file")
        return file

    def _find_folder(self, path: str) -> Path:
        folder = self._resolve(path)
        if not folder.is_dir():
            raise ToolError(f"{path} is not a folder")
        return folder

    def _resolve(self, path: str) -> Path:
        """Return a path below the root, links followed; raise `ToolError` for any other."""
        try:
            resolved = (self._root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ToolError(f"{path!r} is not a path") from error
        if not resolved.is_relative_to(self._root):
            raise ToolError(f"{path!r} is outside of the folder that may be used")
        return resolved


@contextmanager
def _report_errors() -> Iterator[None]:
    """Raise the expected errors as those of a tool, whose message an agent gets."""
    try:
        yield
    except (DemucsError, ValueError, OSError) as error:
        raise ToolError(format_error(error)) from error


def make_server(toolbox: Toolbox) -> "MCPServer[Any]":
    """Return the server with its tools."""
    server: MCPServer[Any] = MCPServer(
        "demucs-infer", version=__version__, instructions=_INSTRUCTIONS, log_level="WARNING"
    )
    for tool in (toolbox.separate, toolbox.list_models, toolbox.inspect_file, toolbox.evaluate):
        server.add_tool(tool)
    return server
