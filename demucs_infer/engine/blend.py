"""Combine the passes over a track: the time shifts of each network, and the networks of a bag.

Shapes: S stems, C channels, t samples of a block, W samples of a window; `...` any leading axes,
for recordings that are separated together.
"""

import torch
from torch import Tensor

from demucs_infer.engine.plan import Chunk, Plan
from demucs_infer.engine.run_config import RunConfig
from demucs_infer.engine.spectral import SpectralChoice, find_first
from demucs_infer.engine.stitch import OverlapAdd, make_window, remove_fades, usable_weights

# Smallest weight per window shape. A triangle is never 0, but a high power of it can underflow.
# 1e-30 is too small to change the sum of upstream's weights, so results stay equal to upstream's.
_FLOOR = {"triangle": 1e-30}


class Blend:
    """All passes as one, available up to the sample that every pass has completed."""

    def __init__(self, plan: Plan, config: RunConfig, start: int = 0) -> None:
        self.start = start
        """First sample that `take` has not returned yet."""
        ensemble = config.ensemble
        self.first = find_first(start) if ensemble.is_spectral else start
        """First sample that what `take` returns depends on."""
        self._joined = self.first
        """First sample that has not been taken from the passes."""
        self._plan = plan
        self._config = config
        self._choices = [
            SpectralChoice(smallest=ensemble.combine == "min", start=self.first, length=plan.length)
            for _ in (config.stems.computed if ensemble.is_spectral else ())
        ]
        self._left = plan.num_left(self.first)
        self._passes = [
            OverlapAdd(pass_.chunks[-left].start if left else plan.length)
            for pass_, left in zip(plan.passes, self._left)
        ]
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, index: int, chunk: Chunk, output: Tensor) -> None:
        """Add the output (..., S, C, W) of pass `index` for `chunk`."""
        owned = output[..., chunk.skip : chunk.skip + len(chunk)]
        pass_ = self._plan.passes[index]
        weights = self._window_weights(pass_.member, len(chunk), output.device)
        options = self._config.member_options[pass_.member]
        if options.window == "edge_fade" and options.split:
            first, last = pass_.chunks[0], pass_.chunks[-1]
            segment, _ = self._config.grids[pass_.member]
            at_start, at_stop = chunk.start == first.start, chunk.stop >= last.stop
            weights = remove_fades(weights, segment, at_start=at_start, at_stop=at_stop)
        self._passes[index].add(chunk.start, owned, weights)
        self._left[index] -= 1

    def take(self) -> Tensor | None:
        """Return the next samples that are final, (..., S, C, t), or None."""
        stop = min(self._first_pending(index) for index in range(len(self._passes)))
        if stop <= self._joined:
            return None
        if self._config.ensemble.combine != "mean":
            result = self._combine(stop)
        else:
            result = self._mean(stop)
        self._joined = stop
        self.start += result.shape[-1]
        return result if result.shape[-1] else None

    def _mean(self, stop: int) -> Tensor:
        """Return the weighted mean of the networks up to sample `stop`."""
        config = self._config
        result: Tensor | None = None
        for member in config.members:
            mean = self._member_mean(member, stop)
            if config.ensemble.weights is None:
                return mean
            result = self._add_weighted(result, member, mean)
        assert result is not None
        weights = config.ensemble.weights or ()
        for at, stem in enumerate(config.stems.computed):
            total = 0.0
            for row in weights:  # in this order, and in float64, as upstream adds them
                total += row[stem]
            result[..., at, :, :] /= total
        return result

    def _first_pending(self, index: int) -> int:
        """Return the first sample that later chunks of a pass can still modify."""
        chunks = self._plan.passes[index].chunks
        left = self._left[index]
        return (
            min(chunks[len(chunks) - left].start, self._plan.length) if left else self._plan.length
        )

    def _member_mean(self, member: int, stop: int) -> Tensor:
        """Return the mean over the time shifts of the network `member`, up to sample `stop`."""
        total: Tensor | None = None
        for pass_, stitched in zip(self._plan.passes, self._passes):
            if pass_.member != member:
                continue
            # A shifted grid of chunks begins before the track: drop the samples outside.
            samples = stitched.take(stop)
            samples = samples[..., samples.shape[-1] - (stop - self._joined) :]
            total = samples if total is None else total.add_(samples)
        assert total is not None
        return total.div_(max(1, self._config.options.shifts))

    def _combine(self, stop: int) -> Tensor:
        """Return the stems up to sample `stop`, each from the networks with a weight in it.

        A choice between spectra ends earlier, as it needs the frames around a sample.
        """
        config = self._config
        means = {member: self._member_mean(member, stop) for member in config.members}
        stems = []
        for at, stem in enumerate(config.stems.computed):
            values = [
                mean[..., config.member_stems[member].index(stem), :, :]
                for member, mean in means.items()
                if stem in config.member_stems[member]
            ]
            device = values[0].device  # one of them differs if a network fell back to the CPU
            stacked = torch.stack([value.to(device) for value in values])
            if self._choices:
                skip = max(0, self.start - self._choices[at].start)
                stems.append(self._choices[at].push(stacked)[..., skip:])
            else:
                stems.append(median(stacked))
        return torch.stack(stems, dim=-3)

    def _add_weighted(self, result: Tensor | None, member: int, mean: Tensor) -> Tensor:
        """Add to `result` the stems that the network `member` computes, each times its weight."""
        config = self._config
        assert config.ensemble.weights is not None
        computed, select = config.stems.computed, config.member_stems[member]
        if result is None:
            shape = (*mean.shape[:-3], len(computed), *mean.shape[-2:])
            result = torch.zeros(shape, device=mean.device)
        mean = mean.to(result.device)  # differs if this network fell back to the CPU
        for at, stem in enumerate(select):
            weight = config.ensemble.weights[member][stem]
            result[..., computed.index(stem), :, :] += mean[..., at, :, :] * weight
        return result

    def _window_weights(self, member: int, length: int, device: torch.device) -> Tensor:
        """Return the weights of a chunk of `length` samples, cached per network and device."""
        options = self._config.member_options[member]
        if not options.split:
            return torch.ones(length, device=device)
        weights = self._weights.get((member, device))
        if weights is None or len(weights) < length:
            # Only `length` weights: a segment may be far longer than the track.
            segment, _ = self._config.grids[member]
            weights = make_window(
                options.window, segment, power=options.transition_power, stop=length
            )
            weights = usable_weights(weights, _FLOOR.get(options.window, 1e-8)).to(device)
            self._weights[member, device] = weights
        return weights[:length]


def median(values: Tensor) -> Tensor:
    """Return the median over the first axis; of an even number, the mean of the middle two."""
    middle = values.sort(dim=0).values[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return middle.mean(dim=0)
