"""Optimized networks give the results of the originals, within their exactness class."""

import copy
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import kernels, layout, winograd
from demucs_infer.optimized.autocast import AutocastNetwork
from demucs_infer.optimized.compiled import compile_network
from demucs_infer.optimized.optimize import choose_precision, has_bf16_instructions, optimize
from demucs_infer.optimized.unet import TransposedConv
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, randomize

FOUR = ["drums", "bass", "other", "vocals"]
BASE = TINY["HTDemucs"]
HYBRIDS: dict[str, dict[str, Any]] = {
    "released": {"dconv_mode": 3, "bottom_channels": 32},
    "no bottom": {},
    "branches only in the decoder": {"dconv_mode": 2},
    "no branches": {"dconv_mode": 0},
    "mono, two sources": {"audio_channels": 1, "sources": ["a", "b"]},
    "cross first": {"t_cross_first": True, "t_layers": 2},
    "norms after": {"t_norm_first": False, "t_layers": 2},
    "relu": {"t_gelu": False},
    "no layer scale": {"t_layer_scale": False},
    "norms in the U-Net": {"norm_starts": 1},
    "wide context": {"context": 2},
    "context in the encoder": {"context_enc": 1},
    "no rewrite": {"rewrite": False},
    "other time width": {"channels_time": 12, "t_layers": 0},
    "no transformer": {"t_layers": 0},
    "magnitudes": {"cac": False},
    "kernel not a multiple of the stride": {"kernel_size": 6, "dconv_mode": 3},
}


def decibels(reference: Tensor, other: Tensor) -> float:
    difference = (reference - other).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / difference))


