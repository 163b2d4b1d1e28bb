"""Offer building blocks for custom separation loops: cut and stitch chunks, normalize the level.

The engine uses the same parts. A track is padded by `chunk_size - hop_size` samples on both sides,
and every chunk has the full length.

Shapes: B chunks of a batch, S stems, C channels, T samples of the track.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from demucs_infer.engine.level import Level, measure
from demucs_infer.engine.network import Network, window_rule
from demucs_infer.engine.pipeline import TensorTrack, with_channels
from demucs_infer.engine.plan import Chunk, check_grid, plan_padded
from demucs_infer.engine.queries import QueryAdapter
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.stitch import (
    OverlapAdd,
    TrackBuffer,
    check_padding,
    make_window,
    pad_audio,
    usable_weights,
)
from demucs_infer.options import SeparationOptions

__all__ = [
    "ChunkPlan",
    "NormalizationStats",
    "NormalizedAudio",
    "StitcherBuffers",
    "StreamingStitcher",
    "denormalize_audio",
    "generate_chunks",
    "make_window",
    "normalize_audio",
    "overlap_add",
    "pad_audio",
    "stitch_chunks",
]


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How a track of `num_samples` samples is cut into overlapping chunks."""

    num_samples: int
    chunk_size: int
    hop_size: int

    def __post_init__(self) -> None:
        check_grid(self.chunk_size, self.hop_size)
        if not self.num_samples >= 0:
            raise ValueError(f"num_samples = {self.num_samples} must be 0 or more")

    @classmethod
    def from_seconds(
        cls, num_samples: int, chunk_seconds: float, hop_seconds: float, sample_rate: int
    ) -> "ChunkPlan":
        """Create a plan from seconds, each rounded to the nearest sample.

        >>> ChunkPlan.from_seconds(44_100, 6.0, 3.0, 44_100).overlap
        132300
        """
        chunk, hop = (round(seconds * sample_rate) for seconds in (chunk_seconds, hop_seconds))
        return cls(num_samples, chunk, hop)

    @classmethod
    def from_overlap(cls, num_samples: int, chunk_size: int, overlap: float) -> "ChunkPlan":
        """Create a plan from the fraction by which neighboring chunks overlap.

        The hop size is truncated to a whole number of samples, as upstream does.
        """
        return cls(num_samples, chunk_size, int((1 - overlap) * chunk_size))

    @property
    def overlap(self) -> int:
        """Number of samples that neighboring chunks share, and of padding on each side."""
        return self.chunk_size - self.hop_size

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks; sample 0 is the start of the track, so the first chunk begins below 0."""
        return plan_padded(self.num_samples, segment=self.chunk_size, stride=self.hop_size)

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return len(self.chunks)

    @property
    def padded_length(self) -> int:
        """Number of samples from the start of the first chunk to the end of the last."""
        return (self.num_chunks - 1) * self.hop_size + self.chunk_size if self.num_chunks else 0

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches of up to `batch_size` chunks."""
        return -(-self.num_chunks // batch_size)


def generate_chunks(
    audio: Tensor,
    chunk_size: int,
    hop_size: int,
    batch_size: int,
    *,
    padding_mode: str = "reflect",
) -> Iterator[Tensor]:
    """Yield batches (B, C, chunk_size) of overlapping chunks of `audio` (C, T), cut on demand."""
    plan = ChunkPlan(audio.shape[-1], chunk_size, hop_size)
    check_padding(padding_mode)
    if not batch_size >= 1:
        raise ValueError(f"{batch_size = } must be 1 or more")
    return _generate(audio, plan, batch_size, padding_mode)


def _generate(
    audio: Tensor, plan: ChunkPlan, batch_size: int, padding_mode: str
) -> Iterator[Tensor]:
    buffer = TrackBuffer(TensorTrack(audio).blocks(), plan.num_samples)
    chunks = plan.chunks
    for at in range(0, len(chunks), batch_size):
        batch = chunks[at : at + batch_size]
        yield torch.stack([buffer.cut(chunk, padding_mode, plan.overlap) for chunk in batch])
        buffer.drop(batch[-1].read + plan.hop_size - plan.overlap - 1)


class StitcherBuffers(NamedTuple):
    """What a `StreamingStitcher` keeps: weighted samples that later chunks still add to."""

    buffer: Tensor
    """Weighted sum (S, C, n)."""
    norm_buffer: Tensor
    """Sum of the weights (n,)."""


class StreamingStitcher:
    """Overlap-add of a stream of chunks, which returns samples as soon as they are final.

    About one chunk is kept in memory. The first `samples_to_skip` samples are dropped as padding
    (None: the padding of `generate_chunks`), and the next `target_num_samples` are returned.
    """

    def __init__(
        self,
        chunk_size: int,
        hop_size: int,
        target_num_samples: int,
        window: Tensor,
        *,
        samples_to_skip: int | None = None,
    ) -> None:
        check_grid(chunk_size, hop_size)
        if window.shape != (chunk_size,):
            raise ValueError(
                f"window must have the shape ({chunk_size},), got {tuple(window.shape)}"
            )
        if not target_num_samples >= 0:
            raise ValueError(f"{target_num_samples = } must be 0 or more")
        self.chunk_size = chunk_size
        self.hop_size = hop_size
        self.target_num_samples = target_num_samples
        self.window = window
        self.tail_size = chunk_size - hop_size
        self._skip = self.tail_size if samples_to_skip is None else samples_to_skip
        self._weights = usable_weights(window.detach())
        self.reset()

    def reset(self) -> None:
        """Start over with a new track."""
        self.samples_to_skip = self._skip
        self.samples_to_keep = self.target_num_samples
        self._sum = OverlapAdd()
        self._next = 0
        self._shape: torch.Size | None = None

    @property
    def buffers(self) -> StitcherBuffers | None:
        """Copies of the sums that are kept, None before the first chunk."""
        tensors = [tensor.clone() for tensor in self._sum.tensors]
        return StitcherBuffers(*tensors) if len(tensors) == 2 and self._shape else None

    def step(self, chunk: Tensor) -> Tensor | None:
        """Add the next chunk (S, C, chunk_size); return final samples (S, C, ...), or None."""
        if chunk.ndim != 3 or chunk.shape[-1] != self.chunk_size:
            raise ValueError(
                f"chunk must be (stems, channels, {self.chunk_size}), got {tuple(chunk.shape)}"
            )
        if self._shape not in (None, chunk.shape):
            raise ValueError(
                f"chunk has shape {tuple(chunk.shape)}, but earlier chunks have "
                f"{tuple(self._shape or ())}"
            )
        if not self.samples_to_keep:
            return None
        self._shape = chunk.shape
        self._sum.add(self._next, chunk.detach(), self._weights.to(chunk.device))
        self._next += self.hop_size
        return self._emit(self._next)

    def flush(self) -> Tensor | None:
        """Return the samples that remain after the last chunk, or None.

        Only needed for tracks that are not padded at the end.
        """
        if self._shape is None or self._sum.start == self._sum.stop:
            return None
        return self._emit(self._sum.stop)

    def _emit(self, stop: int) -> Tensor | None:
        final = self._sum.take(stop)
        skipped = min(self.samples_to_skip, final.shape[-1])
        self.samples_to_skip -= skipped
        final = final[..., skipped : skipped + self.samples_to_keep]
        self.samples_to_keep -= final.shape[-1]
        return final if final.shape[-1] else None


def stitch_chunks(
    processed_chunks: Iterable[Tensor],
    num_stems: int,
    chunk_size: int,
    hop_size: int,
    target_num_samples: int,
    *,
    window: Tensor,
) -> Tensor:
    """Stitch batches of chunks (B, S, C, chunk_size), in order, into one recording (S, C, T)."""
    stitcher = StreamingStitcher(chunk_size, hop_size, target_num_samples, window)
    parts: list[Tensor] = []
    dtype: torch.dtype | None = None
    for batch in processed_chunks:
        if batch.ndim != 4 or batch.shape[1] != num_stems:
            raise ValueError(
                f"batch must be (chunks, {num_stems} stems, channels, {chunk_size}), "
                f"got {tuple(batch.shape)}"
            )
        if dtype not in (None, batch.dtype):
            raise ValueError(f"batch is {batch.dtype}, but earlier batches are {dtype}")
        dtype = batch.dtype
        parts += [part for chunk in batch if (part := stitcher.step(chunk)) is not None]
    if dtype is None:
        raise ValueError("processed_chunks is empty: pass at least one batch of chunks")
    if stitcher.samples_to_keep:
        covered = target_num_samples - stitcher.samples_to_keep
        raise ValueError(f"the chunks cover {covered} of {target_num_samples} samples")
    return torch.cat(parts, dim=-1)


NormalizationStats = Level
"""The mean, and the deviation above 0, that a recording had before it was normalized."""

_Audio = TypeVar("_Audio")


class NormalizedAudio(NamedTuple):
    """A recording at the level that networks expect, and its original level."""

    audio: Any
    """Of the type that was passed in: a tensor, or an `Audio`."""
    stats: NormalizationStats


def normalize_audio(audio: Any, *, eps: float = 1e-8) -> NormalizedAudio:
    """Normalize `audio` (C, T) by the mean and the standard deviation of its mono mix.

    `audio` is a tensor, or an `Audio`, which is returned with the same sample rate. Where the mono
    mix deviates by `eps` at most, as silence does, the recording stays as it is.
    """
    if not eps >= 0:
        raise ValueError(f"{eps = } must be 0 or more")
    samples = _samples(audio)
    level = measure(TensorTrack(samples).blocks(), eps)
    return NormalizedAudio(_with_samples(audio, level.remove(samples)), level)


def denormalize_audio(
    audio: _Audio, stats: NormalizationStats, *, mean_to: Literal["all", "residual"] = "all"
) -> _Audio:
    """Restore the original level of `audio` (..., T), a tensor or an `Audio`.

    Every stem gets the whole mean, as upstream's do, so that the sum of S stems is off by S - 1
    means. With `mean_to="residual"` only the last of the stems (S, C, T) gets it, and they sum to
    the recording.
    """
    if mean_to not in ("all", "residual"):
        raise ValueError(f"{mean_to = } must be 'all' or 'residual'")
    samples = _samples(audio)
    if mean_to == "all" or samples.ndim < 3:
        return _with_samples(audio, stats.restore(samples))
    stems = samples * stats.std
    stems[..., -1, :, :] += stats.mean
    return _with_samples(audio, stems)


def _samples(audio: Any) -> Tensor:
    """Return the tensor of an `Audio`, which is known here by its attribute `data` alone."""
    return audio if isinstance(audio, Tensor) else torch.as_tensor(audio.data)


def _with_samples(audio: _Audio, samples: Tensor) -> _Audio:
    return cast(
        _Audio, samples if isinstance(audio, Tensor) else replace(cast(Any, audio), data=samples)
    )


def overlap_add(
    model: nn.Module,
    audio: Tensor,
    plan: ChunkPlan,
    *,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    window: Literal["triangle", "hann", "hamming", "linear_fade", "edge_fade", "ones"] = "hann",
    padding_mode: Literal["constant", "reflect", "replicate"] = "reflect",
    queries: Mapping[str, Mapping[str, object]] | None = None,
    sources: Sequence[str] | None = None,
    oom: Literal["retry", "raise"] = "retry",
    **model_kwargs: object,
) -> dict[str, Tensor]:
    """Separate `audio` (C, T) chunk by chunk, and return its stems (C, T) by name.

    The network may be any module from (B, C, W) to a dictionary by stem, or to a list or a tensor
    (B, S, C, W) whose stems are named by its attribute `sources` or by the argument. `model_kwargs`
    are passed to it in every call. `queries` maps names to further keyword arguments: the network
    runs once per query on each chunk, and its stems are named after the query. When memory runs
    out, smaller batches are tried and kept to, or with `oom="raise"` the error is raised.
    """
    if plan.num_samples != audio.shape[-1]:
        raise ValueError(
            f"the plan is for {plan.num_samples} samples, but audio has {audio.shape[-1]}"
        )
    all_queries = {
        name: {**model_kwargs, **arguments} for name, arguments in (queries or {"": {}}).items()
    }
    network = QueryAdapter(model, all_queries, sources=sources)
    options = SeparationOptions(batch_size=batch_size, oom=oom)
    if hasattr(model, "samplerate"):
        window_rule(cast(Network, model), plan.chunk_size / cast(int, model.samplerate))
    channels = getattr(model, "audio_channels", audio.shape[-2])
    chunks = generate_chunks(
        with_channels(TensorTrack(audio).samples.detach(), channels),
        plan.chunk_size,
        plan.hop_size,
        batch_size,
        padding_mode=padding_mode,
    )
    stitcher = StreamingStitcher(
        plan.chunk_size, plan.hop_size, plan.num_samples, make_window(window, plan.chunk_size)
    )
    runner = Runner(device)
    parts: list[Tensor] = []
    with runner.lease([network]):
        for batch in chunks:
            output, _ = runner.infer(network, batch, None, options)
            stems = output.to(audio.device)
            parts += [part for chunk in stems if (part := stitcher.step(chunk)) is not None]
    if not parts:
        raise ValueError("audio has no samples: there is nothing to separate")
    return dict(zip(network.sources, torch.cat(parts, dim=-1)))
