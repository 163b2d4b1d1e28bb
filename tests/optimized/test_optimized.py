"""The fast form of a network answers what the network answers, to the class that it promises."""

import copy
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import kernels
from demucs_infer.optimized import layout as memory
from demucs_infer.optimized import winograd as pairs
from demucs_infer.optimized.autocast import AutocastNetwork
from demucs_infer.optimized.compiled import compile_network
from demucs_infer.optimized.optimize import choose_precision, optimize
from tests.helpers.networks import TINY, noise, randomise

FOUR = ["drums", "bass", "other", "vocals"]
BASE = TINY["HTDemucs"]
HYBRIDS: dict[str, dict[str, Any]] = {
    "released": {"dconv_mode": 3, "bottom_channels": 32},
    "no bottom": {},
    "branches in the decoder only": {"dconv_mode": 2},
    "no branches": {"dconv_mode": 0},
    "mono, two sources": {"audio_channels": 1, "sources": ["a", "b"]},
    "cross first": {"t_cross_first": True, "t_layers": 2},
    "norms after": {"t_norm_first": False, "t_layers": 2},
    "relu": {"t_gelu": False},
    "no layer scale": {"t_layer_scale": False},
    "norms in the ladder": {"norm_starts": 1},
    "wide context": {"context": 2},
    "context in the encoder": {"context_enc": 1},
    "no rewriting": {"rewrite": False},
    "other time width": {"channels_time": 12, "t_layers": 0},
    "no transformer": {"t_layers": 0},
    "magnitudes": {"cac": False},
    "a kernel that is no whole number of strides": {"kernel_size": 6, "dconv_mode": 3},
}


def decibels(reference: Tensor, other: Tensor) -> float:
    difference = (reference - other).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / difference))


