"""A network of one's own on the command line: `--config FILE --checkpoint FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from demucs_infer.errors import ConfigError
from demucs_infer.options import OPTIONS, list_options

if TYPE_CHECKING:
    from demucs_infer.batch.custom_model import CustomModelSpec
    from demucs_infer.custom.config import Config


def with_config(top: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The words parsed; a configuration that they name speaks for flags that are not given."""
    args = top.parse_args(words)
    alone = {
        "--checkpoint": args.checkpoint,
        "--set": args.overrides,
        "--module": args.module,
        "--class": args.class_name,
    }
    if args.config is None:
        if given := [flag for flag, value in alone.items() if value]:
            top.error(f"{given[0]} needs --config")
        return args
    if args.checkpoint is None or args.repo is not None:
        top.error("--config needs --checkpoint, and no --repo")
    try:
        top.set_defaults(**_settings(_config(args)))
    except ConfigError as error:
        top.error(str(error))
    args = top.parse_args(words)
    if args.two_stems is not None:  # two stems, whatever the configuration hands out
        args.stems = None
    return args


def own_model(args: argparse.Namespace) -> CustomModelSpec:
    """The network that the words name."""
    from demucs_infer.batch.custom_model import CustomModelSpec

    config = _config(args)
    return CustomModelSpec(
        name=config.identifier or config.model_type,
        config=config,
        checkpoint=args.checkpoint,
        module=args.module,
        class_name=args.class_name,
    )


def _config(args: argparse.Namespace) -> Config:
    from demucs_infer.custom.config import Config

    return Config.from_file(args.config, args.overrides)


def config_settings(args: argparse.Namespace) -> dict[str, object]:
    """Return all settings of the configuration, if there is one."""
    return {} if args.config is None else _settings(_config(args))


def _settings(config: Config) -> dict[str, object]:
    parts = (config.input_options, config.output_options)
    files = {
        option.name: getattr(part, option.name)
        for part in parts
        for option in list_options(type(part))
    }
    files = {name: value for name, value in files.items() if OPTIONS[name].is_in("config")}
    return {**config.settings, **files}
