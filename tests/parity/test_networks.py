"""The networks answer what upstream's `demucs` 4.1.0 answers with the same weights.

All configurations are bit-equal (`torch.equal`) on a processor, except where

* `wiener_iters` >= 0: the filter is the same formula in another order of operations;
* a transformer attends to itself: upstream's attention takes a fused path in evaluation, ours
  `scaled_dot_product_attention`. With that path switched off upstream itself agrees bit for bit,
  which is tested too.

Those must agree to 100 dB and to 1e-5 of full scale: the same sums in another order.
"""

import inspect
import itertools
import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from demucs import demucs as upstream_demucs
from demucs import hdemucs as upstream_hdemucs
from demucs import htdemucs as upstream_htdemucs
from torch import Tensor, nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.wdemucs import WDemucs
from tests.helpers.networks import noise, randomise

UPSTREAM: dict[type[nn.Module], type[nn.Module]] = {
    Demucs: upstream_demucs.Demucs,
    HDemucs: upstream_hdemucs.HDemucs,
    HTDemucs: upstream_htdemucs.HTDemucs,
}
SOURCES = ["drums", "vocals"]
WAVE: dict[str, Any] = {"sources": SOURCES, "channels": 4, "depth": 4, "dconv_comp": 1}
# Enough levels to reach one bin, merge, and go on over time: 32 bins, 8, 1.
SHORT: dict[str, Any] = {
    "sources": SOURCES,
    "channels": 4,
    "nfft": 64,
    "depth": 3,
    "norm_starts": 2,
    "norm_groups": 2,
    "dconv_comp": 1,
    "dconv_lstm": 9,
    "dconv_attn": 9,
}
# One transformer layer of each kind on 8 bins by 32 frames.
TOKENS: dict[str, Any] = {
    "sources": SOURCES,
    "channels": 4,
    "nfft": 256,
    "depth": 2,
    "t_layers": 2,
    "t_hidden_scale": 2.0,
    "t_heads": 2,
    "dconv_comp": 2,
    "samplerate": 1000,
    "segment": 2,
}

