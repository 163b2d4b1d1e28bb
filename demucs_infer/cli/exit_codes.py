"""Define the exit codes of the command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `demucs-infer` and of all its commands."""

    OK = 0
    SOME_FAILED = 1
    USAGE = 2
    NO_INPUT = 3
    NO_MODEL = 4
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODE_HELP = f"""\
exit codes: {ExitCode.OK:d} all tracks done, {ExitCode.SOME_FAILED:d} some failed, \
{ExitCode.USAGE:d} wrong usage, {ExitCode.NO_INPUT:d} no track could be read,
            {ExitCode.NO_MODEL:d} the model cannot be loaded, \
{ExitCode.INTERRUPTED:d} interrupted, {ExitCode.TERMINATED:d} terminated
"""
