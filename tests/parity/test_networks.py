"""The networks give the results of upstream's `demucs` 4.1.0 with the same weights.

All configurations are bit-equal (`torch.equal`) on a CPU, except where

* `wiener_iters` >= 0: the filter is the same formula in another order of operations;
* a transformer has self-attention: upstream's takes a fused path in evaluation, ours
  `scaled_dot_product_attention`. With that path disabled, upstream is bit-equal, which is tested.

Those must agree in class B (the same sums in another order): 100 dB and 1e-5 of full scale.
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
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import randomize

UPSTREAM: dict[type[nn.Module], type[nn.Module]] = {
    Demucs: upstream_demucs.Demucs,
    HDemucs: upstream_hdemucs.HDemucs,
    HTDemucs: upstream_htdemucs.HTDemucs,
}
SOURCES = ["drums", "vocals"]
WAVE: dict[str, Any] = {"sources": SOURCES, "channels": 4, "depth": 4, "dconv_comp": 1}
# Enough stages to reach one bin, merge, and go on over time: 32 bins, 8, 1.
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

Cases = dict[str, tuple[type[nn.Module], dict[str, Any]]]
"""What a case is for -> the class and its arguments."""

EXACT: Cases = {
    "demucs: default options": (Demucs, WAVE),
    "demucs: no resampling": (Demucs, WAVE | {"resample": False}),
    "demucs: no normalization": (Demucs, WAVE | {"resample": False, "normalize": False}),
    "demucs: v2, LSTM and no branches": (Demucs, WAVE | {"lstm_layers": 1, "dconv_mode": 0}),
    "demucs: v1, ReLU everywhere": (
        Demucs,
        WAVE | {"lstm_layers": 2, "gelu": False, "glu": False, "dconv_mode": 0},
    ),
    "demucs: no rewrite convolution": (Demucs, WAVE | {"rewrite": False, "dconv_mode": 3}),
    "demucs: undilated branches in the decoder, norms everywhere": (
        Demucs,
        WAVE | {"dconv_mode": 2, "dconv_depth": -2, "norm_starts": 0, "norm_groups": 2},
    ),
    "demucs: LSTM and attention in the branches": (
        Demucs,
        WAVE | {"dconv_lstm": 1, "dconv_attn": 2, "dconv_mode": 3},
    ),
    "demucs: other growth, kernel and stride": (
        Demucs,
        WAVE | {"growth": 1.5, "context": 2, "kernel_size": 6, "stride": 2},
    ),
    "demucs: mono, six sources": (Demucs, WAVE | {"audio_channels": 1, "sources": list("abcdef")}),
    "demucs: LSTM frames of 200 steps": (
        Demucs,
        WAVE | {"depth": 2, "dconv_lstm": 0, "dconv_attn": 0, "resample": False},
    ),
    "hdemucs: released depth and nfft": (
        HDemucs,
        {"sources": SOURCES, "channels": 4, "dconv_mode": 3},
    ),
    "hdemucs: padding of the first hybrids": (
        HDemucs,
        {"sources": SOURCES, "channels": 4, "hybrid_old": True, "dconv_comp": 2},
    ),
    "hdemucs: branches merge": (HDemucs, SHORT),
    "hdemucs: LSTM and attention in the innermost stage": (
        HDemucs,
        SHORT | {"dconv_mode": 3, "dconv_lstm": 2, "dconv_attn": 2},
    ),
    "hdemucs: LSTM in the encoder": (HDemucs, SHORT | {"dconv_mode": 1, "dconv_lstm": 1}),
    "hdemucs: attention in the decoder": (HDemucs, SHORT | {"dconv_mode": 2, "dconv_attn": 1}),
    "hdemucs: three branches": (HDemucs, SHORT | {"dconv_mode": 2, "dconv_depth": 3}),
    "hdemucs: no branches, no rewrite": (HDemucs, SHORT | {"dconv_mode": 0, "rewrite": False}),
    "hdemucs: branches without rewrite": (HDemucs, SHORT | {"dconv_mode": 3, "rewrite": False}),
    "hdemucs: spectrogram only": (HDemucs, SHORT | {"hybrid": False}),
    "hdemucs: spectrogram only, magnitudes": (
        HDemucs,
        SHORT | {"hybrid": False, "cac": False, "wiener_iters": -1},
    ),
    "hdemucs: magnitudes with the phase of the mix": (
        HDemucs,
        SHORT | {"cac": False, "wiener_iters": -1, "end_iters": -1},
    ),
    "hdemucs: old padding where branches merge": (HDemucs, SHORT | {"hybrid_old": True}),
    "hdemucs: no frequency embedding": (HDemucs, SHORT | {"freq_emb": 0}),
    "hdemucs: scaled frequency embedding": (
        HDemucs,
        SHORT | {"freq_emb": 1.0, "emb_scale": 3, "emb_smooth": False},
    ),
    "hdemucs: wider time branch": (HDemucs, SHORT | {"channels_time": 6, "growth": 3}),
    "hdemucs: narrower frequency branch": (
        HDemucs,
        SHORT | {"channels_time": 6, "channels": 2, "dconv_mode": 3},
    ),
    "hdemucs: norms everywhere, wide contexts": (
        HDemucs,
        SHORT | {"norm_starts": 0, "norm_groups": 1, "context": 2, "context_enc": 1},
    ),
    "hdemucs: no context, other time stride": (HDemucs, SHORT | {"context": 0, "time_stride": 4}),
    "hdemucs: two stages after the merge": (
        HDemucs,
        SHORT | {"depth": 4, "growth": 1.5, "norm_groups": 1},
    ),
    "hdemucs: mono, one source": (HDemucs, SHORT | {"audio_channels": 1, "sources": ["solo"]}),
    "hdemucs: three channels, five sources": (
        HDemucs,
        SHORT | {"audio_channels": 3, "sources": list("abcde")},
    ),
    "hdemucs: three bands": (
        HDemucs,
        SHORT | {"nfft": 256, "depth": 4, "multi_freqs": [0.25, 0.5], "norm_starts": 3},
    ),
    "hdemucs: bands with branches": (
        HDemucs,
        SHORT | {"nfft": 1024, "depth": 5, "multi_freqs": [0.4], "norm_starts": 2, "dconv_mode": 3},
    ),
    "htdemucs: no transformer": (HTDemucs, TOKENS | {"t_layers": 0}),
    "htdemucs: bottleneck channels without transformer": (
        HTDemucs,
        TOKENS | {"t_layers": 0, "bottom_channels": 12, "norm_starts": 1},
    ),
    "htdemucs: cross-attention only": (HTDemucs, TOKENS | {"t_layers": 1, "t_cross_first": True}),
    "htdemucs: windows of any length, bands": (
        HTDemucs,
        TOKENS | {"t_layers": 0, "use_train_segment": False, "multi_freqs": [0.5]},
    ),
}
"""Networks without self-attention and without a Wiener filter."""

WIENER: Cases = {
    "hdemucs: phase of the mix by the filter": (HDemucs, SHORT | {"cac": False}),
    "hdemucs: one iteration": (
        HDemucs,
        SHORT | {"cac": False, "wiener_iters": 1, "end_iters": 1},
    ),
    "hdemucs: two iterations with the residual": (
        HDemucs,
        SHORT | {"cac": False, "wiener_iters": 2, "end_iters": 2, "wiener_residual": True},
    ),
    "hdemucs: one iteration, mono": (
        HDemucs,
        SHORT | {"cac": False, "wiener_iters": 1, "hybrid": False, "audio_channels": 1},
    ),
    "htdemucs: residual without iterations": (
        HTDemucs,
        TOKENS | {"cac": False, "t_layers": 0, "wiener_residual": True},
    ),
}
ATTENTION: Cases = {
    "htdemucs: one layer of each kind": (HTDemucs, TOKENS),
    "htdemucs: bottleneck channels, branches in both": (
        HTDemucs,
        TOKENS | {"dconv_mode": 3, "bottom_channels": 16, "t_layers": 3},
    ),
    "htdemucs: cape positions": (HTDemucs, TOKENS | {"t_emb": "cape"}),
    "htdemucs: cape positions from zero": (
        HTDemucs,
        TOKENS | {"t_emb": "cape", "t_cape_mean_normalize": False},
    ),
    "htdemucs: learned positions": (HTDemucs, TOKENS | {"t_emb": "scaled", "t_max_positions": 128}),
    "htdemucs: norms last": (HTDemucs, TOKENS | {"t_norm_first": False}),
    "htdemucs: group norms last, ReLU": (
        HTDemucs,
        TOKENS | {"t_norm_first": False, "t_group_norm": True, "t_gelu": False},
    ),
    "htdemucs: two norm groups, none at the output": (
        HTDemucs,
        TOKENS | {"t_group_norm": 2, "t_norm_out": False},
    ),
    "htdemucs: even number of output groups means no norm": (HTDemucs, TOKENS | {"t_norm_out": 2}),
    "htdemucs: no input norm, no layer scale": (
        HTDemucs,
        TOKENS | {"t_norm_in": False, "t_layer_scale": False},
    ),
    "htdemucs: group norm at the input": (
        HTDemucs,
        TOKENS | {"t_norm_in": False, "t_norm_in_group": 2},
    ),
    "htdemucs: cross-attention first": (HTDemucs, TOKENS | {"t_cross_first": True, "t_layers": 3}),
    "htdemucs: weighted positions": (
        HTDemucs,
        TOKENS | {"t_weight_pos_embed": 0.3, "t_max_period": 500.0},
    ),
    "htdemucs: mono windows of any length": (
        HTDemucs,
        TOKENS | {"use_train_segment": False, "audio_channels": 1},
    ),
    "htdemucs: three stages": (HTDemucs, TOKENS | {"depth": 3}),
    "htdemucs: fractional segment, six sources": (
        HTDemucs,
        TOKENS | {"segment": Fraction(39, 20), "sources": list("abcdef")},
    ),
    "htdemucs: arguments of the training only": (
        HTDemucs,
        TOKENS | {"t_dropout": 0.5, "t_lr": 1e-3, "t_weight_decay": 0.1},
    ),
    "htdemucs: bands in the first stage only": (
        HTDemucs,
        TOKENS | {"multi_freqs": [0.5], "multi_freqs_depth": 1, "channels_time": 4},
    ),
}


def make_pair(ours: type[nn.Module], arguments: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Build our network and upstream's with the same random weights."""
    theirs = randomize(UPSTREAM[ours](**arguments))
    mine = ours(**arguments).eval()
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def make_windows(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Yield batches of even and odd lengths, multiples of the stride or not."""
    channels = arguments.get("audio_channels", 2)
    lengths = [2000, 1024, 777]
    if "t_layers" in arguments and arguments.get("use_train_segment", True):
        lengths[0] = int(arguments["segment"] * arguments["samplerate"])
    if arguments.get("nfft", 4096) > 2048 and "depth" not in arguments:
        lengths = [8192, 5003]
    slow = arguments.get("dconv_lstm", 9) < 9 or not arguments.get("cac", True)
    if slow and "nfft" in arguments and "t_layers" not in arguments:
        lengths.append(6000)  # more than 200 LSTM steps, 300 filter frames
    for index, length in enumerate(lengths):
        items = [make_noise(channels, length, seed=index + item) for item in range(1 + index % 2)]
        yield torch.stack(items) + 0.01


@contextmanager
def without_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def parametrize(cases: Cases) -> pytest.MarkDecorator:
    """Run a test for every case, under what the case is for."""
    return pytest.mark.parametrize(("ours", "arguments"), cases.values(), ids=cases)


def assert_class_b(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    error = (mine - theirs).double()
    assert error.abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
    noise_power = error.square().sum().item()
    decibels = 10 * math.log10(theirs.double().square().sum().item() / (noise_power + 1e-30))
    assert decibels >= 100


@parametrize(EXACT)
def test_network_without_attention_is_bit_equal(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    mine, theirs = make_pair(ours, arguments)
    for mix in make_windows(arguments):
        with torch.no_grad():
            expected = theirs(mix)
            assert expected.std() > 1e-3  # not silence
            assert torch.equal(mine(mix), expected)


@parametrize(WIENER | ATTENTION)
def test_network_matches_in_class_b(ours: type[nn.Module], arguments: dict[str, Any]) -> None:
    mine, theirs = make_pair(ours, arguments)
    for mix in make_windows(arguments):
        with torch.no_grad():
            assert_class_b(mine(mix), theirs(mix))


@parametrize(ATTENTION)
def test_attention_is_bit_equal_without_upstreams_fused_path(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    mine, theirs = make_pair(ours, arguments)
    for mix in make_windows(arguments):
        with torch.no_grad(), without_fused_attention():
            assert torch.equal(mine(mix), theirs(mix))


def test_released_shape_matches_in_class_b() -> None:
    arguments = {
        "sources": ["drums", "bass", "other", "vocals"],
        "bottom_channels": 512,
        "dconv_mode": 3,
        "segment": Fraction(39, 5),
    }
    mine, theirs = make_pair(HTDemucs, arguments)
    state = mine.state_dict()
    assert len(state) == 533
    assert sum(tensor.numel() for tensor in state.values()) == 41_984_456
    mix = make_noise(2, 343_980)[None]
    with torch.inference_mode():
        assert_class_b(mine(mix), theirs(mix))


@pytest.mark.parametrize("ours", UPSTREAM, ids=lambda network: network.__name__)
def test_constructor_has_upstreams_arguments_and_defaults(ours: type[nn.Module]) -> None:
    def arguments(network: type[nn.Module]) -> dict[str, Any]:
        parameters = inspect.signature(network).parameters.values()
        return {p.name: list(d) if isinstance(d := p.default, tuple) else d for p in parameters}

    mine, theirs = arguments(ours), arguments(UPSTREAM[ours])
    assert list(mine) == list(theirs)
    assert mine == theirs


def test_wdemucs_is_hdemucs() -> None:
    assert WDemucs is HDemucs


@parametrize(
    {
        "demucs with LSTMs": (Demucs, WAVE | {"lstm_layers": 1, "dconv_lstm": 2}),
        "hdemucs": (HDemucs, SHORT),
        "htdemucs": (HTDemucs, TOKENS),
    }
)
def test_network_built_on_meta_loads_by_assignment(
    ours: type[nn.Module], arguments: dict[str, Any]
) -> None:
    filled, _ = make_pair(ours, arguments)
    with torch.device("meta"):
        network = ours(**arguments).eval()
    network.load_state_dict(filled.state_dict(), assign=True)
    assert not [key for key, _ in network.named_buffers()]
    mix = next(make_windows(arguments))
    with torch.no_grad():
        assert torch.equal(network(mix), filled(mix))


def test_tables_cached_in_inference_mode_work_under_autograd() -> None:
    arguments = TOKENS | {"segment": 1.234}  # a length no other test uses
    network = HTDemucs(**arguments)
    mix = make_noise(2, 1234)[None]
    with torch.inference_mode():
        expected = network(mix)
    answer = network(mix)
    answer.sum().backward()
    # Attention uses another kernel when gradients are required.
    torch.testing.assert_close(answer.detach(), expected.clone(), rtol=1e-4, atol=1e-5)
    gradient = network.encoder[0].conv.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_network_computes_in_the_precision_of_its_weights() -> None:
    network = HTDemucs(**TOKENS).eval()
    mix = make_noise(2, 2000)[None]
    with torch.no_grad():
        single = network(mix)
        double = network.double()(mix.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


def test_forward_draws_nothing_and_leaves_its_input_alone() -> None:
    for ours, arguments in (
        (Demucs, WAVE),
        (HDemucs, SHORT | {"cac": False}),
        (HTDemucs, TOKENS | {"t_sin_random_shift": 5, "t_dropout": 0.5}),
    ):
        network = ours(**arguments).eval()
        mix = next(make_windows(arguments))
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
def test_impossible_arguments_are_refused_by_name(
    ours: type[nn.Module], arguments: dict[str, Any], word: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=word):
        ours(**arguments)


def test_window_longer_than_the_training_is_refused() -> None:
    network = HTDemucs(**TOKENS).eval()
    assert network.valid_length(1) == network.valid_length(2000) == 2000
    with pytest.raises(ValueError, match="2001"):
        network(make_noise(2, 2001)[None])
    learned = HTDemucs(**TOKENS | {"t_emb": "scaled", "t_max_positions": 100}).eval()
    with pytest.raises(ValueError, match="t_max_positions"):
        learned(make_noise(2, 2000)[None])


def test_valid_lengths_of_demucs_equal_upstream() -> None:
    for resample, depth, stride in itertools.product([False, True], [1, 3], [2, 4]):
        arguments = WAVE | {"resample": resample, "depth": depth, "stride": stride}
        with torch.device("meta"):
            mine = Demucs(**arguments)
        theirs = UPSTREAM[Demucs](**arguments)
        for length in [1, 7, 100, 12345, 441_000]:
            valid = mine.valid_length(length)
            assert valid == theirs.valid_length(length)
            assert mine.valid_length(valid) == valid >= length


def test_norms_without_rewrite_are_not_taken_for_old_weights() -> None:
    network = randomize(Demucs(**WAVE | {"rewrite": False, "norm_starts": 1, "dconv_mode": 3}))
    assert "decoder.0.2.weight" in network.state_dict()
    network.load_state_dict(network.state_dict())


def test_weights_of_the_first_demucs_load() -> None:
    """Before layers had norms, their second convolution was at position 2."""
    arguments = WAVE | {"dconv_mode": 0}
    network, _ = make_pair(Demucs, arguments)
    old = {
        re.sub(r"^(encoder|decoder)\.(\d)\.3\.", r"\1.\2.2.", key): value
        for key, value in network.state_dict().items()
    }
    assert old.keys() != network.state_dict().keys()
    keys = list(old)
    fresh = Demucs(**arguments).eval()
    fresh.load_state_dict(old)
    assert list(old) == keys  # the caller's mapping stays what it was
    mix = next(make_windows(arguments))
    with torch.no_grad():
        assert torch.equal(fresh(mix), network(mix))
