"""Everything a `Separator` can be told, as one value that is valid if it exists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypedDict

import torch

from demucs_infer.devices import choose_device
from demucs_infer.engine.stems import Rule, StemPlan, choose_stems
from demucs_infer.optimized.optimize import choose_precision
from demucs_infer.options import Options

Callback: TypeAlias = Callable[[dict[str, object]], object]
Device: TypeAlias = str | torch.device | None
BatchSize: TypeAlias = int | Literal["auto"]
Stems: TypeAlias = Sequence[str] | StemPlan | None
Derive: TypeAlias = Sequence[str | Rule]


class OwnParameters(TypedDict, total=False):
    """What upstream's `Separator` does not know."""

    stems: Stems
    derive: Derive
    seed: int | None
    precision: str
    batch_size: BatchSize
    io_device: Device
    profile: Literal["demucs", "padded"]
    window: Literal["triangle", "hann", "hamming", "linear_fade", "ones"]
    padding: Literal["constant", "reflect", "replicate"]
    normalize: bool
    compile: bool | str


class Parameters(OwnParameters, total=False):
    """All that a `Separator` can be told about the work."""

    device: Device
    shifts: int
    overlap: float
    split: bool
    segment: float | None
    jobs: int
    progress: bool
    callback: Callback | None
    callback_arg: Mapping[str, object] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What upstream's `Separator` takes, by upstream's names, and what ours takes besides."""

    sources: tuple[str, ...]
    """Stems of the model."""
    device: Device = "auto"
    shifts: int = 1
    overlap: float = 0.25
    split: bool = True
    segment: float | None = None
    jobs: int = 0
    progress: bool = False
    callback: Callback | None = None
    callback_arg: Mapping[str, object] | None = None
    stems: Stems = None
    derive: Derive = ()
    seed: int | None = 0
    precision: str = "fp32"
    """Of the networks; "auto" is what pays on the device."""
    batch_size: BatchSize = "auto"
    io_device: Device = "cpu"
    profile: Literal["demucs", "padded"] = "demucs"
    window: Literal["triangle", "hann", "hamming", "linear_fade", "ones"] = "triangle"
    padding: Literal["constant", "reflect", "replicate"] = "constant"
    normalize: bool = True
    compile: bool | str = False
    """Through PyTorch's compiler, or a backend of it: for a GPU, minutes at the first window."""

    options: Options = field(init=False)
    """The part that the engine knows."""
    plan: StemPlan = field(init=False)
    """Which stems are handed out."""
    network_device: torch.device = field(init=False)
    """Where the network runs."""
    track_device: torch.device = field(init=False)
    """Where the track and the stems are."""

    def __post_init__(self) -> None:
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        options = Options(
            shifts=self.shifts,
            overlap=self.overlap,
            split=self.split,
            segment_seconds=self.segment,
            workers=self.jobs,
            seed=self.seed,
            precision=precision,  # type: ignore[arg-type]  # Options looks too
            batch_size=self.batch_size,
            profile=self.profile,
            window=self.window,
            padding=self.padding,
            normalize=self.normalize,
        )
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "plan", self.plan_for(self.sources))
        object.__setattr__(self, "network_device", device)
        object.__setattr__(self, "track_device", choose_device(self.io_device))

    @classmethod
    def of(cls, members: Sequence[object], parameters: Parameters) -> "Settings":
        """Those for networks, which may have `preferences` where a parameter is not given."""
        preferences = [dict(getattr(member, "preferences", {})) for member in members]
        if any(wish != preferences[0] for wish in preferences):
            raise ValueError(
                f"the networks of a bag differ in how they are to be run: {preferences}"
            )
        sources: tuple[str, ...] = tuple(members[0].sources)  # type: ignore[attr-defined]  # networks
        return cls(sources=sources, **{**preferences[0], **parameters})

    @classmethod
    def check(cls, parameters: Parameters) -> None:
        """Find what is wrong before there is a model, apart from the names of its stems."""
        named = {"stems", "derive"}
        cls(sources=("any",), **{name: x for name, x in parameters.items() if name not in named})  # type: ignore[arg-type]  # the same names

    def plan_for(self, sources: Sequence[str]) -> StemPlan:
        """The stems that are asked for, out of these."""
        if isinstance(self.stems, StemPlan):
            return self.stems
        return choose_stems(sources, stems=self.stems, derive=self.derive)

    def but(self, changes: Mapping[str, Any]) -> "Settings":
        """The same with some things changed."""
        return replace(self, **changes)
