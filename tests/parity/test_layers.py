"""Layers that are built with upstream's constructors compute what upstream's do."""

import inspect
from typing import Any

import demucs.demucs
import demucs.hdemucs
import demucs.transformer
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import demucs_infer.demucs as our_demucs
import demucs_infer.hdemucs as our_hdemucs
import demucs_infer.transformer as our_transformer
from tests.helpers.networks import TINY, randomize

PACKAGES = {
    "demucs": (our_demucs, demucs.demucs),
    "hdemucs": (our_hdemucs, demucs.hdemucs),
    "transformer": (our_transformer, demucs.transformer),
}

WAVE = (2, 8, 300)
SPECTRUM = (2, 4, 64, 10)
TOKENS = (2, 9, 16)

LAYERS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "plain residual": ("demucs", "DConv", (8,), {}, (WAVE,)),
    "all in residual": (
        "demucs",
        "DConv",
        (8, 2, 3),
        {"init": 0.1, "attn": True, "lstm": True},
        (WAVE,),
    ),
    "undilated residual": ("hdemucs", "DConv", (8,), {"depth": -2}, (WAVE,)),
    "lstm": ("demucs", "BLSTM", (8,), {}, (WAVE,)),
    "lstm in frames": ("demucs", "BLSTM", (8, 2, 100, True), {}, (WAVE,)),
    "local attention": ("demucs", "LocalState", (8, 2), {}, (WAVE,)),
    "encoder": ("hdemucs", "HEncLayer", (4, 8), {"dconv_kw": {"compress": 2}}, (SPECTRUM,)),
    "time encoder": ("hdemucs", "HEncLayer", (8, 8), {"freq": False, "norm_groups": 2}, (WAVE,)),
    "bare encoder": (
        "hdemucs",
        "HEncLayer",
        (4, 8, 4, 2),
        {"dconv": False, "norm": False, "rewrite": False, "pad": False},
        (SPECTRUM,),
    ),
    "empty encoder": ("hdemucs", "HEncLayer", (8, 8), {"empty": True, "freq": False}, (WAVE,)),
    "self-attention": ("transformer", "MyTransformerEncoderLayer", (16, 4, 33), {}, (TOKENS,)),
    "self-attention as in htdemucs": (
        "transformer",
        "MyTransformerEncoderLayer",
        (16, 4),
        {
            "norm_first": True,
            "norm_out": True,
            "layer_scale": True,
            "activation": F.gelu,
            "batch_first": True,
        },
        (TOKENS,),
    ),
    "cross-attention": (
        "transformer",
        "CrossTransformerEncoderLayer",
        (16, 4),
        {"activation": "gelu"},
        ((9, 2, 16), (5, 2, 16)),
    ),
    "cross-attention with group norms": (
        "transformer",
        "CrossTransformerEncoderLayer",
        (16, 4),
        {"norm_first": True, "norm_out": 1, "group_norm": 2, "batch_first": True},
        (TOKENS, (2, 5, 16)),
    ),
    "transformer": (
        "transformer",
        "CrossTransformerEncoder",
        (16,),
        {"num_layers": 3, "norm_first": True, "num_heads": 4},
        ((2, 16, 4, 5), (2, 16, 7)),
    ),
    "transformer with learned positions": (
        "transformer",
        "CrossTransformerEncoder",
        (16, "scaled"),
        {"num_layers": 2, "cross_first": True, "num_heads": 4, "norm_in": False},
        ((2, 16, 4, 5), (2, 16, 7)),
    ),
    "group norm": ("transformer", "MyGroupNorm", (2, 16), {}, (TOKENS,)),
    "layer scale": ("transformer", "LayerScale", (8,), {"init": 0.5}, (WAVE,)),
}


def build(
    module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """Return our layer and upstream's, with the same weights."""
    ours, theirs = (getattr(package, name)(*args, **kwargs) for package in PACKAGES[module])
    assert [(key, weight.shape) for key, weight in ours.state_dict().items()] == [
        (key, weight.shape) for key, weight in theirs.state_dict().items()
    ]
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def signals(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("case", LAYERS)
def test_layer_computes_what_upstreams_does(case: str) -> None:
    module, name, args, kwargs, shapes = LAYERS[case]
    ours, theirs = build(module, name, args, kwargs)
    inputs = signals(*shapes)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="plain"),
        pytest.param({"last": True, "norm": False}, id="last"),
        pytest.param({"context_freq": False, "dconv_kw": {"depth": 1}}, id="context in time"),
    ],
)
def test_decoder_computes_what_upstreams_does(kwargs: dict[str, Any]) -> None:
    ours, theirs = build("hdemucs", "HDecLayer", (8, 4), kwargs)
    x, skip = signals((2, 8, 16, 10), (2, 8, 16, 10))
    with torch.no_grad():
        for mine, reference in zip(ours(x, skip, 10), theirs(x, skip, 10), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_bands_compute_what_upstreams_do(last: bool) -> None:
    bands = [
        (
            package.MultiWrap(package.HEncLayer(4, 8, norm=False), [0.3, 0.7]),
            package.MultiWrap(
                package.HDecLayer(8, 4, last, norm=False, context_freq=False), [0.3, 0.7]
            ),
        )
        for package in PACKAGES["hdemucs"]
    ]
    for mine, reference in zip(*bands, strict=True):
        mine.load_state_dict(randomize(reference).state_dict())
    (spectrum,) = signals((2, 4, 256, 10))
    (encoder, decoder), (their_encoder, their_decoder) = bands
    with torch.no_grad():
        x, reference = encoder(spectrum), their_encoder(spectrum)
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)
        y, expected = decoder(x, x, None), their_decoder(reference, reference, None)
        torch.testing.assert_close(y[0], expected[0], rtol=1e-4, atol=1e-5)
        assert y[1] is expected[1] is None
    for layer in (encoder, decoder):
        assert isinstance(layer, our_hdemucs.MultiWrap)  # type: ignore[arg-type]


