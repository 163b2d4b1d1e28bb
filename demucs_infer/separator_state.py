"""Resolve the settings of a `Separator`, and make the runner of its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from demucs_infer.devices import choose_best_device, choose_device, choose_devices
from demucs_infer.engine.network import Ensemble, Network
from demucs_infer.engine.runner import Runner
from demucs_infer.engine.runner_group import RunnerGroup
from demucs_infer.engine.stems import StemPlan, choose_stems
from demucs_infer.events import DeviceChosen
from demucs_infer.optimized.compiled import compile_network
from demucs_infer.optimized.optimize import choose_precision, optimize
from demucs_infer.options import Precision, SeparationOptions, StemOptions, list_options

Callback: TypeAlias = "Callable[[dict[str, object]], object]"
Device: TypeAlias = "str | torch.device | None"

_PYTHON_ONLY = {"progress", "callback", "callback_arg"}
_STEM_NAMES = {option.name for option in list_options(StemOptions)}


class Omitted:
    """Marks the default of a keyword that the caller omitted; compares equal to the default."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)

    def __eq__(self, other: object) -> bool:
        return other == self._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SeparatorState:
    """The settings of a `Separator`, resolved for this machine."""

    options: SeparationOptions
    plan: StemPlan
    devices: tuple[torch.device, ...]
    """The devices of the networks."""
    device_choice: DeviceChosen | None
    """Why this device was chosen; None if it was requested."""
    track_device: torch.device
    """The device of the track and the stems."""
    progress: bool = False
    callback: Callback | None = None
    callback_arg: Mapping[str, object] | None = None

    @classmethod
    def resolve(cls, sources: Sequence[str] | None, values: Mapping[str, object]) -> SeparatorState:
        """Check settings given by name; `sources` are the model's stems, None if not loaded yet."""
        settings: dict[str, Any] = {
            name: value for name, value in values.items() if name not in _STEM_NAMES
        }
        own = {name: settings.pop(name) for name in _PYTHON_ONLY & settings.keys()}
        requested = settings.pop("device", "auto")
        is_auto = requested is None or requested == "auto"
        choice = choose_best_device() if is_auto else None
        devices = (torch.device(choice.device),) if choice else choose_devices(requested)
        track_device = choose_device(settings.pop("io_device", "cpu"))
        names = ",".join(map(str, devices))
        options = SeparationOptions(device=names, io_device=str(track_device), **settings)
        precision = choose_precision(options.precision, devices[0])
        plan = StemPlan((), ()) if sources is None else cls.choose_plan(sources, values)
        return cls(
            options=replace(options, precision=precision),
            plan=plan,
            devices=devices,
            device_choice=choice,
            track_device=track_device,
            **own,
        )

    @property
    def device(self) -> torch.device:
        """The first device of the networks."""
        return self.devices[0]

    @staticmethod
    def choose_plan(sources: Sequence[str], values: Mapping[str, object]) -> StemPlan:
        """Return the requested stems of a model with these `sources`."""
        stems = {name: value for name, value in values.items() if name in _STEM_NAMES}
        if isinstance(stems.get("stems"), StemPlan):
            return cast(StemPlan, stems["stems"])
        return choose_stems(sources, **cast("dict[str, Any]", stems))


def values_of(options: SeparationOptions | StemOptions | None) -> dict[str, object]:
    """Return the settings by name."""
    if options is None:
        return {}
    return {option.name: getattr(options, option.name) for option in list_options(type(options))}


def merge_values(
    options: SeparationOptions | None,
    stem_options: StemOptions | None,
    changes: Mapping[str, object],
) -> dict[str, object]:
    """Return all settings by name; keywords that are given override `options`."""
    given = {name: value for name, value in changes.items() if not isinstance(value, Omitted)}
    return {**values_of(options), **values_of(stem_options), **given}


def find_preferences(ensemble: Ensemble) -> dict[str, object]:
    """Return the default settings of the networks; empty if each network keeps its own.

    Raises:
        ValueError: The networks of a bag disagree.
    """
    if ensemble.stems is not None:
        return {}
    preferences = [dict(getattr(member, "preferences", {})) for member in ensemble.members]
    if any(each != preferences[0] for each in preferences):
        raise ValueError(f"the networks of a bag have different default settings: {preferences}")
    return preferences[0]


def make_runner(
    devices: Sequence[torch.device],
    *,
    compile: bool | str,
    consume_weights: bool = False,
    device_choice: DeviceChosen | None = None,
) -> Runner:
    """Return a runner that optimizes networks and runs them on the devices.

    `device_choice` is the reason why a single device was chosen.
    """

    def make(device: torch.device, choice: DeviceChosen | None) -> Runner:
        def prepare(network: Network, precision: str) -> Network:
            fast = optimize(
                cast(nn.Module, network),
                cast(Precision, precision),
                device=device,
                consume_weights=consume_weights,
                for_compiler=bool(compile),
            )
            backend = "inductor" if compile is True else compile
            return cast(Network, compile_network(fast, backend) if backend else fast)

        return Runner(device, prepare=prepare, device_choice=choice)

    if len(devices) == 1:
        return make(devices[0], device_choice)
    return RunnerGroup([make(device, None) for device in devices])
