"""`demucs-infer config-schema`: print the JSON Schema of the files for `--config`."""

import argparse
import json
import sys
from collections.abc import Sequence

from demucs_infer.cli.exit_codes import ExitCode


def run(words: Sequence[str]) -> int:
    """Print the schema, for editors and validators."""
    parser = argparse.ArgumentParser(
        "demucs-infer config-schema",
        description="Print the JSON Schema of the configuration files for --config, for editors "
        "and validators.",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.parse_args(words)
    from demucs_infer.custom.config import Config

    sys.stdout.write(json.dumps(Config.json_schema(), indent=2) + "\n")
    return ExitCode.OK
