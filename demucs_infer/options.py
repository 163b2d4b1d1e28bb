"""How a track is separated, apart from by what: one value that is valid if it exists."""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to cut a track, and how to run what is cut."""

    shifts: int = 1
    """Passes at random offsets of up to half a second whose mean is taken; 0: one, unshifted."""

    overlap: float = 0.25
    """Fraction of a window shared with the next one, in [0, 1)."""

    split: bool = True
    """Cut the track into segments; otherwise each network reads it in one piece."""

    segment_seconds: float | None = None
    """Length of a segment, at most the one a fixed network was trained at; None: its own."""

    transition_power: float = 1.0
    """Power of the triangle that weighs a segment: larger, and neighbours mix less."""

    seed: int | None = 0
    """Seed of the shifts; None: drawn from Python's global `random`, as upstream draws them."""

    batch_size: int | Literal["auto"] = "auto"
    """Windows per forward; "auto" is 1 on a CPU, and on a GPU what its free memory allows."""

    oom: Literal["retry", "raise"] = "retry"
    """Out of memory: retry the batch in halves, or raise at once."""

    cpu_fallback: bool = True
    """When a single window does not fit on the device: go on on the CPU."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; stems are always float32."""

    normalize: bool = True
    """Bring the track to the level that networks were trained at, and the stems back."""

    workers: int = 0
    """Forwards that run beside the one being stitched; each holds a batch in memory."""

    profile: Literal["demucs", "padded"] = "demucs"
    """Grid: from the first sample as Demucs does, or padded by an overlap on both sides."""

    window: Literal["triangle", "hann", "hamming", "linear_fade", "ones"] = "triangle"
    """Shape that weighs a segment where it overlaps its neighbours."""

    padding: Literal["constant", "reflect", "replicate"] = "constant"
    """What a window reads beyond the track."""

    def __post_init__(self) -> None:
        # Each line is the condition that must hold, so that NaN and strings fail too.
        _at_least("shifts", self.shifts, 0)
        _at_least("workers", self.workers, 0)
        if self.batch_size != "auto":
            _at_least("batch_size", self.batch_size, 1, or_else="'auto' or ")
        _between("overlap", self.overlap, 0, 1)
        _between("transition_power", self.transition_power, 1, inf)
        if self.segment_seconds is not None and not (
            _is_number(self.segment_seconds) and self.segment_seconds > 0
        ):
            raise ValueError(f"segment_seconds = {self.segment_seconds!r} must be above 0")
        if self.seed is not None and not _is_integer(self.seed):
            raise ValueError(f"seed = {self.seed!r} must be an integer or None")
        _one_of("oom", self.oom, ("retry", "raise"))
        _one_of("precision", self.precision, ("fp32", "bf16", "fp16"))
        _one_of("profile", self.profile, ("demucs", "padded"))
        _one_of("window", self.window, ("triangle", "hann", "hamming", "linear_fade", "ones"))
        _one_of("padding", self.padding, ("constant", "reflect", "replicate"))
        for name in ("split", "cpu_fallback", "normalize"):
            value: object = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} = {value!r} must be True or False")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    # A Fraction is a number too: checkpoints carry their segment as one.
    try:
        return not isinstance(value, bool | str) and isfinite(value)  # type: ignore[arg-type]  # the question
    except TypeError:
        return False


def _at_least(name: str, value: object, low: int, or_else: str = "") -> None:
    if not (_is_integer(value) and value >= low):  # type: ignore[operator]  # an integer by now
        raise ValueError(f"{name} = {value!r} must be {or_else}an integer, {low} or more")


def _between(name: str, value: object, low: float, high: float) -> None:
    if not (_is_number(value) and low <= value < high):  # type: ignore[operator]  # a number by now
        limits = f"in [{low}, {high})" if isfinite(high) else f"{low} or more"
        raise ValueError(f"{name} = {value!r} must be {limits}")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r} must be one of {', '.join(known)}")
