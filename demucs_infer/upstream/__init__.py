"""Offer the layers of the networks with upstream's constructors, for programs that build networks.

The layers compute the same as upstream's and have the same names in a state dict. Arguments that
only matter in training (dropout, initial values) are ignored; values that no network of the catalog
uses raise a `ValueError`.
"""

from typing import Any


class LayerFront(type):
    """Metaclass of upstream's layer classes: `isinstance` also accepts the layers of networks.

    These are instances of `layers_of_networks`, the classes that this package uses.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        layers = vars(cls).get("layers_of_networks", cls)
        return type.__instancecheck__(cls, instance) or (
            layers is not cls and isinstance(instance, layers)
        )


def require(name: str, value: object, supported: object) -> None:
    """Raise `ValueError` unless the argument `name` has the only supported value."""
    if value != supported:
        raise ValueError(
            f"unsupported {name}={value!r}: use {name}={supported!r}, as all released networks do"
        )