def both(network: nn.Module, mix: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    fast = optimize(network, precision=precision)
    assert fast is not network
    with torch.inference_mode():
        return network(mix), fast(mix)


def assert_class_b(network: nn.Module, mix: Tensor) -> None:
    plain, fast = both(network, mix)
    assert fast.shape == plain.shape
    # The same sums in another order: the project's bound for that is 100 dB and 1e-5 of full scale.
    assert decibels(plain, fast) >= 100
    assert (plain - fast).abs().max() <= 1e-5 * plain.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_with_a_transformer(name: str) -> None:
    kwargs = BASE | HYBRIDS[name]
    network = randomise(HTDemucs(**kwargs))
    mix = noise(network.audio_channels, 2 * 8000)[None].unflatten(-1, (2, -1)).transpose(1, 2)
    assert_class_b(network, mix.flatten(0, 1))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_bins_that_are_made_in_pairs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tile ends in the middle of one."""
    kwargs = BASE | {"channels": 96, "t_layers": 0, "sources": ["a"]}
    network = randomise(HTDemucs(**kwargs))
    assert pairs.supports(network.decoder[-1].rewrite.weight, torch.float32)
    monkeypatch.setattr(memory, "tiles", partial(in_rows, rows))
    assert_class_b(network, noise(2, 8000)[None])


def in_rows(rows: int, count: int, _bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


@pytest.mark.parametrize("kwargs", [{}, {"multi_freqs": [0.25, 0.5]}, {"dconv_mode": 3}])
def test_a_hybrid(kwargs: dict[str, Any]) -> None:
    network = randomise(HDemucs(**TINY["HDemucs"], **kwargs))
    assert_class_b(network, noise(2, 44_100 + 77)[None])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"dconv_mode": 3},
        {"rewrite": False},
        {"glu": False},
        {"gelu": False},
        {"depth": 5},
        {"kernel_size": 7, "stride": 3},
        {"kernel_size": 3, "stride": 1, "depth": 2},
    ],
)
def test_a_waveform_network(kwargs: dict[str, Any]) -> None:
    network = randomise(Demucs(**(TINY["Demucs"] | {"channels": 8} | kwargs)))
    assert_class_b(network, noise(2, 4321).expand(2, 2, -1))


def test_bins_that_a_stride_leaves_out() -> None:
    kwargs = {"t_layers": 0, "stride": 5, "multi_freqs": [0.5], "multi_freqs_depth": 3}
    assert_class_b(randomise(HTDemucs(**(BASE | kwargs))), noise(2, 8000)[None])


@pytest.mark.parametrize("length", [300, 301, 4321])
def test_tiles_of_one_row(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seam there can be; at 300 samples the innermost row of a branch is one number."""
    monkeypatch.setattr(memory, "_TILE_BYTES", 1)
    for network in (HDemucs(**TINY["HDemucs"]), Demucs(**(TINY["Demucs"] | {"channels": 8}))):
        assert_class_b(randomise(network), noise(2, length).expand(2, 2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_the_bits(dtype: torch.dtype) -> None:
    """What the network computes in them, the fast form computes no worse."""
    network = randomise(Demucs(**(TINY["Demucs"] | {"channels": 8}))).to(dtype)
    mix = noise(2, 4321)[None]
    with torch.inference_mode():
        fast, plain = optimize(network)(mix), network(mix.to(dtype)).float()
        exact = copy.deepcopy(network).float()(mix)
    assert decibels(exact, fast) > decibels(exact, plain)


def test_a_silent_window_is_finite() -> None:
    network = randomise(HTDemucs(**(BASE | HYBRIDS["released"])))
    assert torch.isfinite(both(network, torch.zeros(1, 2, 8000))[1]).all()


def song_like(seconds: float, samplerate: int) -> Tensor:
    """A few notes that swell in turn on two channels, over a little noise (C T)."""
    time = torch.arange(int(seconds * samplerate)) / samplerate
    notes = sum(torch.sin(2 * torch.pi * hertz * time) / hertz for hertz in (110, 220.5, 1000))
    swell = (1 + torch.sin(4 * torch.pi * time)) / 2
    return 30 * notes * torch.stack([swell, 1 - swell]) + noise(2, len(time))


def test_a_long_window_is_as_exact_as_plain_arithmetic() -> None:
    """Sums over all steps of the waveform branch lose what float32 cannot hold."""
    kwargs = BASE | {"dconv_mode": 3, "samplerate": 44_100, "segment": 10, "t_layers": 0}
    network = randomise(HTDemucs(**kwargs))
    mix = song_like(10, 44_100)[None]
    fast = both(network, mix)[1]
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(mix.double())
    # Float32 has 144 dB of mantissa, a network loses 20 or so; a Gram matrix in it, 20 more.
    assert decibels(exact, fast.double()) >= 110


ODD = {
    "far from zero": lambda x: x + 5,
    "hardly there": lambda x: 1e-6 * x,
    "far too loud": lambda x: 1e3 * x,
    "half of it silent": lambda x: x * (torch.arange(x.shape[-1]) > x.shape[-1] // 2),
    "several at once": lambda x: torch.cat([x, -x, 0.5 * x.flip(-1)]),
    "one sample": lambda x: torch.zeros_like(x).index_fill(-1, torch.tensor([777]), 1.0),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["HTDemucs", "HDemucs", "Demucs"])
def test_odd_signals(name: str, kind: str) -> None:
    classes: dict[str, type[nn.Module]] = {"HTDemucs": HTDemucs, "HDemucs": HDemucs}
    network = randomise(classes.get(name, Demucs)(**TINY[name]))
    mix = ODD[kind](song_like(1, 8000)[None])
    plain, fast = both(network, mix)
    assert decibels(plain, fast) >= 100  # class B, relative to what comes out


def test_the_released_shape_in_both_precisions() -> None:
    torch.manual_seed(0)
    network = HTDemucs(FOUR, bottom_channels=512, t_layers=5, dconv_mode=3, segment=Fraction(2))
    for name, parameter in network.named_parameters():
        if name.endswith("scale"):  # they start at 1e-4 and would hide what is behind them
            parameter.data.fill_(0.3)
    mix = noise(2, 88_200)[None]
    plain, exact = both(network.eval(), mix)
    assert decibels(plain, exact) >= 100
    if kernels.has_packed_kernels() and choose_precision("auto", torch.device("cpu")) == "bf16":
        # What is promised of eight bits of mantissa.
        assert decibels(plain, both(network, mix, "bf16")[1]) >= 40


def test_without_packed_kernels_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_packed_kernels", lambda: False)
    network = randomise(HTDemucs(**(BASE | HYBRIDS["released"])))
    assert_class_b(network, noise(2, 8000)[None])


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_softmax_of_products(
    halved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "halves_products", lambda: halved)
    torch.manual_seed(0)
    # Longer than a run of rows, and no multiple of it.
    q, k, v = (torch.randn(2, length, 3, 8).to(dtype) for length in (450, 37, 37))
    scores = torch.einsum("bnhc,bmhc->bhnm", q.double(), k.double())
    expected = torch.einsum("bhnm,bmhc->bnhc", scores.softmax(-1), v.double())
    answer = kernels.attend(q, k, v, dtype=dtype)
    assert answer.dtype == dtype
    # 24 and 8 bits of mantissa: rounding of the scores, which reach 12, is what is left.
    assert decibels(expected, answer.double()) >= (120 if dtype == torch.float32 else 36)


def test_which_processors_have_wider_vectors_than_mkl_uses() -> None:
    facts = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"
    assert kernels.is_halved(facts.format("AuthenticAMD", 26))
    assert not kernels.is_halved(facts.format("AuthenticAMD", 25))
    assert not kernels.is_halved(facts.format("GenuineIntel", 26))
    assert not kernels.is_halved("Processor : ARMv8")


def test_the_network_itself_is_left_alone() -> None:
    network = randomise(HTDemucs(**BASE))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = list(network.modules())
    both(network, noise(2, 8000)[None])
    assert list(network.modules()) == modules
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def spent() -> list[nn.Module]:
    """One of every kind: also with layers, and a transformer, that have no fast form."""
    return [
        *(HTDemucs(**(BASE | kwargs)) for kwargs in HYBRIDS.values()),
        HDemucs(**TINY["HDemucs"]),
        Demucs(**(TINY["Demucs"] | {"channels": 8})),
        Demucs(**(TINY["Demucs"] | {"glu": False})),
    ]


@pytest.mark.parametrize("network", spent(), ids=lambda network: type(network).__name__)
def test_weights_are_kept_once_where_that_is_asked_for(network: nn.Module) -> None:
    randomise(network)
    mix = noise(2, 8000)[None, : network.audio_channels]
    with torch.inference_mode():
        expected = optimize(network)(mix)
        numbers = sum(parameter.numel() for parameter in network.parameters())
        fast = optimize(network, consume_weights=True)
        left = sum(parameter.numel() for parameter in network.parameters())
        assert torch.equal(fast(mix), expected)
    if left < numbers:
        with pytest.raises(ValueError, match="load it again"):
            optimize(network)


def test_most_of_the_weights_of_a_released_shape_are_let_go() -> None:
    network = HTDemucs(**(BASE | HYBRIDS["released"]))
    numbers = sum(parameter.numel() for parameter in network.parameters())
    optimize(network, consume_weights=True)
    assert sum(parameter.numel() for parameter in network.parameters()) < 0.1 * numbers


def test_in_half_the_bits_all_weights_stay() -> None:
    """A window that overflows is done again in float32."""
    network = HTDemucs(**(BASE | HYBRIDS["released"]))
    optimize(network, "auto", consume_weights=True)
    if choose_precision("auto", torch.device("cpu")) == "bf16":
        optimize(network)  # spent, it would refuse


@pytest.mark.parametrize("stems", [[0], [2], [3, 1]])
@pytest.mark.parametrize(
    "network",
    [
        HTDemucs(**BASE),
        HDemucs(**TINY["HDemucs"]),
        HDemucs(**TINY["HDemucs"], hybrid=False),
        HDemucs(**TINY["HDemucs"], hybrid=False, cac=False, wiener_iters=1),
        HDemucs(**TINY["HDemucs"], cac=False),
    ],
)
def test_some_stems_are_what_they_are_among_all(network: nn.Module, stems: list[int]) -> None:
    """In every form: the network's own, the fast one, and in half the bits."""
    randomise(network)
    mix = noise(2, 8000)[None]
    with torch.inference_mode():
        for form in (network, optimize(network), AutocastNetwork(network, torch.bfloat16)):
            assert torch.equal(form.forward_stems(mix, stems), form(mix)[:, stems])


def test_a_precision_that_makes_no_sense_is_refused_with_what_does() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16, auto"):
        choose_precision("int8", cpu)
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_precision("fp16", cpu)
    assert choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", torch.device("cuda")) == "fp16"


def test_reduced_products_keep_spectra_and_attributes() -> None:
    network = randomise(HTDemucs(**BASE))
    reduced = AutocastNetwork(network, torch.bfloat16)
    assert reduced.sources == network.sources
    assert reduced.valid_length(100) == network.valid_length(100)
    mix = noise(2, 8000)[None]
    with torch.inference_mode():
        plain, less = network(mix), reduced(mix)
    assert less.dtype == torch.float32
    # Eight bits of mantissa in every product, with the rest in float32.
    assert 25 <= decibels(plain, less) < 100


@pytest.mark.parametrize("network", [HTDemucs(**BASE), Demucs(**TINY["Demucs"])])
def test_a_compiled_core_answers_the_same(network: nn.Module) -> None:
    # Traced for real, code generation left out: that takes minutes and another compiler.
    fast = compile_network(randomise(network), backend="eager")
    mix = noise(2, network.valid_length(8000))[None]
    with torch.inference_mode():
        assert torch.equal(fast(mix), network(mix))


def test_a_compiler_that_gives_up_is_done_without() -> None:
    network = randomise(HTDemucs(**BASE))

    def backend(*_: object) -> None:
        raise RuntimeError("no kernels for this machine")

    fast, mix = compile_network(network, backend=backend), noise(2, 8000)[None]
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="torch.compile failed, running without it: .*no kernels"):
            first = fast(mix)
        assert torch.equal(first, network(mix))
        assert torch.equal(fast(mix), first)  # and says so once