@pytest.mark.parametrize("smooth", [False, True])
def test_frequency_embedding_has_upstreams_initial_values(smooth: bool) -> None:
    found = []
    for package in PACKAGES["hdemucs"]:
        torch.manual_seed(3)
        layer = package.ScaledEmbedding(6, 4, smooth=smooth)
        found.append((layer.weight, layer(torch.tensor([[0, 5]]))))
    torch.testing.assert_close(*found)


def test_position_embedding_has_upstreams_initial_values() -> None:
    found = []
    for package in PACKAGES["transformer"]:
        torch.manual_seed(3)
        layer = package.ScaledEmbedding(6, 4, 0.2, boost=2.0)
        found.append((layer.weight, layer(torch.tensor([[0, 5]]))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("create_sin_embedding", (7, 8), {}),
        ("create_sin_embedding", (7, 8), {"shift": 3, "max_period": 100.0}),
        ("create_2d_sin_embedding", (8, 3, 5), {}),
        ("create_2d_sin_embedding", (8, 3, 5), {"max_period": 100.0}),
        ("create_sin_embedding_cape", (7, 8, 3), {"mean_normalize": True, "augment": False}),
        ("create_sin_embedding_cape", (7, 8, 3), {"mean_normalize": False, "augment": False}),
        ("get_causal_mask", (5,), {}),
    ],
)
def test_table_is_upstreams_and_is_the_callers(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    ours, theirs = (getattr(package, name)(*args, **kwargs) for package in PACKAGES["transformer"])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.zero_()  # must not reach the tables of the networks
    torch.testing.assert_close(getattr(our_transformer, name)(*args, **kwargs), theirs)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("paddings", [(0, 0), (3, 5), (9, 2), (12, 30)])
def test_padding_is_upstreams(mode: str, paddings: tuple[int, int]) -> None:
    (x,) = signals((2, 10))
    ours, theirs = (package.pad1d(x, paddings, mode) for package in PACKAGES["hdemucs"])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("module", "name", "args", "kwargs"),
    [
        ("demucs", "DConv", (8,), {"kernel": 5}),
        ("demucs", "DConv", (8,), {"norm": False}),
        ("demucs", "DConv", (8,), {"gelu": False}),
        ("demucs", "LocalState", (8,), {"nfreqs": 2}),
        ("demucs", "LocalState", (9,), {"heads": 2}),
        ("hdemucs", "HEncLayer", (4, 8), {"dconv_kw": {"heads": 2}}),
        ("transformer", "CrossTransformerEncoder", (16,), {"sparse_self_attn": True}),
        ("transformer", "MyTransformerEncoderLayer", (16, 4), {"sparse": True}),
        ("transformer", "MyTransformerEncoderLayer", (16, 4), {"norm_first": True, "norm_out": 1}),
        ("transformer", "CrossTransformerEncoderLayer", (16, 4), {"activation": "tanh"}),
        ("transformer", "create_2d_sin_embedding", (6, 2, 2), {}),
    ],
)
def test_unsupported_argument_is_refused_by_name(
    module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    argument = "heads" if "dconv_kw" in kwargs else next(iter(kwargs), "d_model").split("_")[0]
    with pytest.raises(ValueError, match=argument):
        getattr(PACKAGES[module][0], name)(*args, **kwargs)


def test_band_layers_need_upstreams_conditions() -> None:
    for layer in (
        our_hdemucs.HEncLayer(4, 8),  # type: ignore[operator]
        our_hdemucs.HDecLayer(8, 4, norm=False),  # type: ignore[operator]
    ):
        with pytest.raises(ValueError, match="MultiWrap needs"):
            our_hdemucs.MultiWrap(layer, [0.5])  # type: ignore[operator]


def test_layers_of_a_network_are_instances_of_their_fronts() -> None:
    network = our_hdemucs.HDemucs(**{**TINY["HDemucs"], "multi_freqs": [0.5]})
    for name in ("DConv", "HEncLayer", "HDecLayer", "MultiWrap"):
        front = getattr(our_hdemucs, name)
        assert any(isinstance(layer, front) for layer in network.modules()), name
    embedding: Any = our_hdemucs.ScaledEmbedding
    assert isinstance(network.freq_emb, embedding)
    assert not isinstance(nn.Linear(1, 1), embedding)


def test_front_can_be_subclassed() -> None:
    front: Any = our_demucs.DConv

    class Mine(front):
        def __init__(self) -> None:
            super().__init__(8, depth=1)

    assert isinstance(Mine(), front)
    assert not isinstance(front(8), Mine)
    assert list(inspect.signature(front).parameters)[:3] == ["channels", "compress", "depth"]