def run_both(network: nn.Module, mix: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    optimized = optimize(network, precision=precision)
    assert optimized is not network
    with torch.inference_mode():
        return network(mix), optimized(mix)


def assert_class_b(network: nn.Module, mix: Tensor) -> None:
    plain, optimized = run_both(network, mix)
    assert optimized.shape == plain.shape
    # Class B (the same sums in another order): 100 dB and 1e-5 of full scale.
    assert decibels(plain, optimized) >= 100
    assert (plain - optimized).abs().max() <= 1e-5 * plain.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", HYBRIDS)
def test_optimized_htdemucs_matches_in_class_b(name: str) -> None:
    kwargs = BASE | HYBRIDS[name]
    network = randomize(HTDemucs(**kwargs))
    mix = make_noise(network.audio_channels, 2 * 8000)[None].unflatten(-1, (2, -1)).transpose(1, 2)
    assert_class_b(network, mix.flatten(0, 1))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_winograd_rows_match_at_every_tile_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows are computed at a time; a tile may end between them."""
    kwargs = BASE | {"channels": 96, "t_layers": 0, "sources": ["a"], "segment": 0.27}
    network = randomize(HTDemucs(**kwargs))
    assert winograd.supports(network.decoder[-1].rewrite.weight, torch.float32)
    monkeypatch.setattr(layout, "tiles", partial(tile_by_rows, rows))
    assert_class_b(network, make_noise(2, 2_160)[None])


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
@pytest.mark.parametrize("rows", [2, 6])
def test_winograd_equals_the_convolution_in_double(rows: int, steps: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 48, 3, 3) / 20, torch.randn(96)
    x = torch.randn(1, 48, rows + 2, steps)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=(0, 1))
    values, gates = winograd.WinogradConv(weight, bias, torch.float32)(x)
    # 24 bits of mantissa are 144 dB; the sums before and after the products cost up to 10.
    assert decibels(expected, torch.cat([values, gates], 1).double()) >= 130


def test_sequence_equals_the_convolution_in_double() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 48, 3) / 12, torch.randn(96), torch.randn(1, 48, 1, 10)
    expected = F.conv1d(x[:, :, 0].double(), weight.double(), bias.double())
    halves = winograd.WinogradSequence(weight, bias, torch.float32)(x)
    assert decibels(expected, torch.cat(halves, 1)[:, :, 0].double()) >= 130  # as above


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_two_taps_equal_the_transposed_convolution_in_double(rows: int) -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(96, 8, (8, 1), (4, 1)).requires_grad_(False)
    block, out = torch.randn(rows + 1, 5, 96), torch.empty(4 * rows, 5, 8)
    upsample = TransposedConv(up, torch.float32, last=True)
    assert isinstance(upsample._conv, winograd.TwoTaps)
    upsample.upsample_rows(block, out)
    expected = up.double()(block.double().permute(2, 0, 1)[None])[0, :, 4:-4]
    assert decibels(expected.permute(1, 2, 0), out.double()) >= 130  # as above
    # The same taps over time.
    flat = nn.ConvTranspose1d(96, 8, 8, 4).requires_grad_(False)
    sequence = torch.randn(1, 96, 1, rows)
    answer = TransposedConv(flat, torch.float32, last=True).upsample_time(sequence)
    assert decibels(flat.double()(sequence[:, :, 0].double()), answer.double()) >= 130


@pytest.mark.parametrize("is_fused", [False, True])
def test_gelu_is_exact_inside_and_after_a_product(
    is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_fuses_gelu", lambda: is_fused)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 16, 9, 20), torch.randn(24, 16, 3, 1) / 7, torch.randn(24)
    expected = F.gelu(F.conv2d(x.double(), weight.double(), bias.double()))
    conv = kernels.Conv(weight, bias, torch.float32)
    # The error function of the kernels is exact to seven digits.
    assert decibels(expected, conv(x, gelu=True).double()) >= 125
    flat, rows = weight[:, :, 0, 0], torch.randn(30, 16)
    expected = F.gelu(F.linear(rows.double(), flat.double(), bias.double()))
    linear = kernels.Linear(flat, bias, torch.float32)
    assert decibels(expected, linear(rows, gelu=True).double()) >= 125


@pytest.mark.parametrize("length", [301, 4321])
@pytest.mark.parametrize("is_packed", [True, False])
def test_wide_waveform_network_has_no_seams(
    length: int, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are computed at a time; a tile may be of one."""
    if not is_packed:
        monkeypatch.setattr(kernels, "has_packed_kernels", lambda *_: False)
    monkeypatch.setattr(layout, "TILE_BYTES", 8 * 96 * 3)  # three steps in the outermost stage
    network = Demucs(**(TINY["Demucs"] | {"channels": 96, "depth": 1, "lstm_layers": 0}))
    assert winograd.has_enough_channels(96, torch.float32)
    assert_class_b(randomize(network), make_noise(2, length).expand(2, 2, -1))


def tile_by_rows(rows: int, count: int, _bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"multi_freqs": [0.25, 0.5]}, {"dconv_mode": 3}],
    ids=["default", "bands", "branches in both"],
)
def test_optimized_hdemucs_matches_in_class_b(kwargs: dict[str, Any]) -> None:
    network = randomize(HDemucs(**TINY["HDemucs"], **kwargs))
    assert_class_b(network, make_noise(2, 44_100 + 77)[None])


WAVEFORM: dict[str, dict[str, Any]] = {
    "default": {},
    "branches in both": {"dconv_mode": 3},
    "no rewrite": {"rewrite": False},
    "relu instead of glu": {"glu": False},
    "relu instead of gelu": {"gelu": False},
    "deep": {"depth": 5},
    "kernel not a multiple of the stride": {"kernel_size": 7, "stride": 3},
    "no stride": {"kernel_size": 3, "stride": 1, "depth": 2},
}


@pytest.mark.parametrize("kwargs", WAVEFORM.values(), ids=WAVEFORM)
def test_optimized_demucs_matches_in_class_b(kwargs: dict[str, Any]) -> None:
    network = randomize(Demucs(**(TINY["Demucs"] | {"channels": 8} | kwargs)))
    assert_class_b(network, make_noise(2, 4321).expand(2, 2, -1))


