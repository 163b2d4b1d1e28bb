"""Types for `argparse` that check limits."""

import argparse
from collections.abc import Callable
from math import isfinite


def at_least(low: int) -> Callable[[str], int]:
    """Return an `argparse` type for integers of at least `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        return value

    return integer


def number(low: float) -> Callable[[str], float]:
    """Return an `argparse` type for finite numbers of at least `low`."""

    def real(text: str) -> float:
        value = float(text)
        if not (isfinite(value) and value >= low):
            raise argparse.ArgumentTypeError(f"must be a number, {low:g} or more, not {text}")
        return value

    real.__name__ = "number"  # what argparse calls it when the text is no number at all
    return real
