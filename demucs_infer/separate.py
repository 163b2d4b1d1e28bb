"""Run the command from Python as with upstream: `separate.main(["song.mp3"])`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.main import main as run_command
from demucs_infer.cli.parser import COMMANDS, make_parser
from demucs_infer.devices import choose_devices
from demucs_infer.system.lazy import make_getattr

if TYPE_CHECKING:
    from torch import Tensor

    from demucs_infer.api import Separator as Separator
    from demucs_infer.api import list_models as list_models
    from demucs_infer.api import save_audio as save_audio
    from demucs_infer.apply import BagOfModels as BagOfModels
    from demucs_infer.errors import ModelLoadingError as ModelLoadingError
    from demucs_infer.htdemucs import HTDemucs as HTDemucs
    from demucs_infer.pretrained import add_model_flags as add_model_flags
    from demucs_infer.utils import fatal as fatal

__all__ = ["get_parser", "load_track", "main"]

__getattr__ = make_getattr(
    __name__,
    {
        "BagOfModels": "demucs_infer.apply",
        "HTDemucs": "demucs_infer.htdemucs",
        "ModelLoadingError": "demucs_infer.errors",
        "Separator": "demucs_infer.api",
        "add_model_flags": "demucs_infer.pretrained",
        "fatal": "demucs_infer.utils",
        "list_models": "demucs_infer.pretrained",
        "save_audio": "demucs_infer.audio.writer",
    },
    aliases={"th": "torch"},
)


class _Parser(argparse.ArgumentParser):
    """The parser of the command, which also sets values under upstream's names."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        """Parse as `argparse` does, and add upstream's values."""
        values, rest = super().parse_known_args(*args, **kwargs)
        values.tracks = [Path(track) for track in values.tracks]
        values.device = ",".join(map(str, choose_devices(values.device)))
        values.stem = values.two_stems
        values.filename = values.template
        values.mp3, values.flac = values.format == "mp3", values.format == "flac"
        values.int24, values.float32 = values.bits == 24, values.bits == 32
        values.mp3_bitrate = 320 if values.bitrate is None else values.bitrate
        values.mp3_preset = 2 if values.preset is None else values.preset
        values.clip_mode = "rescale" if values.clip == "track" else values.clip
        return values, rest


def get_parser() -> argparse.ArgumentParser:
    """Return a parser of the command's flags, whose values have upstream's names and defaults."""
    return _Parser(
        "demucs.separate",
        description="Separate the sources of the given tracks",
        parents=[make_parser()],
        add_help=False,
    )


def load_track(track: str | os.PathLike[str], audio_channels: int, samplerate: int) -> Tensor:
    """Read a file with the channels and sample rate of a model: (audio_channels, T).

    Raises:
        AudioReadError: The file cannot be read.
    """
    from demucs_infer.audio import AudioFile

    return AudioFile(track).read(streams=0, samplerate=samplerate, channels=audio_channels)


def main(opts: Sequence[str] | None = None) -> None:
    """Run the command with the arguments `opts`, or those of the process.

    As with upstream, a progress bar is shown even without a terminal, lines about the folder and
    the tracks are printed, missing files are skipped with a message, and `SystemExit` is raised
    with 0 after `--list-models`, 2 for wrong flags, and 1 for other errors.
    `demucs_infer.cli.main.main` is the same command with more exit codes.
    """
    words = list(sys.argv[1:] if opts is None else opts)
    if words[:1] and words[0] in COMMANDS:
        raise SystemExit(run_command(words))
    args = get_parser().parse_args(words)
    if not args.tracks and not args.demo and not args.list_models:
        sys.stderr.write("error: expected at least one track\n")
        raise SystemExit(1)
    missing = (
        [] if args.list_models else [str(track) for track in args.tracks if _is_missing(track)]
    )
    for track in missing:
        sys.stderr.write(
            f"{track} does not exist, and is skipped: put a path with spaces in quotes\n"
        )
    if missing and len(missing) == len(args.tracks) and not args.demo:
        return
    words = [word for word in words if str(Path(word)) not in missing]
    words = ["--progress", "bar", *words] if args.progress == "auto" else words
    code = run_command(words, announces_tracks=True)
    if code or args.list_models:
        raise SystemExit(code if code >= ExitCode.INTERRUPTED else min(code, 1))


def _is_missing(track: Path) -> bool:
    """Return whether a track is neither a file, nor a folder, a pattern or standard input."""
    return str(track) != "-" and not set("*?[") & set(str(track)) and not track.exists()


if __name__ == "__main__":
    main()
