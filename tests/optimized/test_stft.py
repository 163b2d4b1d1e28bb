"""The spectra of an optimized network equal those of the original, bit for bit."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from demucs_infer.hdemucs import HDemucs, Hybrid
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.optimized import istft
from demucs_infer.optimized.optimize import optimize
from demucs_infer.optimized.stft import ForwardStft
from demucs_infer.system.arena import use_arenas
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY

NETWORKS: dict[str, tuple[type[Hybrid], dict[str, Any]]] = {
    "HTDemucs": (HTDemucs, {}),
    "HTDemucs-mono": (HTDemucs, {"audio_channels": 1}),
    "HDemucs": (HDemucs, {}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Hybrid:
    kind, kwargs = NETWORKS[request.param]
    network = kind(**{**TINY[kind.__name__], **kwargs}).eval()
    assert istft.supports(network)
    return network


@pytest.mark.parametrize("arenas", [nullcontext, use_arenas], ids=["malloc", "arenas"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("hops", "more"),
    [
        pytest.param(0, 1, id="one-sample"),
        pytest.param(1, -1, id="shorter-than-padding"),
        pytest.param(1, 0, id="one-hop"),
        pytest.param(16, 0, id="whole-hops"),
        pytest.param(16, 1, id="odd"),
        pytest.param(199, -1, id="many-frames"),
    ],
)
def test_spectra_and_planes_have_the_same_bits(
    network: Hybrid, hops: int, more: int, batch: int, arenas: Any
) -> None:
    length = hops * network.hop_length + more
    mix = make_noise(batch * network.audio_channels, length).view(batch, -1, length)
    forward = ForwardStft(network)
    with torch.inference_mode(), arenas():
        expected = network.analyze(mix)
        spectra = forward.analyze(mix)
        assert torch.equal(spectra, expected)
        assert torch.equal(forward.to_planes(spectra), network.to_planes(expected))


def test_spectra_of_a_part_of_a_tensor_have_the_same_bits(network: Hybrid) -> None:
    mix = make_noise(2 * network.audio_channels, 50_000).view(2, -1, 50_000)[..., 99:33_333]
    with torch.inference_mode():
        assert torch.equal(ForwardStft(network).analyze(mix), network.analyze(mix))


def test_optimized_network_computes_its_spectra_so(network: Hybrid) -> None:
    fast: Any = optimize(network)
    for method in (fast.analyze, fast.to_planes):
        assert isinstance(method.__self__, ForwardStft)
