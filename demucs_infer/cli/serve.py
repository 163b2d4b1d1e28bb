"""`demucs-infer serve`: the model behind HTTP, and a page; flags are its settings."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from demucs_infer.errors import ConfigError
from demucs_infer.server.settings import PREFIX, ServerSettings, convert, described, load_settings
from demucs_infer.system.malloc import use_single_arena

OK, USAGE, NOT_STARTED = 0, 2, 1


def parser() -> argparse.ArgumentParser:
    """One flag for each setting."""
    top = argparse.ArgumentParser(
        "demucs-infer serve",
        description="Serve stems over HTTP, and a page at http://127.0.0.1:8080/.",
        epilog=f"Each flag is a variable too: --max-bytes is {PREFIX}MAX_BYTES. A flag goes before "
        "a variable, a variable before the file, and the file before the default.",
    )
    top.add_argument("--config", type=Path, help="TOML file with settings by their names")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    words = described()
    for one in fields(ServerSettings):
        flag = "--api-key" if one.name == "api_keys" else f"--{one.name.replace('_', '-')}"
        more: dict[str, Any] = {"dest": one.name, "help": words[one.name]}
        if bool in (one.type, *getattr(one.type, "__args__", ())):
            top.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
        else:
            top.add_argument(flag, type=_reader(one.name), metavar=_metavar(one.name), **more)
    top.set_defaults(**{one.name: None for one in fields(ServerSettings)})
    return top


def run(words: Sequence[str]) -> int:
    """Serve until somebody ends it."""
    args = vars(parser().parse_args(words))
    is_debug = args.pop("debug")
    settings = load_settings(
        {name: args[name] for name in args if name != "config"}, os.environ, args["config"]
    )
    try:
        from demucs_infer.server.run import serve
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing: pip install 'demucs-infer[serve]' brings it"
        ) from error
    use_single_arena()
    _log(is_debug)
    logging.getLogger("demucs_infer").info("http://%s:%s/", settings.host, settings.port)
    return OK if serve(settings) else NOT_STARTED


def _log(is_debug: bool) -> None:
    """Requests to standard output, one JSON object a line; everything else to the error stream."""
    plain = logging.StreamHandler(sys.stderr)
    if not is_debug:  # uvicorn's way to say why it did not start; it is said in a sentence, too
        plain.addFilter(lambda record: not record.getMessage().startswith("Traceback"))
    plain.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    lines = logging.StreamHandler(sys.stdout)
    for name, handler in (("demucs_infer", plain), ("uvicorn", plain), ("access", lines)):
        logger = logging.getLogger("demucs_infer.access" if name == "access" else name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _reader(name: str) -> Any:
    def read(text: str) -> Any:
        if name == "api_keys" and not text.strip():  # a variable that is not set opens no door
            raise argparse.ArgumentTypeError("it is empty: give a key, or leave it out")
        try:
            return convert(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    return read


def _metavar(name: str) -> str:
    return name.rpartition("_")[2].upper()
