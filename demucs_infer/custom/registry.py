"""Register custom networks by name, and import them only when they are used.

Packages register networks with entry points of the group `demucs_infer.models`, and programs with
`register_model`. A registered name refers to a `ModelMetadata`, which needs a configuration and
weights, or to a function without arguments that returns such metadata or a network with its
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.custom.community import find_community_metadata
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.errors import ConfigError, ModelLoadingError, ModelNotFound

if TYPE_CHECKING:
    from torch import nn

GROUP = "demucs_infer.models"

RegisteredModel: TypeAlias = "ModelMetadata[Any] | Callable[[], ModelMetadata[Any] | nn.Module]"

_registered: dict[str, RegisteredModel] = {}
_lock = Lock()


def register_model(model: RegisteredModel, name: str | None = None) -> None:
    """Register metadata, or a function that returns metadata or a network, in this process.

    `name` defaults to the `model_type` of metadata. Registering the same model again has no effect;
    another one under the same name raises `ValueError`.
    """
    if name is None:
        if not isinstance(model, ModelMetadata):
            raise ValueError("a function needs a name: register_model(function, 'my-model')")
        name = model.model_type
    if not name or not callable(model) and not isinstance(model, ModelMetadata):
        raise ValueError(
            f"cannot register {model!r} as {name!r}: expected a ModelMetadata or a function"
        )
    if name in _catalog_names():
        raise ValueError(f"{name!r} is a model of the catalog: choose another name")
    with _lock:
        if _registered.setdefault(name, model) != model:
            raise ValueError(f"{name!r} is already registered as {_registered[name]!r}")


def list_registered_models() -> dict[str, str]:
    """Return `module:attribute` of each registered name, without importing any of them."""
    locations = {name: points[0].value for name, points in _entry_points().items()}
    with _lock:
        for name, entry in _registered.items():
            factory = entry.model if isinstance(entry, ModelMetadata) else entry
            qualname = getattr(factory, "__qualname__", type(factory).__qualname__)
            locations[name] = f"{factory.__module__}:{qualname}"
    catalog_names = _catalog_names()
    return {name: loc for name, loc in sorted(locations.items()) if name not in catalog_names}


def find_package(name: str) -> str | None:
    """Return the package, version and location of the entry point `name`, or None."""
    for point in _entry_points().get(name, []):
        if point.dist is not None:
            return f"{point.dist.name}=={point.dist.version} {point.value}"
    return None


def find_registered_model(name: str) -> RegisteredModel | None:
    """Return the entry registered as `name`, imported if necessary; None if there is none.

    Raises `ModelLoadingError` if it cannot be imported or if two packages register the same name.
    """
    with _lock:
        if name in _registered:
            return _registered[name]
    points = _entry_points().get(name, [])
    if not points:
        return None
    if len({point.value for point in points}) > 1:
        packages = " and ".join(_package(point) for point in points)
        raise ModelLoadingError(f"{name!r} is registered by {packages}: uninstall one of them")
    point = points[0]
    try:
        entry = point.load()
    except Exception as error:
        raise ModelLoadingError(
            f"cannot import model {name!r} of {_package(point)} from {point.value}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(entry, ModelMetadata) and not callable(entry):
        raise ModelLoadingError(
            f"model {name!r} of {_package(point)} must be a ModelMetadata or a function, "
            f"got {type(entry).__name__}"
        )
    return cast(RegisteredModel, entry)


def load_registered_network(name: str) -> nn.Module:
    """Create the network registered as `name`, with its weights."""
    model = _load_registered_model(name)
    if model is None:
        catalog = load_catalog()
        names = {*catalog.bags, *catalog.checkpoints, *catalog.networks}
        raise ModelNotFound(name, names | {*list_registered_models()})
    if isinstance(model, ModelMetadata):
        raise ModelLoadingError(
            f"{name!r} is a type of network without weights: "
            "pass a config and a checkpoint to Separator.from_pretrained"
        )
    return model.eval()


def find_metadata(model_type: str) -> ModelMetadata[Any]:
    """Return the metadata registered as `model_type`; raise `ConfigError` if there is none."""
    model = _load_registered_model(model_type)
    if isinstance(model, ModelMetadata):
        return model
    if model is not None:
        raise ConfigError(
            f"model_type: {model_type!r} is a network with weights, not a ModelMetadata: "
            f"use Separator({model_type!r}) without config and checkpoint"
        )
    community = find_community_metadata(model_type)
    if community is not None:
        return community
    names = ", ".join(list_registered_models()) or "none"
    raise ConfigError(
        f"model_type: no network is registered as {model_type!r} (registered: {names}); install "
        "its package, call register_model, or specify its module and class"
    )


def _load_registered_model(name: str) -> ModelMetadata[Any] | nn.Module | None:
    """Return the metadata or the network registered as `name`, after calling its function."""
    entry = find_registered_model(name)
    if entry is None or isinstance(entry, ModelMetadata):
        return entry
    from torch import nn

    model = entry()
    if not isinstance(model, ModelMetadata | nn.Module):
        raise ModelLoadingError(
            f"the function of {name!r} must return a network or a ModelMetadata, "
            f"got {type(model).__name__}"
        )
    return model


def _entry_points() -> dict[str, list[EntryPoint]]:
    points_by_name: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        points_by_name.setdefault(point.name, []).append(point)
    return points_by_name


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package"


def _catalog_names() -> set[str]:
    return {*load_catalog().bags, *load_catalog().checkpoints}
