"""Run `demucs-infer plot FOLDER`: draw waveforms and spectrograms of stems into one picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from demucs_infer.batch.manifest import read_manifest
from demucs_infer.cli.exit_codes import ExitCode


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `demucs-infer plot`."""
    parser = argparse.ArgumentParser(
        "demucs-infer plot",
        description="Draw the waveform and the spectrogram of every stem in a folder into one SVG.",
        epilog="example: demucs-infer plot separated/htdemucs/song",
    )
    parser.add_argument("folder", type=Path, help="folder with the stems of a track")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="the picture (default: FOLDER/stems.svg)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(words: Sequence[str]) -> int:
    """Draw the picture, and print its path."""
    args = make_parser().parse_args(words)
    files = _find_stems(args.folder)
    from demucs_infer.audio.reader import AudioReader, load_track
    from demucs_infer.pictures import draw_stems

    rate = AudioReader(next(iter(files.values()))).info.sample_rate
    stems = {name: load_track(path, 2, rate) for name, path in files.items()}
    path = args.out or args.folder / "stems.svg"
    path.write_text(draw_stems(stems, rate, args.folder.name), "utf-8")
    sys.stdout.write(f"{path}\n")
    return ExitCode.OK


def _find_stems(folder: Path) -> dict[str, Path]:
    """Return the files that `stems.json` lists, or else the audio files of the folder."""
    from demucs_infer.batch.discovery import is_audio

    manifest = read_manifest(folder / "stems.json")
    if manifest is not None:
        files = {name: folder / Path(stem["file"]).name for name, stem in manifest["stems"].items()}
    else:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        files = {path.stem: path for path in paths if is_audio(path.name)}
    if not files:
        raise ValueError(f"no stems in {folder}: give a folder such as separated/htdemucs/song")
    return files
