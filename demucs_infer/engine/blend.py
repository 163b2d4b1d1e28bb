"""Blend the passes of a track: the weighted mean over the members of a bag and over shifts.

Shapes: S stems, C channels, t samples of a block, W of a window; `...` are recordings that are
separated side by side.
"""

import torch
from torch import Tensor

from demucs_infer.engine.plan import Chunk, Plan
from demucs_infer.engine.run_config import RunConfig
from demucs_infer.engine.stitch import OverlapAdd, make_window, usable_weights

# A triangle is never 0, but a high power of it can be: there, too small to change a sum.
_FLOOR = {"triangle": 1e-30}


class Blend:
    """The weighted mean over members and shifts, as far as every pass has come."""

    def __init__(self, plan: Plan, setup: RunConfig, start: int = 0) -> None:
        self.start = start
        """First sample not yet given out."""
        self._plan = plan
        self._setup = setup
        self._left = plan.num_left(start)
        self._passes = [
            OverlapAdd(pass_.chunks[-left].start if left else plan.length)
            for pass_, left in zip(plan.passes, self._left)
        ]
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def add(self, index: int, chunk: Chunk, answer: Tensor) -> None:
        """Add what pass number `index` answered for `chunk`: (... S C W)."""
        owned = answer[..., chunk.skip : chunk.skip + len(chunk)]
        member = self._plan.passes[index].member
        weights = self._window(member, len(chunk), answer.device)
        self._passes[index].add(chunk.start, owned, weights)
        self._left[index] -= 1

    def take(self) -> Tensor | None:
        """The samples that every pass is done with, if there are any: (... S C t)."""
        stop = min(self._final(index) for index in range(len(self._passes)))
        if stop <= self.start:
            return None
        setup = self._setup
        result: Tensor | None = None
        for member in setup.members:
            mine = self._member_mean(member, stop)
            if setup.ensemble.weights is None:
                self.start = stop
                return mine
            result = self._weigh(result, member, mine)
        assert result is not None
        weights = setup.ensemble.weights or ()
        for at, stem in enumerate(setup.stems.computed):
            total = 0.0
            for row in weights:  # in this order, and in float64, as upstream adds them
                total += row[stem]
            result[..., at, :, :] /= total
        self.start = stop
        return result

    def _final(self, index: int) -> int:
        """How far the pass can be touched no more."""
        chunks = self._plan.passes[index].chunks
        left = self._left[index]
        return (
            min(chunks[len(chunks) - left].start, self._plan.length) if left else self._plan.length
        )

    def _member_mean(self, member: int, stop: int) -> Tensor:
        total: Tensor | None = None
        for pass_, stitched in zip(self._plan.passes, self._passes):
            if pass_.member != member:
                continue
            # What lies before the track is only there because the grid was slid.
            samples = stitched.take(stop)
            samples = samples[..., samples.shape[-1] - (stop - self.start) :]
            total = samples if total is None else total.add_(samples)
        assert total is not None
        return total.div_(max(1, self._setup.options.shifts))

    def _weigh(self, result: Tensor | None, member: int, mine: Tensor) -> Tensor:
        setup = self._setup
        assert setup.ensemble.weights is not None
        computed, select = setup.stems.computed, setup.select[member]
        if result is None:
            shape = (*mine.shape[:-3], len(computed), *mine.shape[-2:])
            result = torch.zeros(shape, device=mine.device)
        mine = mine.to(result.device)
        for at, stem in enumerate(select):
            weight = setup.ensemble.weights[member][stem]
            result[..., computed.index(stem), :, :] += mine[..., at, :, :] * weight
        return result

    def _window(self, member: int, length: int, device: torch.device) -> Tensor:
        options = self._setup.options
        if not options.split:
            return torch.ones(length, device=device)
        known = self._weights.get((member, device))
        if known is None or len(known) < length:
            # A segment may be longer than any memory, what is read of it is not.
            segment, _ = self._setup.segments[member]
            known = make_window(
                options.window, segment, power=options.transition_power, stop=length
            )
            known = usable_weights(known, _FLOOR.get(options.window, 1e-8)).to(device)
            self._weights[member, device] = known
        return known[:length]
