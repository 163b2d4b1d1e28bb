"""The command line of `demucs-infer TRACKS...`: upstream's flags by upstream's names, and ours."""

import argparse
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from demucs_infer import __version__
from demucs_infer.audio.filenames import valid_template
from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.output_paths import DEFAULT_TEMPLATE

COMMANDS = {
    "models": "list, describe, fetch, find, remove and import models",
    "doctor": "versions, devices, codecs, cache and disk of this machine",
    "eval": "how good stems are, given the true ones",
    "serve": "stems over HTTP, with a page to play them",
    "batch": "all tracks of a manifest, on this machine or on many",
}
"""Words that are a command when they come first; a track of that name is written ./models."""

CLIP_MODES = ("track", "rescale", "clamp", "tanh", "none")
EXIT_CODES = """\
exit codes: 0 all tracks done, 1 some failed, 2 wrong usage, 3 no track could be read,
            4 the model could not be had, 130 interrupted, 143 terminated
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the tracks' command; the other commands have their own."""
    commands = "\n".join(f"  demucs-infer {name:7} {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        "demucs-infer",
        usage="%(prog)s [options] TRACK [TRACK ...]",
        description="Separate music into stems with the Demucs networks.",
        epilog=f"commands:\n{commands}\n"
        f"  (a track that is called like a command is written ./{next(iter(COMMANDS))})\n\n"
        f"{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=True,
    )
    top.add_argument(
        "tracks",
        nargs="*",
        metavar="TRACK",
        help="files, folders (searched for audio files, mirrored in the output), patterns such as "
        "'**/*.flac', or - for standard input",
    )
    add_request_flags(top)
    _run_flags(top.add_argument_group("what to do, and what to say"))
    return top


def add_request_flags(top: argparse.ArgumentParser) -> None:
    """Which model, and what is asked of every track."""
    _model_flags(top.add_argument_group("model"))
    _separation_flags(top.add_argument_group("separation"))
    _stem_flags(top.add_argument_group("stems"))
    _input_flags(top.add_argument_group("input"))
    _output_flags(top.add_argument_group("output"))


def _model_flags(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "-n", "--name", default="htdemucs", help="name or signature of a model (%(default)s)"
    )
    which.add_argument("-s", "--sig", help="signature of a single network")
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="how a network of your own is built and run, as JSON; it speaks for flags that are "
        "not given",
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    group.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change its configuration: 'inference.batch_size=2'; repeatable",
    )
    group.add_argument(
        "--module", help="import its class from here; otherwise its package is asked for it"
    )
    group.add_argument("--class", dest="class_name", metavar="CLASS", help="name of its class")
    group.add_argument(
        "--repo", type=Path, help="folder of models to use instead of the known ones"
    )
    group.add_argument("--list-models", action="store_true", help="list the models and exit")
    group.add_argument("--cache-dir", type=Path, help="folder for downloaded models")
    group.add_argument("--offline", action="store_true", default=None, help="download nothing")
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that may run code of its own; only for files you made yourself",
    )


def _separation_flags(group: Any) -> None:
    group.add_argument(
        "-d", "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)"
    )
    group.add_argument(
        "--shifts",
        type=at_least(0),
        default=1,
        help="passes at random offsets whose mean is taken; each costs a full pass (%(default)s)",
    )
    group.add_argument(
        "--overlap",
        type=number(0, 1),
        default=0.25,
        help="fraction of a segment shared with the next, below 1 (%(default)s)",
    )
    split = group.add_mutually_exclusive_group()
    split.add_argument(
        "--no-split",
        dest="split",
        action="store_false",
        help="run each track in one piece; takes much memory",
    )
    split.add_argument("--segment", type=number(0.1), help="seconds of a segment (the model's own)")
    group.add_argument(
        "--seed", type=int, default=0, help="of the random offsets: same seed, same stems (0)"
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="arithmetic of the network: fp32 is exact, auto the fastest here (%(default)s)",
    )
    group.add_argument(
        "--batch-size", type=_batch_size, default="auto", help="windows that run together (auto)"
    )
    group.add_argument(
        "-j", "--jobs", type=at_least(0), default=0, help="windows that run side by side (0)"
    )


def _stem_flags(group: Any) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--two-stems", dest="stem", metavar="STEM", help="write only STEM and no_STEM"
    )
    which.add_argument(
        "--stems",
        type=_names,
        metavar="A,B",
        help="write only these, and run only the networks that they need",
    )
    group.add_argument(
        "--other-method",
        choices=("none", "add", "minus"),
        default="add",
        help="no_STEM is the sum of the others (add), or instead minus_STEM, the track minus STEM "
        "(minus), or not written (none); (%(default)s)",
    )
    group.add_argument(
        "--derive",
        action="append",
        default=[],
        metavar="RULE",
        help="one more stem, such as 'drumless=mixture-drums' or 'band=bass+other'; repeatable",
    )


