"""Which networks of other people there are, by name; none is imported before it is used.

An installed package offers some through its entry points of the group `demucs_infer.models`, and
a program adds its own with `register_model`. Each name stands for a `ModelMetadata`, which needs a
configuration and weights, or for a function without arguments that gives a network with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.errors import ConfigError, ModelLoadingError, ModelNotFound

if TYPE_CHECKING:
    from torch import nn

GROUP = "demucs_infer.models"

Offer: TypeAlias = "ModelMetadata[Any] | Callable[[], nn.Module]"

_registered: dict[str, Offer] = {}
_lock = Lock()


def register_model(offer: Offer, name: str | None = None) -> None:
    """Make a kind of network, or a function that gives a network, known in this process.

    Metadata is known by its `model_type` unless `name` says otherwise; registering the same again
    changes nothing.
    """
    if name is None:
        if not isinstance(offer, ModelMetadata):
            raise ValueError("a function that gives a network needs a name")
        name = offer.model_type
    if not name or not callable(offer) and not isinstance(offer, ModelMetadata):
        raise ValueError(f"{name!r} is {offer!r}, neither a ModelMetadata nor a function")
    if name in _taken():
        raise ValueError(f"{name!r} is a model of the catalogue: take another name")
    with _lock:
        if _registered.setdefault(name, offer) != offer:
            raise ValueError(f"{name!r} is registered already, for {_registered[name]!r}")


def list_offered_models() -> dict[str, str]:
    """Where each name leads, as `module:attribute`; nothing is imported."""
    found = {name: points[0].value for name, points in _entry_points().items()}
    with _lock:
        for name, offer in _registered.items():
            made = offer.model if isinstance(offer, ModelMetadata) else offer
            qualified = getattr(made, "__qualname__", type(made).__qualname__)
            found[name] = f"{made.__module__}:{qualified}"
    return {name: where for name, where in sorted(found.items()) if name not in _taken()}


def find_package(name: str) -> str | None:
    """The package that offers a name, with its version; None where no package does."""
    for point in _entry_points().get(name, []):
        if point.dist is not None:
            return f"{point.dist.name}=={point.dist.version} {point.value}"
    return None


def find_offer(name: str) -> Offer | None:
    """What `name` stands for, imported if it must be; None if nobody offers it."""
    with _lock:
        if name in _registered:
            return _registered[name]
    points = _entry_points().get(name, [])
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise ModelLoadingError(f"{name!r} is offered by {packages}: uninstall one of them")
    point = points[0]
    try:
        offer = point.load()
    except Exception as error:
        raise ModelLoadingError(
            f"the model {name!r} of {_package(point)} cannot be imported from {point.value}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(offer, ModelMetadata) and not callable(offer):
        raise ModelLoadingError(
            f"the model {name!r} of {_package(point)} is a {type(offer).__name__}, "
            "neither a ModelMetadata nor a function"
        )
    return cast(Offer, offer)


def load_offered_network(name: str) -> nn.Module:
    """The network that a name stands for, with its weights."""
    offer = find_offer(name)
    if offer is None:
        catalog = load_catalog()
        raise ModelNotFound(name, {*catalog.bags, *catalog.checkpoints, *list_offered_models()})
    if isinstance(offer, ModelMetadata):
        raise ModelLoadingError(
            f"{name!r} is a kind of network, without weights: "
            "give Separator.from_pretrained a config and a checkpoint"
        )
    from torch import nn

    network = offer()
    if not isinstance(network, nn.Module):
        raise ModelLoadingError(f"{name!r} gave a {type(network).__name__}, not a network")
    return network.eval()


def find_metadata(model_type: str) -> ModelMetadata[Any]:
    """The kind of network that a configuration names."""
    offer = find_offer(model_type)
    if isinstance(offer, ModelMetadata):
        return offer
    if offer is not None:
        raise ConfigError(f"model_type: {model_type!r} is a network, and has its weights already")
    names = ", ".join(list_offered_models()) or "none"
    raise ConfigError(
        f"model_type: no network is known as {model_type!r} (there are: {names}); install its "
        "package, call register_model, or say which module and class it is"
    )


def _entry_points() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package"


def _taken() -> set[str]:
    return {*load_catalog().bags, *load_catalog().checkpoints}
