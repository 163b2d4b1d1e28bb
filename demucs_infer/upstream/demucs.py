"""Offer the layers of upstream's `demucs.demucs`."""

from typing import Any

from demucs_infer import layers
from demucs_infer.layers import BLSTM as BLSTM
from demucs_infer.layers import DConvConfig
from demucs_infer.upstream import LayerFront, require


def make_dconv_config(
    compress: float = 4,
    depth: int = 2,
    init: float = 1e-4,
    norm: bool = True,
    attn: bool = False,
    heads: int = 4,
    ndecay: int = 4,
    lstm: bool = False,
    gelu: bool = True,
    kernel: int = 3,
    dilate: bool = True,  # noqa: ARG001 (as in upstream: a negative depth decides it)
) -> DConvConfig:
    """Make a `DConvConfig` from upstream's arguments of `DConv`."""
    for name, value, supported in (
        ("norm", norm, True),
        ("gelu", gelu, True),
        ("heads", heads, 4),
        ("ndecay", ndecay, 4),
        ("kernel", kernel, 3),
    ):
        require(name, value, supported)
    return DConvConfig(depth=depth, compress=compress, init=init, lstm=lstm, attn=attn)


class DConv(layers.DConv, metaclass=LayerFront):
    """Residual branches of dilated convolutions with few channels: (B, C, T) -> (B, C, T)."""

    layers_of_networks = layers.DConv

    def __init__(
        self,
        channels: int,
        compress: float = 4,
        depth: int = 2,
        init: float = 1e-4,
        norm: bool = True,
        attn: bool = False,
        heads: int = 4,
        ndecay: int = 4,
        lstm: bool = False,
        gelu: bool = True,
        kernel: int = 3,
        dilate: bool = True,
    ) -> None:
        arguments: dict[str, Any] = locals()
        names = make_dconv_config.__annotations__.keys() & arguments.keys()
        super().__init__(channels, make_dconv_config(**{name: arguments[name] for name in names}))


class LocalState(layers.LocalState, metaclass=LayerFront):
    """Self-attention that decays with distance: (B, C, T) -> (B, C, T)."""

    layers_of_networks = layers.LocalState

    def __init__(self, channels: int, heads: int = 4, nfreqs: int = 0, ndecay: int = 4) -> None:
        require("nfreqs", nfreqs, 0)
        require("ndecay", ndecay, 4)
        super().__init__(channels, heads)