EXACT: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (Demucs, WAVE),
    (Demucs, WAVE | {"resample": False}),
    (Demucs, WAVE | {"resample": False, "normalize": False}),
    (Demucs, WAVE | {"lstm_layers": 1, "dconv_mode": 0}),
    (Demucs, WAVE | {"lstm_layers": 2, "gelu": False, "glu": False, "dconv_mode": 0}),
    (Demucs, WAVE | {"rewrite": False, "dconv_mode": 3}),
    (Demucs, WAVE | {"dconv_mode": 2, "dconv_depth": -2, "norm_starts": 0, "norm_groups": 2}),
    (Demucs, WAVE | {"dconv_lstm": 1, "dconv_attn": 2, "dconv_mode": 3}),
    (Demucs, WAVE | {"growth": 1.5, "context": 2, "kernel_size": 6, "stride": 2}),
    (Demucs, WAVE | {"audio_channels": 1, "sources": list("abcdef")}),
    (Demucs, WAVE | {"depth": 2, "dconv_lstm": 0, "dconv_attn": 0, "resample": False}),
    (HDemucs, {"sources": SOURCES, "channels": 4, "dconv_mode": 3}),
    (HDemucs, {"sources": SOURCES, "channels": 4, "hybrid_old": True, "dconv_comp": 2}),
    (HDemucs, SHORT),
    (HDemucs, SHORT | {"dconv_mode": 3, "dconv_lstm": 2, "dconv_attn": 2}),
    (HDemucs, SHORT | {"dconv_mode": 1, "dconv_lstm": 1}),
    (HDemucs, SHORT | {"dconv_mode": 2, "dconv_attn": 1}),
    (HDemucs, SHORT | {"dconv_mode": 2, "dconv_depth": 3}),
    (HDemucs, SHORT | {"dconv_mode": 0, "rewrite": False}),
    (HDemucs, SHORT | {"dconv_mode": 3, "rewrite": False}),
    (HDemucs, SHORT | {"hybrid": False}),
    (HDemucs, SHORT | {"hybrid": False, "cac": False, "wiener_iters": -1}),
    (HDemucs, SHORT | {"cac": False, "wiener_iters": -1, "end_iters": -1}),
    (HDemucs, SHORT | {"hybrid_old": True}),
    (HDemucs, SHORT | {"freq_emb": 0}),
    (HDemucs, SHORT | {"freq_emb": 1.0, "emb_scale": 3, "emb_smooth": False}),
    (HDemucs, SHORT | {"channels_time": 6, "growth": 3}),
    (HDemucs, SHORT | {"channels_time": 6, "channels": 2, "dconv_mode": 3}),
    (HDemucs, SHORT | {"norm_starts": 0, "norm_groups": 1, "context": 2, "context_enc": 1}),
    (HDemucs, SHORT | {"context": 0, "time_stride": 4}),
    (HDemucs, SHORT | {"depth": 4, "growth": 1.5, "norm_groups": 1}),
    (HDemucs, SHORT | {"audio_channels": 1, "sources": ["solo"]}),
    (HDemucs, SHORT | {"audio_channels": 3, "sources": list("abcde")}),
    (HDemucs, SHORT | {"nfft": 256, "depth": 4, "multi_freqs": [0.25, 0.5], "norm_starts": 3}),
    (
        HDemucs,
        SHORT | {"nfft": 1024, "depth": 5, "multi_freqs": [0.4], "norm_starts": 2, "dconv_mode": 3},
    ),
    (HTDemucs, TOKENS | {"t_layers": 0}),
    (HTDemucs, TOKENS | {"t_layers": 0, "bottom_channels": 12, "norm_starts": 1}),
    (HTDemucs, TOKENS | {"t_layers": 1, "t_cross_first": True}),
    (HTDemucs, TOKENS | {"t_layers": 0, "use_train_segment": False, "multi_freqs": [0.5]}),
]
WIENER: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (HDemucs, SHORT | {"cac": False}),
    (HDemucs, SHORT | {"cac": False, "wiener_iters": 1, "end_iters": 1}),
    (HDemucs, SHORT | {"cac": False, "wiener_iters": 2, "end_iters": 2, "wiener_residual": True}),
    (HDemucs, SHORT | {"cac": False, "wiener_iters": 1, "hybrid": False, "audio_channels": 1}),
    (HTDemucs, TOKENS | {"cac": False, "t_layers": 0, "wiener_residual": True}),
]
ATTENTION: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (HTDemucs, TOKENS),
    (HTDemucs, TOKENS | {"dconv_mode": 3, "bottom_channels": 16, "t_layers": 3}),
    (HTDemucs, TOKENS | {"t_emb": "cape"}),
    (HTDemucs, TOKENS | {"t_emb": "cape", "t_cape_mean_normalize": False}),
    (HTDemucs, TOKENS | {"t_emb": "scaled", "t_max_positions": 128}),
    (HTDemucs, TOKENS | {"t_norm_first": False}),
    (HTDemucs, TOKENS | {"t_norm_first": False, "t_group_norm": True, "t_gelu": False}),
    (HTDemucs, TOKENS | {"t_group_norm": 2, "t_norm_out": False}),
    (HTDemucs, TOKENS | {"t_norm_out": 2}),
    (HTDemucs, TOKENS | {"t_norm_in": False, "t_layer_scale": False}),
    (HTDemucs, TOKENS | {"t_norm_in": False, "t_norm_in_group": 2}),
    (HTDemucs, TOKENS | {"t_cross_first": True, "t_layers": 3}),
    (HTDemucs, TOKENS | {"t_weight_pos_embed": 0.3, "t_max_period": 500.0}),
    (HTDemucs, TOKENS | {"use_train_segment": False, "audio_channels": 1}),
    (HTDemucs, TOKENS | {"depth": 3}),
    (HTDemucs, TOKENS | {"segment": Fraction(39, 20), "sources": list("abcdef")}),
    (HTDemucs, TOKENS | {"t_dropout": 0.5, "t_lr": 1e-3, "t_weight_decay": 0.1}),
    (HTDemucs, TOKENS | {"multi_freqs": [0.5], "multi_freqs_depth": 1, "channels_time": 4}),
]


