"""Define the configuration that all tracks of a run share, and plan a track by it."""

from collections.abc import Callable
from dataclasses import replace

from demucs_infer.engine.network import Ensemble, window_rule
from demucs_infer.engine.parallel import choose_parallelism, limit_windows
from demucs_infer.engine.plan import (
    Chunk,
    Pass,
    Plan,
    draw_origins,
    plan_batches,
    plan_chunks,
    plan_msst,
    plan_padded,
)
from demucs_infer.engine.runner import Runner, consumes_rng
from demucs_infer.engine.stems import StemPlan, needed_members
from demucs_infer.options import SeparationOptions
from demucs_infer.system.threads import count_threads


class RunConfig:
    """Networks, options and stems of a run, checked before its first track is opened."""

    def __init__(
        self,
        ensemble: Ensemble,
        options: SeparationOptions,
        stems: StemPlan,
        runner: Runner,
        announce: bool,
    ) -> None:
        if stems.sources != ensemble.sources:
            raise ValueError(
                f"the stems were chosen from {', '.join(stems.sources)}, but the model has "
                f"{', '.join(ensemble.sources)}: choose them from the sources of this model"
            )
        self.num_threads = count_threads()
        """Threads of torch of the caller, for a window that has the machine for itself."""
        self.ensemble = ensemble
        self.options = options
        self.stems = stems
        self.runner = runner
        self.announce = announce
        own = [getattr(member, "own_settings", {}) for member in ensemble.members]
        self.member_options = [
            options if ensemble.stems is None else replace(options, **settings) for settings in own
        ]
        """For each network, the settings of its windows."""
        weights = ensemble.weights or ([1.0] * len(ensemble.sources),)
        self.member_stems = needed_members(weights, stems.computed)
        """For each network, the indices of the stems that it must compute."""
        self.own_stems = [
            tuple(ensemble.own_index(i, stem) for stem in selected)
            for i, selected in enumerate(self.member_stems)
        ]
        """The same as indices into the stems of each network."""
        self.needs_mixture = stems.needs_mixture or options.gate
        """Whether final blocks depend on the track itself."""
        self.members = [i for i, selected in enumerate(self.member_stems) if selected]
        """Networks that run; one whose weights for all requested stems are 0 is skipped."""
        self.device = runner.device_for(ensemble.members[0])
        members = [ensemble.members[index] for index in self.members]
        max_windows = None
        if options.max_memory is not None:
            max_windows = limit_windows(
                members,
                options.max_memory,
                segment=options.segment,
                used=runner.measure_memory(self.device),
                is_cpu=self.device.type == "cpu",
            )
        self.parallelism = choose_parallelism(
            ensemble.members, options, self.device, runner.num_devices, max_windows
        )
        at_a_time = self.parallelism.windows if self.device.type == "cpu" else 1
        self._max_batch = None if max_windows is None else max_windows // max(1, at_a_time)
        self.window_rules = [window_rule(net, options.segment) for net in ensemble.members]
        """For each network, the function from the length of a chunk to its input length."""
        self.grids = [self._grid(member) for member in range(len(ensemble.members))]
        """For each network, (segment, stride) in samples."""

    def _grid(self, member: int) -> tuple[int, int]:
        """Return (segment, stride) in samples, each truncated as upstream truncates them."""
        network, options = self.ensemble.members[member], self.member_options[member]
        seconds = options.segment
        segment = int(network.samplerate * (network.segment if seconds is None else seconds))
        stride = int((1 - options.overlap) * segment)
        if options.split and not stride > 0:
            raise ValueError(
                f"overlap = {options.overlap} of a segment of {segment} samples leaves "
                "no sample to advance by: lower the overlap, or use a longer segment"
            )
        return segment, stride

    def plan(self, length: int) -> Plan:
        """Plan all the work for a track of `length` samples."""
        options, ensemble = self.options, self.ensemble
        max_shift = int(0.5 * ensemble.samplerate)
        draws = [self._draws(member, length) for member in range(len(ensemble.members))]
        origins = draw_origins(draws, options.shifts, max_shift, options.seed)
        passes = tuple(
            Pass(member, shift, origin, self._chunks(member, length, origin))
            for member in self.members
            for shift, origin in enumerate(origins[member])
        )

        return Plan(length, passes, plan_batches(passes, self.batch_size))

    def batch_size(self, member: int, window: int) -> int:
        """Return how many windows of `window` samples may run together."""
        size = self.runner.batch_size(self.ensemble.members[member], window, self.options)
        return size if self._max_batch is None else min(size, self._max_batch)

    def padding_width(self, member: int, length: int) -> int:
        """Return how many samples of padding precede and follow a track of `length` samples."""
        options = self.member_options[member]
        segment, stride = self.grids[member]
        if options.padding == "constant":
            return 0
        width = segment - stride
        # With this profile, a track that is too short for its reflection is not padded.
        return 0 if options.profile == "msst" and length <= 2 * width else width

    def _draws(self, member: int, length: int) -> Callable[[int], int]:
        """Return a function from the first sample of a pass to the number of draws in it."""
        _, stride = self.grids[member]
        if not consumes_rng(self.ensemble.members[member]):
            return lambda _origin: 0
        if not self.options.split:
            return lambda _origin: 1
        return lambda origin: -(-(length - origin) // stride)

    def _chunks(self, member: int, length: int, origin: int) -> tuple[Chunk, ...]:
        options = self.member_options[member]
        segment, stride = self.grids[member]
        if options.profile == "padded" and options.split:
            return plan_padded(length, segment=segment, stride=stride, origin=origin)
        if options.profile == "msst" and options.split:
            border = self.padding_width(member, length)
            return plan_msst(length, segment=segment, stride=stride, border=border, origin=origin)
        rule = self.window_rules[member]
        if not options.split:
            segment = stride = length - origin
            if rule(segment) < segment:
                raise ValueError(
                    f"split=False makes one window of {segment} samples, but with segment_seconds "
                    f"= {options.segment} the network reads {rule(segment)}: "
                    "use only one of the two options"
                )
        return plan_chunks(length, segment=segment, stride=stride, window=rule, origin=origin)