def test_stride_that_does_not_divide_the_bins() -> None:
    kwargs = {"t_layers": 0, "stride": 5, "multi_freqs": [0.5], "multi_freqs_depth": 3}
    assert_class_b(randomize(HTDemucs(**(BASE | kwargs))), make_noise(2, 8000)[None])


@pytest.mark.parametrize("length", [300, 301, 4321])
def test_tiles_of_one_row_have_no_seams(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 300 samples, the innermost row of a residual branch is one number."""
    monkeypatch.setattr(layout, "TILE_BYTES", 1)
    for network in (HDemucs(**TINY["HDemucs"]), Demucs(**(TINY["Demucs"] | {"channels": 8}))):
        assert_class_b(randomize(network), make_noise(2, length).expand(2, 2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_lose_nothing_more(dtype: torch.dtype) -> None:
    """The optimized network is closer to float32 than the original in half precision."""
    network = randomize(Demucs(**(TINY["Demucs"] | {"channels": 8}))).to(dtype)
    mix = make_noise(2, 4321)[None]
    with torch.inference_mode():
        optimized, plain = optimize(network)(mix), network(mix.to(dtype)).float()
        exact = copy.deepcopy(network).float()(mix)
    assert decibels(exact, optimized) > decibels(exact, plain)


def test_silent_window_gives_finite_samples() -> None:
    network = randomize(HTDemucs(**(BASE | HYBRIDS["released"])))
    assert torch.isfinite(run_both(network, torch.zeros(1, 2, 8000))[1]).all()


def song_like(seconds: float, samplerate: int) -> Tensor:
    """Make a few notes that swell in turn on two channels, over a little noise: (C T)."""
    time = torch.arange(int(seconds * samplerate)) / samplerate
    notes = sum(torch.sin(2 * torch.pi * hertz * time) / hertz for hertz in (110, 220.5, 1000))
    swell = (1 + torch.sin(4 * torch.pi * time)) / 2
    return 30 * notes * torch.stack([swell, 1 - swell]) + make_noise(2, len(time))


def test_long_window_keeps_float32_precision() -> None:
    """Sums over all steps of the waveform branch would lose precision in float32."""
    kwargs = BASE | {"dconv_mode": 3, "samplerate": 44_100, "segment": 10, "t_layers": 0}
    network = randomize(HTDemucs(**kwargs))
    mix = song_like(10, 44_100)[None]
    optimized = run_both(network, mix)[1]
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(mix.double())
    # Float32 has 144 dB of mantissa; a network loses about 20, a Gram matrix in float32 20 more.
    assert decibels(exact, optimized.double()) >= 110


UNUSUAL = {
    "far from zero": lambda x: x + 5,
    "almost silent": lambda x: 1e-6 * x,
    "far too loud": lambda x: 1e3 * x,
    "first half silent": lambda x: x * (torch.arange(x.shape[-1]) > x.shape[-1] // 2),
    "batch of three": lambda x: torch.cat([x, -x, 0.5 * x.flip(-1)]),
    "single impulse": lambda x: torch.zeros_like(x).index_fill(-1, torch.tensor([777]), 1.0),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", ["HTDemucs", "HDemucs", "Demucs"])
def test_unusual_signals_match_in_class_b(name: str, kind: str) -> None:
    classes: dict[str, type[nn.Module]] = {"HTDemucs": HTDemucs, "HDemucs": HDemucs}
    network = randomize(classes.get(name, Demucs)(**TINY[name]))
    mix = UNUSUAL[kind](song_like(1, 8000)[None])
    plain, optimized = run_both(network, mix)
    assert decibels(plain, optimized) >= 100  # class B, relative to the output


SLOW_BF16 = pytest.mark.filterwarnings("ignore:precision='bf16' is slower")
"""bf16 is correct on every processor, and faster on few."""


@SLOW_BF16
def test_released_shape_meets_both_precision_classes() -> None:
    torch.manual_seed(0)
    network = HTDemucs(FOUR, bottom_channels=512, t_layers=5, dconv_mode=3, segment=Fraction(2))
    for name, parameter in network.named_parameters():
        if name.endswith("scale"):  # the initial 1e-4 would hide errors of the branches
            parameter.data.fill_(0.3)
    mix = make_noise(2, 88_200)[None]
    plain, exact = run_both(network.eval(), mix)
    assert decibels(plain, exact) >= 100
    # Class C: eight bits of mantissa.
    assert decibels(plain, run_both(network, mix, "bf16")[1]) >= 40


def test_network_without_packed_kernels_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_packed_kernels", lambda *_: False)
    network = randomize(HTDemucs(**(BASE | HYBRIDS["released"])))
    assert_class_b(network, make_noise(2, 8000)[None])


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_equals_softmax_attention_in_double(
    halved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "uses_half_width_vectors", lambda: halved)
    torch.manual_seed(0)
    # Longer than a run of rows, and no multiple of it.
    q, k, v = (torch.randn(2, length, 3, 8).to(dtype) for length in (450, 37, 37))
    scores = torch.einsum("bnhc,bmhc->bhnm", q.double(), k.double())
    expected = torch.einsum("bhnm,bmhc->bnhc", scores.softmax(-1), v.double())
    answer = kernels.attend(q, k, v, dtype=dtype)
    assert answer.dtype == dtype
    # 24 and 8 bits of mantissa: the rounding of the scores, which reach 12, remains.
    assert decibels(expected, answer.double()) >= (120 if dtype == torch.float32 else 36)


def test_cpu_family_tells_whether_mkl_uses_half_vectors() -> None:
    facts = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"
    assert kernels.is_halved(facts.format("AuthenticAMD", 26))
    assert not kernels.is_halved(facts.format("AuthenticAMD", 25))
    assert not kernels.is_halved(facts.format("GenuineIntel", 26))
    assert not kernels.is_halved("Processor : ARMv8")


def test_optimize_leaves_the_network_unchanged() -> None:
    network = randomize(HTDemucs(**BASE))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = list(network.modules())
    run_both(network, make_noise(2, 8000)[None])
    assert list(network.modules()) == modules
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def make_networks() -> list[nn.Module]:
    """Make one network of every kind, also with layers that cannot be optimized."""
    return [
        *(HTDemucs(**(BASE | kwargs)) for kwargs in HYBRIDS.values()),
        HDemucs(**TINY["HDemucs"]),
        Demucs(**(TINY["Demucs"] | {"channels": 8})),
        Demucs(**(TINY["Demucs"] | {"glu": False})),
    ]


@pytest.mark.parametrize("network", make_networks(), ids=lambda network: type(network).__name__)
def test_consume_weights_releases_what_the_copy_has(network: nn.Module) -> None:
    randomize(network)
    mix = make_noise(2, 8000)[None, : network.audio_channels]
    with torch.inference_mode():
        expected = optimize(network)(mix)
        numbers = sum(parameter.numel() for parameter in network.parameters())
        optimized = optimize(network, consume_weights=True)
        left = sum(parameter.numel() for parameter in network.parameters())
        assert torch.equal(optimized(mix), expected)
    if left < numbers:
        for each in (network, copy.deepcopy(network)):
            with pytest.raises(ValueError, match="weights were released"):
                optimize(each)
    else:
        optimize(network)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_size_weights_are_not_taken_for_released_ones() -> None:
    """Such a transformer has feed-forward layers without hidden channels, and works."""
    network = HTDemucs(**(BASE | {"t_hidden_scale": 0.01})).eval()
    assert not network.crosstransformer.layers[0].linear1.weight.numel()
    assert_class_b(network, make_noise(2, 8000)[None])


def test_consume_weights_releases_most_of_a_released_shape() -> None:
    network = HTDemucs(**(BASE | HYBRIDS["released"]))
    numbers = sum(parameter.numel() for parameter in network.parameters())
    optimize(network, consume_weights=True)
    assert sum(parameter.numel() for parameter in network.parameters()) < 0.1 * numbers


@SLOW_BF16
def test_reduced_precision_keeps_all_weights() -> None:
    """A window that overflows is computed again in float32."""
    network = HTDemucs(**(BASE | HYBRIDS["released"]))
    optimize(network, "bf16", consume_weights=True)
    optimize(network)  # would raise if weights had been released


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
    ids=["htdemucs", "hdemucs", "no time branch", "wiener", "magnitudes"],
)
def test_forward_stems_equals_forward_in_every_form(network: nn.Module, stems: list[int]) -> None:
    """The forms are the original network, the optimized one and autocast."""
    randomize(network)
    mix = make_noise(2, 8000)[None]
    with torch.inference_mode():
        for form in (network, optimize(network), AutocastNetwork(network, torch.bfloat16)):
            assert torch.equal(form.forward_stems(mix, stems), form(mix)[:, stems])


def test_choose_precision_names_a_usable_alternative() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16, auto"):
        choose_precision("int8", cpu)
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_precision("fp16", cpu)
    assert choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", torch.device("cuda")) == "fp16"


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_auto_picks_bf16_only_with_instructions_and_kernels(
    has_kernels: bool, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Explicit bf16 is computed everywhere, with a warning where it is slower."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "has_packed_kernels", lambda *_: has_kernels)
    known = "_is_avx512_bf16_supported"
    monkeypatch.setattr(torch.cpu, known, lambda: instructions, raising=False)
    if has_kernels and instructions:
        assert choose_precision("auto", cpu) == choose_precision("bf16", cpu) == "bf16"
        return
    assert choose_precision("auto", cpu) == "fp32"
    with pytest.warns(UserWarning, match="'bf16' is slower than 'fp32' on this processor"):
        assert choose_precision("bf16", cpu) == "bf16"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_instructions_for_bf16_are_known_where_pytorch_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = has_bf16_instructions()
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert has_bf16_instructions() == expected


def test_autocast_keeps_attributes_and_float32_output() -> None:
    network = randomize(HTDemucs(**BASE))
    reduced = AutocastNetwork(network, torch.bfloat16)
    assert reduced.sources == network.sources
    assert reduced.valid_length(100) == network.valid_length(100)
    mix = make_noise(2, 8000)[None]
    with torch.inference_mode():
        plain, reduced_output = network(mix), reduced(mix)
    assert reduced_output.dtype == torch.float32
    # Eight bits of mantissa in every product, the rest in float32.
    assert 25 <= decibels(plain, reduced_output) < 100


@pytest.mark.parametrize(
    "network", [HTDemucs(**BASE), Demucs(**TINY["Demucs"])], ids=["htdemucs", "demucs"]
)
def test_compiled_core_matches(network: nn.Module) -> None:
    # Traced, but without code generation, which takes minutes and a C++ compiler.
    optimized = compile_network(randomize(network), backend="eager")
    mix = make_noise(2, network.valid_length(8000))[None]
    with torch.inference_mode():
        assert torch.equal(optimized(mix), network(mix))


def test_failing_compiler_warns_once_and_runs_uncompiled() -> None:
    network = randomize(HTDemucs(**BASE))

    def backend(*_: object) -> None:
        raise RuntimeError("no kernels for this machine")

    optimized, mix = compile_network(network, backend=backend), make_noise(2, 8000)[None]
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="failed, running without it: .*no kernels"):
            first = optimized(mix)
        assert torch.equal(first, network(mix))
        assert torch.equal(optimized(mix), first)  # without a second warning
