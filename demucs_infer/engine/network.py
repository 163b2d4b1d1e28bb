"""Define what the engine needs of a network, and of a bag of networks.

Shapes: B batch, S stems, C channels, W samples of a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from demucs_infer.errors import SeparationError


class Network(Protocol):
    """The attributes and the call that the engine needs of a network.

    Optional attributes: `valid_length(length) -> int`, the input length needed for a chunk;
    `use_train_segment`, true if the network only accepts windows of one length (HTDemucs has both);
    those of `SupportsStemSelection`.
    """

    @property
    def sources(self) -> Sequence[str]:
        """Names of the stems, in order."""

    @property
    def samplerate(self) -> int:
        """Sample rate in Hz."""

    @property
    def audio_channels(self) -> int:
        """Number of channels of the input and of every stem."""

    @property
    def segment(self) -> float:
        """Length of a segment in seconds."""

    def __call__(self, mix: Tensor, /) -> Tensor | Mapping[str, Tensor] | Sequence[Tensor]:
        """Return the stems of `mix` (B, C, W).

        Either one tensor (B, S, C, W), or a tensor (B, C, W) per stem, by name or in order.
        """


@runtime_checkable
class SupportsStemSelection(Protocol):
    """A network that skips the work for stems that are not requested."""

    def forward_stems(self, mix: Tensor, stems: Sequence[int]) -> Tensor:
        """Return the stems of these indices, in this order: (B, C, W) -> (B, S, C, W).

        They must equal those of a call. It is called where only some stems are requested, unless
        the network has hooks, or a subclass overrides `forward` alone.
        """


COMBINATIONS = ("mean", "median", "min", "max")
"""How a bag combines its networks: the weighted mean or the median of samples, or for each bin of
their spectra the value of smallest or largest magnitude. All but the mean treat networks with a
weight alike."""

ATTRIBUTES = ("sources", "samplerate", "audio_channels", "segment")


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """One network, or a bag of networks and the weight of each in every stem."""

    members: tuple[Network, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    """One row per network, one weight per stem; None: a single network without weights."""
    stems: tuple[str, ...] | None = None
    """Stems of a bag of networks with different ones, matched by name; None: all have the same.

    Each of these networks runs with the settings of its own, `own_settings`."""
    combine: str = "mean"
    """How the networks become one: one of `COMBINATIONS`."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a bag needs at least one network, got none")
        for member in self.members:
            missing = [name for name in ATTRIBUTES if not hasattr(member, name)]
            if missing or not callable(member):
                raise ValueError(
                    f"{type(member).__name__} has no "
                    f"{', '.join(missing) or 'forward'}: wrap it with "
                    "demucs_infer.extension.create_w2w_model(module, params), or pass "
                    "metadata=params to Separator.from_model; params has `chunk_size` and "
                    "`output_stem_names`"
                )
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine = {self.combine!r} must be one of {', '.join(COMBINATIONS)}")
        first = self.members[0]
        names = ("samplerate", "audio_channels")
        for member in self.members:
            for name in names if self.stems is not None else ("sources", *names):
                expected, actual = getattr(first, name), getattr(member, name)
                if actual != expected:
                    remedy = "; `stems` of a bag in a folder matches them by name"
                    raise ValueError(
                        f"the networks of a bag differ in {name}: {expected} and {actual}"
                        + (remedy if name == "sources" else "")
                    )
        if self.weights is not None:
            check_weights(self.weights, len(self.members), self.sources)

    @classmethod
    def from_model(cls, model: object) -> "Ensemble":
        """Return `model` as a bag if it has `models` and `weights`, otherwise as one network."""
        if isinstance(model, Ensemble):
            return model
        models, weights = getattr(model, "models", None), getattr(model, "weights", None)
        if models is None or weights is None:
            return cls((cast(Network, model),))
        stems = getattr(model, "stems_by_name", None)
        return cls(
            tuple(models),
            tuple(tuple(map(float, member)) for member in weights),
            stems=None if stems is None else tuple(stems),
            combine=getattr(model, "combine", "mean"),
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the stems, in order."""
        return tuple(self.members[0].sources) if self.stems is None else self.stems

    @property
    def is_spectral(self) -> bool:
        """Whether the networks are combined bin by bin of their spectra."""
        return self.combine in ("min", "max")

    def own_index(self, member: int, stem: int) -> int:
        """Return the index of a stem of the bag in the output of one of its networks."""
        if self.stems is None:
            return stem
        return list(self.members[member].sources).index(self.stems[stem])

    @property
    def samplerate(self) -> int:
        """Sample rate in Hz."""
        return self.members[0].samplerate

    @property
    def audio_channels(self) -> int:
        """Number of channels of the input and of every stem."""
        return self.members[0].audio_channels


def check_weights(
    weights: Sequence[Sequence[float]], num_members: int, sources: Sequence[str]
) -> None:
    """Raise `ValueError` unless each network has a weight per stem, and no stem's sum is 0."""
    if len(weights) != num_members:
        raise ValueError(
            f"got {len(weights)} lists of weights for {num_members} networks: "
            "expected one per network"
        )
    for member in weights:
        if len(member) != len(sources):
            raise ValueError(
                f"got {len(member)} weights for {len(sources)} stems: expected one per stem, "
                f"got {list(member)}"
            )
    for name, column in zip(sources, zip(*weights)):
        if not abs(sum(column)) > 0:
            raise ValueError(
                f"the weights of stem {name!r} add up to {sum(column)}: the sum must not be 0"
            )


def window_rule(network: Network, segment_seconds: float | None) -> Callable[[int], int]:
    """Return a function that maps the length of a chunk to the input length of `network`.

    Raises `ValueError` if the segment is longer than a network with a fixed window accepts.
    """
    if segment_seconds is not None and hasattr(network, "use_train_segment"):
        size = int(segment_seconds * network.samplerate)
        trained = int(network.segment * network.samplerate)
        if network.use_train_segment and size > trained:
            raise ValueError(
                f"segment_seconds = {float(segment_seconds):g} is longer than the "
                f"{float(network.segment):g} s this network was trained at: choose "
                f"{float(network.segment):g} or less, or None"
            )
        return lambda _length: size
    rule: Callable[[int], int] = getattr(network, "valid_length", int)
    return rule


AUDIO_AXES = ("batch", "stems", "channels", "samples")


def as_tensor(output: object, sources: Sequence[str], axes: Sequence[str] = AUDIO_AXES) -> Tensor:
    """Return the output of a network as one tensor (B, S, C, W).

    The output may be such a tensor, one tensor per stem in order, or a mapping by stem name. `axes`
    are the names of its dimensions, if it is not audio. Raises `SeparationError` for anything else.
    """
    if isinstance(output, Mapping):
        if set(output) != set(sources):
            raise SeparationError(
                f"the network returned the stems {sorted(output)}, expected {sorted(sources)}"
            )
        output = [output[name] for name in sources]
    if isinstance(output, list | tuple):
        output = torch.stack(list(output), dim=1) if len(output) == len(sources) else len(output)
    if isinstance(output, Tensor) and output.ndim == len(axes) and output.shape[1] == len(sources):
        return output
    actual = tuple(output.shape) if isinstance(output, Tensor) else output
    raise SeparationError(
        f"the network returned {actual}, expected ({', '.join(axes)}) "
        f"with {len(sources)} stems: {', '.join(sources)}"
    )
