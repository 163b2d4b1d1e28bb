"""Parse the command line into the model, the request and the settings given with `--config`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from demucs_infer.audio.formats import FORMATS, NUM_STEMS
from demucs_infer.batch.request import ModelSpec
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.errors import ConfigError, ModelLoadingError
from demucs_infer.options import NAMES, OPTIONS, Request, drop_inapplicable, list_options

_CONFIG_SUFFIXES = {".yaml", ".yml"}
_WEIGHT_SUFFIXES = {".ckpt", ".pt", ".pth", ".safetensors", ".th"}


def parse_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; settings of the `--config` file become the defaults of the flags.

    The result has the configuration, or None, as `custom_config`, and its settings as
    `config_settings`.
    """
    args = parser.parse_args(words)
    _check_names(parser, args)
    pair: tuple[Path, Path] | None = None
    folder = args.repo
    if args.config is None and (pair := _find_pair(args)) is not None:
        # Parse again, as if the two files had been given with --config and --checkpoint.
        parser.set_defaults(config=pair[0], checkpoint=pair[1])
        args = parser.parse_args(words)
        args.repo = None
    dependent = {
        "--checkpoint": args.checkpoint,
        "--model-type": args.model_type,
        "--set": args.overrides,
        "--module": args.module,
        "--class": args.class_name,
    }
    if args.config is None:
        if given := [flag for flag, value in dependent.items() if value]:
            parser.error(f"{given[0]} needs --config")
        args.custom_config, args.config_settings, args.second_repo = None, {}, folder
        return args
    _check_config_flags(parser, args)
    from demucs_infer.custom.community import PREFIX, choose_rules
    from demucs_infer.custom.config import Config

    overrides = [f"model_type={args.model_type}"] if args.model_type else []
    try:
        config = Config.from_file(args.config, [*overrides, *args.overrides])
    except (ConfigError, ModelLoadingError) as error:
        parser.error(str(error))
    settings = dict(config.settings)
    for part in (config.input_options, config.output_options):
        names = [option.name for option in list_options(type(part)) if option.is_in("config")]
        settings |= {name: getattr(part, name) for name in names}
    parser.set_defaults(**settings)
    args = parser.parse_args(words)
    args.custom_config, args.config_settings, args.second_repo = config, settings, folder
    if pair is not None:
        args.repo = None
    if config.model_type.startswith(PREFIX) and tuple(args.derive) == config.rules:
        args.derive = choose_rules(args.derive, config.model.output_stem_names, args.stems)
    if args.two_stems is not None:  # it excludes --stems, which the file may choose
        args.stems = None
    return args


def _check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit if a file of a custom network was given as a track or as the name of a model."""
    advice = "a custom network is --config FILE --checkpoint FILE"
    for track in args.tracks if hasattr(args, "tracks") else ():
        if Path(track).suffix.lower() in _CONFIG_SUFFIXES | _WEIGHT_SUFFIXES:
            parser.error(f"{track} is not a track: {advice}")
    if args.config is None and Path(args.name or "").suffix.lower() in _CONFIG_SUFFIXES:
        parser.error(f"--name {args.name} is a configuration: {advice}")


def _check_config_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit if the file of --config is missing, or flags that must or must not accompany it."""
    if not args.config.exists():
        parser.error(f"--config {args.config}: no such file")
    if args.config.suffix.lower() in _WEIGHT_SUFFIXES:
        parser.error(
            f"--config {args.config} is a file of weights: --config is the YAML or JSON file, and "
            "--checkpoint the weights"
        )
    if args.checkpoint is None:
        parser.error("--config needs --checkpoint, the file of the weights")
    if args.repo is not None:
        parser.error("--config excludes --repo, a folder of models for --name")


def _find_pair(args: argparse.Namespace) -> tuple[Path, Path] | None:
    """Return the configuration and weights of a custom network that was given by its name.

    Without them, a run that only estimates goes on with the name.
    """
    from demucs_infer.custom.msst import find_pair
    from demucs_infer.pretrained import model_info

    name = args.sig or args.name
    if args.repo is not None or name not in load_catalog().networks:
        return find_pair(name, args.repo)
    only_estimates = getattr(args, "dry_run", False) or getattr(args, "plan", False)
    if only_estimates and not model_info(name, cache_dir=args.cache_dir).is_cached:
        return None
    from demucs_infer.cli.models import download
    from demucs_infer.custom.community import import_library

    import_library()  # if it is missing, nothing is downloaded
    config, checkpoint = download(
        name,
        cache_dir=args.cache_dir,
        offline=args.offline,
        quiet=getattr(args, "quiet", False),
    )
    return config, checkpoint