def pair(ours: type[nn.Module], arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our network and upstream's with the same random weights."""
    theirs = randomise(UPSTREAM[ours](**arguments))
    mine = ours(**arguments).eval()
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def windows(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Even and odd lengths, whole strides and not, two items and one."""
    channels = arguments.get("audio_channels", 2)
    lengths = [2000, 1024, 777]
    if "t_layers" in arguments and arguments.get("use_train_segment", True):
        lengths[0] = int(arguments["segment"] * arguments["samplerate"])
    if arguments.get("nfft", 4096) > 2048 and "depth" not in arguments:
        lengths = [8192, 5003]
    slow = arguments.get("dconv_lstm", 9) < 9 or not arguments.get("cac", True)
    if slow and "nfft" in arguments and "t_layers" not in arguments:
        lengths.append(6000)  # LSTMs read frames of 200 steps, filters windows of 300 frames
    for index, length in enumerate(lengths):
        items = [noise(channels, length, seed=index + item) for item in range(1 + index % 2)]
        yield torch.stack(items) + 0.01


@contextmanager
def without_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def name(case: object) -> str | None:
    if isinstance(case, type):
        return case.__name__
    assert isinstance(case, dict)
    basis = next(b for b in (TOKENS, WAVE, SHORT, {}) if b.keys() <= case.keys())
    changed = {key: value for key, value in case.items() if basis.get(key) != value}
    return "-".join(f"{key}={value}" for key, value in changed.items()) or "basis"


def assert_class_b(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    error = (mine - theirs).double()
    assert error.abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
    noise_power = error.square().sum().item()
    decibels = 10 * math.log10(theirs.double().square().sum().item() / (noise_power + 1e-30))
    assert decibels >= 100


@pytest.mark.parametrize(("ours", "arguments"), EXACT, ids=name)
def test_a_network_without_attention_is_bit_equal(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    mine, theirs = pair(ours, arguments)
    for mix in windows(arguments):
        with torch.no_grad():
            expected = theirs(mix)
            assert expected.std() > 1e-3  # there is something to compare
            assert torch.equal(mine(mix), expected)


@pytest.mark.parametrize(("ours", "arguments"), WIENER + ATTENTION, ids=name)
def test_the_same_sums_in_another_order(ours: type[nn.Module], arguments: dict[str, Any]) -> None:
    mine, theirs = pair(ours, arguments)
    for mix in windows(arguments):
        with torch.no_grad():
            assert_class_b(mine(mix), theirs(mix))


@pytest.mark.parametrize(("ours", "arguments"), ATTENTION, ids=name)
def test_attention_is_bit_equal_to_upstream_without_its_fused_path(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    mine, theirs = pair(ours, arguments)
    for mix in windows(arguments):
        with torch.no_grad(), without_fused_attention():
            assert torch.equal(mine(mix), theirs(mix))


def test_the_released_shape_answers_what_upstream_answers() -> None:
    arguments = {
        "sources": ["drums", "bass", "other", "vocals"],
        "bottom_channels": 512,
        "dconv_mode": 3,
        "segment": Fraction(39, 5),
    }
    mine, theirs = pair(HTDemucs, arguments)
    state = mine.state_dict()
    assert len(state) == 533
    assert sum(tensor.numel() for tensor in state.values()) == 41_984_456
    mix = noise(2, 343_980)[None]
    with torch.inference_mode():
        assert_class_b(mine(mix), theirs(mix))


@pytest.mark.parametrize("ours", UPSTREAM, ids=name)
def test_the_arguments_are_upstreams(ours: type[nn.Module]) -> None:
    def arguments(network: type[nn.Module]) -> dict[str, Any]:
        parameters = inspect.signature(network).parameters.values()
        return {p.name: list(d) if isinstance(d := p.default, tuple) else d for p in parameters}

    mine, theirs = arguments(ours), arguments(UPSTREAM[ours])
    assert list(mine) == list(theirs)
    assert mine == theirs


def test_wdemucs_is_hdemucs() -> None:
    assert WDemucs is HDemucs


@pytest.mark.parametrize(
    ("ours", "arguments"),
    [(Demucs, WAVE | {"lstm_layers": 1, "dconv_lstm": 2}), (HDemucs, SHORT), (HTDemucs, TOKENS)],
    ids=name,
)
def test_a_network_is_built_on_meta_and_filled_by_assignment(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    filled, _ = pair(ours, arguments)
    with torch.device("meta"):
        network = ours(**arguments).eval()
    network.load_state_dict(filled.state_dict(), assign=True)
    assert not [key for key, _ in network.named_buffers()]
    mix = next(windows(arguments))
    with torch.no_grad():
        assert torch.equal(network(mix), filled(mix))


def test_tables_made_in_inference_mode_serve_later_under_autograd() -> None:
    arguments = TOKENS | {"segment": 1.234}  # a length that no other test has cached
    network = HTDemucs(**arguments)
    mix = noise(2, 1234)[None]
    with torch.inference_mode():
        expected = network(mix)
    answer = network(mix)
    answer.sum().backward()
    # Attention takes another kernel when a gradient is wanted.
    torch.testing.assert_close(answer.detach(), expected.clone(), rtol=1e-4, atol=1e-5)
    gradient = network.encoder[0].conv.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_network_follows_its_weights_to_double_precision() -> None:
    network = HTDemucs(**TOKENS).eval()
    mix = noise(2, 2000)[None]
    with torch.no_grad():
        single = network(mix)
        double = network.double()(mix.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


def test_nothing_is_drawn_and_nothing_of_the_callers_is_written() -> None:
    for ours, arguments in (
        (Demucs, WAVE),
        (HDemucs, SHORT | {"cac": False}),
        (HTDemucs, TOKENS | {"t_sin_random_shift": 5, "t_dropout": 0.5}),
    ):
        network = ours(**arguments).eval()
        mix = next(windows(arguments))
        before = mix.clone()
        states = random.getstate(), torch.get_rng_state()
        with torch.no_grad():
            first, second = network(mix), network(mix)
        assert torch.equal(first, second)
        assert torch.equal(mix, before)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize(
    ("ours", "arguments", "word"),
    [
        (HTDemucs, TOKENS | {"t_sparse_self_attn": True}, "sparse"),
        (HTDemucs, TOKENS | {"t_sparse_cross_attn": True}, "sparse"),
        (HTDemucs, TOKENS | {"t_emb": "rope"}, "rope"),
        (HTDemucs, TOKENS | {"t_heads": 3}, "t_heads"),
        (HTDemucs, TOKENS | {"channels": 3, "t_heads": 2}, "multiple of 4"),
        (HDemucs, SHORT | {"hybrid": False, "hybrid_old": True}, "hybrid_old"),
        (HDemucs, SHORT | {"wiener_iters": 1}, "end_iters"),
        (HDemucs, SHORT | {"dconv_attn": 0, "channels": 6}, "heads"),
        (HDemucs, SHORT | {"dconv_comp": 5}, "dconv_comp=5 leaves none of 4 channels"),
        (HDemucs, SHORT | {"multi_freqs": [0.5], "norm_starts": 0}, "norm_starts"),
        (HDemucs, SHORT | {"multi_freqs": [0.5], "multi_freqs_depth": 2}, "too few bins"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    ours: type[nn.Module], arguments: dict[str, Any], word: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=word):
        ours(**arguments)


def test_a_window_longer_than_the_training_is_refused() -> None:
    network = HTDemucs(**TOKENS).eval()
    assert network.valid_length(1) == network.valid_length(2000) == 2000
    with pytest.raises(ValueError, match="2001"):
        network(noise(2, 2001)[None])
    learnt = HTDemucs(**TOKENS | {"t_emb": "scaled", "t_max_positions": 100}).eval()
    with pytest.raises(ValueError, match="t_max_positions"):
        learnt(noise(2, 2000)[None])


def test_valid_lengths_of_demucs_are_upstreams() -> None:
    for resample, depth, stride in itertools.product([False, True], [1, 3], [2, 4]):
        arguments = WAVE | {"resample": resample, "depth": depth, "stride": stride}
        with torch.device("meta"):
            mine = Demucs(**arguments)
        theirs = UPSTREAM[Demucs](**arguments)
        for length in [1, 7, 100, 12345, 441_000]:
            valid = mine.valid_length(length)
            assert valid == theirs.valid_length(length)
            assert mine.valid_length(valid) == valid >= length


def test_norms_without_rewriting_load_although_upstream_takes_them_for_old_weights() -> None:
    network = randomise(Demucs(**WAVE | {"rewrite": False, "norm_starts": 1, "dconv_mode": 3}))
    assert "decoder.0.2.weight" in network.state_dict()
    network.load_state_dict(network.state_dict())


def test_weights_of_the_first_demucs_are_understood() -> None:
    """Before there were norms, the second convolution of a layer was at position 2."""
    arguments = WAVE | {"dconv_mode": 0}
    network, _ = pair(Demucs, arguments)
    old = {
        re.sub(r"^(encoder|decoder)\.(\d)\.3\.", r"\1.\2.2.", key): value
        for key, value in network.state_dict().items()
    }
    assert old.keys() != network.state_dict().keys()
    keys = list(old)
    fresh = Demucs(**arguments).eval()
    fresh.load_state_dict(old)
    assert list(old) == keys  # the caller's mapping stays what it was
    mix = next(windows(arguments))
    with torch.no_grad():
        assert torch.equal(fresh(mix), network(mix))
