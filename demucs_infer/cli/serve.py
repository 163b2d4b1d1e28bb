"""`demucs-infer serve`: serve separations and a web page over HTTP; one flag per setting."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from demucs_infer.checkpoints.cache import cache_folder
from demucs_infer.cli.exit_codes import ExitCode
from demucs_infer.cli.parser import FlagParser
from demucs_infer.errors import ConfigError
from demucs_infer.server.logs import make_formatter
from demucs_infer.server.settings import PREFIX, ServerSettings, convert, load_settings
from demucs_infer.system.malloc import exempt_imports_from_gc, limit_heaps


def make_parser() -> argparse.ArgumentParser:
    """Return the parser, with one flag per setting."""
    parser = FlagParser(
        "demucs-infer serve",
        usage="%(prog)s [options]",
        description="Separate music over HTTP, with a web page at http://127.0.0.1:8080/.",
        epilog=f"Each flag can be set as a variable, such as {PREFIX}MAX_BYTES for --max-bytes. "
        "Flags take precedence over variables, variables over the file, and the file over the "
        "defaults.",
    )
    parser.add_argument("--config", type=Path, help="TOML file of settings, by their names")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for setting in fields(ServerSettings):
        name = setting.name
        flag = "--api-key" if name == "api_keys" else f"--{name.replace('_', '-')}"
        options: dict[str, Any] = {"dest": name, "help": _describe(setting)}
        if bool in (setting.type, *getattr(setting.type, "__args__", ())):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = name.rpartition("_")[2].upper()
            parser.add_argument(flag, type=_make_converter(name), metavar=metavar, **options)
    parser.set_defaults(**{setting.name: None for setting in fields(ServerSettings)})
    return parser


def _describe(setting: "Field[Any]") -> str:
    """Return the help of a setting, with its default unless the help states it."""
    text: str = setting.metadata["help"]
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if setting.name == "cache_dir":
        default = cache_folder()
    if "default:" in text:
        return text
    match default:
        case bool():
            shown = "yes" if default else "no"
        case int() | float():
            shown = f"{default:.12g}"
        case Path():
            home = Path.home()
            short = Path("~") / default.relative_to(home) if home in default.parents else default
            shown = short.as_posix().replace("%", "%%")
        case tuple():
            shown = ",".join(default)
        case _:
            shown = str(default or "")
    return f"{text} (default: {shown or 'none'})"


def run(words: Sequence[str]) -> int:
    """Serve until a signal arrives; return the exit code."""
    args = vars(make_parser().parse_args(words))
    is_debug = args.pop("debug")
    settings = load_settings(
        {name: args[name] for name in args if name != "config"}, os.environ, args["config"]
    )
    limit_heaps()
    try:
        with exempt_imports_from_gc():
            from demucs_infer.server.run import serve
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install fastapi uvicorn python-multipart "
            "prometheus-client"
        ) from error
    _configure_logging(is_debug, settings.log_format)
    logging.getLogger("demucs_infer").info("http://%s:%s/", settings.host, settings.port)
    has_started = serve(settings)
    return ExitCode.OK if has_started else ExitCode.SOME_FAILED


def _configure_logging(is_debug: bool, log_format: str) -> None:
    """Send the access log to standard output, and everything else to standard error."""
    messages = logging.StreamHandler(sys.stderr)
    if not is_debug:  # why uvicorn did not start is reported in one line as well
        messages.addFilter(lambda record: not record.getMessage().startswith("Traceback"))
    messages.setFormatter(make_formatter(log_format))
    for name, handler in (
        ("demucs_infer", messages),
        ("uvicorn", messages),
        ("demucs_infer.access", logging.StreamHandler(sys.stdout)),
    ):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _make_converter(name: str) -> Any:
    def read(text: str) -> Any:
        if name == "api_keys" and not text.strip():  # an unset variable must not disable the keys
            raise argparse.ArgumentTypeError("empty: give a key, or omit the flag")
        try:
            value = convert(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
        if name == "port" and not 0 <= value < 65536:
            raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {text}")
        return value

    return read
