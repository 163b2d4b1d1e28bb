"""What the engine sees of a network, and of a bag of them.

Shapes: B batch, S stems, C channels, W samples of a window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from demucs_infer.errors import SeparationError


class Network(Protocol):
    """What the engine knows of a network: these names, and that it can be called.

    It may also have `valid_length(length) -> int`, the input it needs for a chunk,
    `use_train_segment`, which says that it runs at a window of its own (HTDemucs has both), and
    `forward_stems(mix, stems)`, which spares what is only for stems at other places.
    """

    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def samplerate(self) -> int: ...
    @property
    def audio_channels(self) -> int: ...
    @property
    def segment(self) -> float: ...
    def __call__(self, mix: Tensor, /) -> Tensor | Mapping[str, Tensor] | Sequence[Tensor]:
        """(B C W) -> (B S C W), or one (B C W) per stem, by name or in order."""


_ATTRIBUTES = ("sources", "samplerate", "audio_channels", "segment")


@dataclass(frozen=True, slots=True, eq=False)
class Ensemble:
    """The networks that answer together, and how much say each has in every stem."""

    members: tuple[Network, ...]
    weights: tuple[tuple[float, ...], ...] | None = None
    """Per member and stem; None: one network, whose answer is the result."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a bag needs at least one network")
        for member in self.members:
            missing = [name for name in _ATTRIBUTES if not hasattr(member, name)]
            if missing or not callable(member):
                raise ValueError(
                    f"{type(member).__name__} has no "
                    f"{', '.join(missing) or 'forward'}: wrap it with "
                    "demucs_infer.extension.create_w2w_model(module, params)"
                )
        first = self.members[0]
        for member in self.members:
            for name in ("sources", "samplerate", "audio_channels"):
                mine, theirs = getattr(member, name), getattr(first, name)
                if mine != theirs:
                    raise ValueError(f"the networks of a bag differ in {name}: {theirs}, {mine}")
        if self.weights is not None:
            check_weights(self.weights, len(self.members), first.sources)

    @classmethod
    def of(cls, model: object) -> "Ensemble":
        """What `model` is: a bag if it has `models` and `weights`, otherwise one network."""
        if isinstance(model, Ensemble):
            return model
        models, weights = getattr(model, "models", None), getattr(model, "weights", None)
        if models is None or weights is None:
            return cls((cast(Network, model),))
        return cls(tuple(models), tuple(tuple(map(float, member)) for member in weights))

    @property
    def sources(self) -> tuple[str, ...]:
        """Stems that are answered, in order."""
        return tuple(self.members[0].sources)

    @property
    def samplerate(self) -> int:
        """Samples a second that the networks were trained at."""
        return self.members[0].samplerate

    @property
    def audio_channels(self) -> int:
        """Channels that the networks take and answer."""
        return self.members[0].audio_channels


def check_weights(
    weights: Sequence[Sequence[float]], num_members: int, sources: Sequence[str]
) -> None:
    """Refuse weights that do not fit the bag, or that leave a stem to nobody."""
    if len(weights) != num_members:
        raise ValueError(f"{len(weights)} lists of weights for {num_members} networks")
    for member in weights:
        if len(member) != len(sources):
            raise ValueError(f"{len(member)} weights for {len(sources)} stems: {list(member)}")
    for name, column in zip(sources, zip(*weights)):
        if not abs(sum(column)) > 0:
            raise ValueError(f"the weights of stem {name!r} add up to {sum(column)}")


def window_rule(network: Network, segment_seconds: float | None) -> Callable[[int], int]:
    """The input length that `network` needs for a chunk of a given length."""
    if segment_seconds is not None and hasattr(network, "use_train_segment"):
        size = int(segment_seconds * network.samplerate)
        trained = int(network.segment * network.samplerate)
        if network.use_train_segment and size > trained:
            raise ValueError(
                f"segment_seconds = {float(segment_seconds):g} is longer than the "
                f"{float(network.segment):g} s this network was trained at, which is its "
                "longest: take that or less, or None"
            )
        return lambda _length: size
    rule: Callable[[int], int] = getattr(network, "valid_length", int)
    return rule


SOUND = ("batch", "stems", "channels", "samples")


def as_tensor(answer: object, sources: Sequence[str], axes: Sequence[str] = SOUND) -> Tensor:
    """What a network answered, by stem name, in order or stacked, as one (B S C W).

    `axes` are the names of what it must have, where that is not sound.
    """
    if isinstance(answer, Mapping):
        if set(answer) != set(sources):
            raise SeparationError(
                f"the network answered the stems {sorted(answer)}, not {sorted(sources)}"
            )
        answer = [answer[name] for name in sources]
    if isinstance(answer, list | tuple):
        answer = torch.stack(list(answer), dim=1) if len(answer) == len(sources) else len(answer)
    if isinstance(answer, Tensor) and answer.ndim == len(axes) and answer.shape[1] == len(sources):
        return answer
    got = tuple(answer.shape) if isinstance(answer, Tensor) else answer
    raise SeparationError(
        f"the network answered {got}, not ({', '.join(axes)}) "
        f"with {len(sources)} stems: {', '.join(sources)}"
    )