def _input_flags(group: Any) -> None:
    group.add_argument(
        "--start", type=number(0), default=0.0, metavar="SECONDS", help="begin here (0)"
    )
    group.add_argument(
        "--duration", type=number(0, strict=True), metavar="SECONDS", help="no longer than this"
    )
    group.add_argument(
        "--strict", action="store_true", help="a damaged or truncated input is an error"
    )


def _output_flags(group: Any) -> None:
    group.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("separated"),
        help="folder for the stems, in a sub-folder named like the model (%(default)s); "
        "- writes one stem to standard output",
    )
    group.add_argument(
        "--filename",
        type=_template,
        default=DEFAULT_TEMPLATE,
        help="name of each file, from {track}, {trackext}, {stem} and {ext} (%(default)s)",
    )
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--format", choices=tuple(FORMATS), default="wav", help="of the files (%(default)s)"
    )
    kind.add_argument(
        "--flac", dest="format", action="store_const", const="flac", help="--format flac"
    )
    kind.add_argument(
        "--mp3", dest="format", action="store_const", const="mp3", help="--format mp3"
    )
    depth = group.add_mutually_exclusive_group()
    depth.add_argument(
        "--bits",
        type=_bits,
        metavar="16|24|32|source",
        help="of a sample, 32 is float; source: those of the input",
    )
    depth.add_argument("--int24", dest="bits", action="store_const", const=24, help="--bits 24")
    depth.add_argument("--float32", dest="bits", action="store_const", const=32, help="--bits 32")
    group.add_argument(
        "--rate",
        type=_source_or_number,
        default="model",
        metavar="source|HZ",
        help="sample rate of the stems (the model's)",
    )
    group.add_argument(
        "--channels",
        type=_source_or_number,
        default="model",
        metavar="source|N",
        help="channels of the stems (the model's)",
    )
    group.add_argument(
        "--clip-mode",
        choices=CLIP_MODES,
        default="track",
        help="when a stem would clip: one gain for all stems (track), its own gain for each "
        "(rescale, upstream's way), a hard or soft limit (clamp, tanh), nothing (none); "
        "(%(default)s)",
    )
    group.add_argument(
        "--mp3-bitrate", "--bitrate", dest="bitrate", type=at_least(1), help="kbit/s (320 for mp3)"
    )
    group.add_argument(
        "--mp3-preset",
        dest="preset",
        type=int,
        choices=range(2, 8),
        help="effort of the mp3 encoder, from 2, the best, to 7, the fastest (2)",
    )
    group.add_argument("--no-tags", dest="tags", action="store_false", help="carry no tags over")
    group.add_argument(
        "--no-manifest",
        dest="manifest",
        action="store_false",
        help="write no stems.json beside the stems; then nothing can be skipped",
    )
    group.add_argument(
        "--page",
        action="store_true",
        help="write stems.html beside the stems, a player with all of them inside",
    )


def _run_flags(group: Any) -> None:
    again = group.add_mutually_exclusive_group()
    again.add_argument(
        "--force",
        action="store_true",
        help="redo what is done; otherwise a track whose stems.json "
        "says the same input, model and settings is skipped",
    )
    again.add_argument(
        "--skip-existing", action="store_true", help="skip whatever has its files, however made"
    )
    group.add_argument(
        "--collisions",
        choices=("error", "number"),
        default="error",
        help="two tracks with the same output: refuse to start, or add -2, -3, ... (%(default)s)",
    )
    group.add_argument(
        "--demo", action="store_true", help="separate a little song that is composed on the spot"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="say what would be done, and what it would take"
    )
    group.add_argument(
        "--progress",
        choices=("auto", "bar", "json", "none"),
        default="auto",
        help="on standard error; auto: a bar at a terminal (%(default)s)",
    )
    group.add_argument(
        "--json", action="store_true", help="a summary on standard output, as one JSON object"
    )
    loud = group.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="say more")
    loud.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")
    group.add_argument("--version", action="version", version=f"demucs-infer {__version__}")


def at_least(low: int) -> Callable[[str], int]:
    """A whole number from `low` on."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        return value

    return integer


def number(
    low: float, high: float = float("inf"), *, strict: bool = False
) -> Callable[[str], float]:
    """A number in [low, high), or in (low, high) when `strict`."""

    def real(text: str) -> float:
        value = float(text)
        if not (isfinite(value) and low <= value < high and not (strict and value == low)):
            limits = f"above {low:g}" if strict else f"{low:g} or more"
            limits += f" and below {high:g}" if isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"must be a number, {limits}, not {text}")
        return value

    # What argparse calls the type when the text is no number at all.
    real.__name__ = "number"
    return real


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


def _source_or_number(text: str) -> int | str:
    try:
        return text if text in {"source", "model"} else at_least(1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be source, model or a number") from None


def _bits(text: str) -> int | str:
    if text not in {"16", "24", "32", "source"}:
        raise argparse.ArgumentTypeError(f"{text!r} must be 16, 24, 32 or source")
    return text if text == "source" else int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _template(text: str) -> str:
    try:
        return valid_template(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
