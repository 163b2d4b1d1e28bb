"""Offer the layers of the networks with upstream's constructors, for programs that build networks.

They are this package's layers: the same computation, the same names in a state dict. What only
training needs is ignored (dropout, initial values), and what no network of the catalog uses is
refused with a `ValueError`.
"""

from typing import Any


class LayerFront(type):
    """Metaclass of the fronts: a layer inside a network is an instance of its front too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        layers = vars(cls).get("layers_of_networks", cls)
        return type.__instancecheck__(cls, instance) or (
            layers is not cls and isinstance(instance, layers)
        )


def require(name: str, value: object, supported: object) -> None:
    """Raise `ValueError` unless an argument has the only value that is supported."""
    if value != supported:
        raise ValueError(
            f"unsupported {name}={value!r}: demucs-infer has {name}={supported!r} alone, "
            "as all released networks"
        )