def read_model(args: argparse.Namespace) -> ModelSpec:
    """Return the model that the flags select, chained with the one of `--then` if there is one."""
    first = _read_first_model(args)
    if args.then is None:
        return first
    from demucs_infer.batch.chain import ChainedModelSpec

    stem, equals, name = args.then.rpartition("=")
    if not (stem and equals and name):
        raise ValueError(
            f"--then {args.then}: expected STEM=MODEL, such as drums=drumsep: the stem to separate "
            "again, and the model to do it with"
        )
    second = _read_second_model(args, name)
    return ChainedModelSpec(
        name=f"{first.name}-then-{second.name}", first=first, second=second, stem=stem
    )


def _read_second_model(args: argparse.Namespace, name: str) -> ModelSpec:
    """Return a model of the folder of --repo, or else of the catalog."""
    repo = args.second_repo
    if repo is not None and (load_catalog().has(name) or name in load_catalog().networks):
        from demucs_infer.pretrained import list_models

        repo = repo if any(name in models for models in list_models(repo).values()) else None
    pair = _find_pair(argparse.Namespace(**{**vars(args), "name": name, "sig": None, "repo": repo}))
    if pair is None:
        return ModelSpec(
            name=name,
            repo=repo,
            cache_dir=args.cache_dir,
            offline=args.offline,
            trust=args.trust_checkpoint,
        )
    from demucs_infer.batch.custom_model import CustomModelSpec
    from demucs_infer.custom.config import Config

    return CustomModelSpec(name=name, config=Config.from_file(pair[0]), checkpoint=pair[1])


def _read_first_model(args: argparse.Namespace) -> ModelSpec:
    if args.custom_config is None:
        return ModelSpec(
            name=args.sig or args.name,
            repo=args.repo,
            cache_dir=args.cache_dir,
            offline=args.offline,
            trust=args.trust_checkpoint,
        )
    from demucs_infer.batch.custom_model import CustomModelSpec

    config = args.custom_config
    return CustomModelSpec(
        name=config.identifier or config.model_type,
        config=config,
        checkpoint=args.checkpoint,
        module=args.module,
        class_name=args.class_name,
    )


def read_request(args: argparse.Namespace) -> Request:
    """Return the request: the values of the flags, and settings of `--config` without a flag."""
    values = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Request().replace(drop_inapplicable({**args.config_settings, **values}))


def check_stem_file(args: argparse.Namespace) -> None:
    """Raise `ValueError` if a file with all stems is requested, but other flags choose some.

    Stems that only the model determines are checked once it is loaded.
    """
    if not FORMATS[args.format].holds_all_stems or args.then is not None:
        return
    flag = ""
    if args.two_stems not in (None, args.config_settings.get("two_stems")):
        flag = f"--two-stems {args.two_stems} gives two"
    elif args.stems not in (None, args.config_settings.get("stems")) and (
        len(args.stems) != NUM_STEMS
    ):
        flag = f"--stems {','.join(args.stems)} gives {len(args.stems)}"
    if flag:
        raise ValueError(
            f"a {args.format} file has {NUM_STEMS} stems, and {flag}: omit that flag, or choose "
            "another --format"
        )


def describe_ineffective_flags(args: argparse.Namespace) -> str:
    """Return a warning about flags that have no effect on the output format, or ""."""
    kind = FORMATS[args.format]
    applies = {
        "bits": not kind.is_lossy,
        "bitrate": kind.bitrates,
        "quality": kind.quality,
        "preset": kind.preset,
    }
    flags = [
        f"{getattr(args, f'{name}_flag', OPTIONS[name].long_flag)} {value}"
        for name, is_used in applies.items()
        if not is_used
        and (value := getattr(args, name)) not in (None, args.config_settings.get(name))
    ]
    verb = "has" if len(flags) == 1 else "have"
    return f"{' and '.join(flags)} {verb} no effect on {args.format} files" if flags else ""
