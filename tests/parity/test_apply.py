"""`apply_model` has upstream's numbers, bit for bit, and restores what it changes."""

import inspect
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from demucs.apply import BagOfModels as UpstreamBag
from demucs.apply import apply_model as upstream_apply
from demucs.demucs import Demucs as UpstreamDemucs
from demucs.hdemucs import HDemucs as UpstreamHDemucs
from demucs.htdemucs import HTDemucs as UpstreamHTDemucs
from torch import nn

from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, OomModel, RecordingModel, ScaleModel, randomize

UPSTREAM = {"HTDemucs": UpstreamHTDemucs, "HDemucs": UpstreamHDemucs, "Demucs": UpstreamDemucs}
OURS = {"HTDemucs": HTDemucs, "HDemucs": HDemucs, "Demucs": Demucs}
# One network per stem, like htdemucs_ft; and weights that are not binary fractions.
ONE_HOT = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
MIXED = [[1.0, 0.0, 0.3, 2.0], [0.5, 1.0, 0.7, 0.1]]

_networks: dict[tuple[str, int], nn.Module] = {}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Use one thread, because kernels may split sums by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def upstream_network(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    if changes:
        return randomize(UPSTREAM[kind](**{**TINY[kind], **changes}), seed)
    if (kind, seed) not in _networks:
        _networks[kind, seed] = randomize(UPSTREAM[kind](**TINY[kind]), seed)
    return _networks[kind, seed]


def our_network(kind: str, seed: int = 0) -> nn.Module:
    network = OURS[kind](**TINY[kind])
    network.load_state_dict(upstream_network(kind, seed).state_dict())
    return network.eval()


def compare(theirs: nn.Module, ours: nn.Module, mix: torch.Tensor, **options: Any) -> None:
    random.seed(7)
    expected = upstream_apply(theirs, mix, **options)
    before = mix.clone()
    got = apply_model(ours, mix, **options, seed=7)
    assert torch.equal(mix, before)
    assert got.shape == expected.shape
    assert torch.equal(got, expected), f"off by {float((got - expected).abs().max())}"


SETTINGS = [
    {"shifts": 0},
    {"shifts": 1},
    {"shifts": 3, "overlap": 0.5, "transition_power": 2.0},
    {"shifts": 1, "overlap": 0.0, "segment": 0.7},
    {"shifts": 0, "overlap": 0.75, "segment": 0.5},
    {"shifts": 2, "overlap": 0.1, "segment": 1.0, "transition_power": 1.5},
]
LENGTHS = [1, 5, 8000, 8001, 13007]
BAGS = {"alone": None, "one-hot": ONE_HOT, "mixed": MIXED}


@pytest.mark.parametrize("kind", ["HTDemucs", "Demucs"])
@pytest.mark.parametrize("bag", BAGS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
def test_stems_equal_upstream(kind: str, bag: str, length: int, settings: dict[str, Any]) -> None:
    mix = make_noise(2, length)[None]
    weights = BAGS[bag]
    if weights is None:
        network = upstream_network(kind)
        compare(network, network, mix, **settings)
        return
    members = [upstream_network(kind, seed) for seed in (0, 1)]
    compare(UpstreamBag(members, weights), BagOfModels(members, weights), mix, **settings)


@pytest.mark.parametrize("shifts", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 4000, 8000])
@pytest.mark.parametrize("kind", ["HTDemucs", "Demucs"])
def test_stems_without_split_equal_upstream(kind: str, length: int, shifts: int) -> None:
    # The training window of this HTDemucs is long enough for the track and a shift.
    network = upstream_network(kind, segment=2) if kind == "HTDemucs" else upstream_network(kind)
    compare(network, network, make_noise(2, length)[None], shifts=shifts, split=False)


@pytest.mark.parametrize("settings", [{"shifts": 1}, {"shifts": 0, "segment": 0.3}])
@pytest.mark.parametrize("length", [600, 44_100])
def test_stems_of_the_hybrid_network_equal_upstream(length: int, settings: dict[str, Any]) -> None:
    network = upstream_network("HDemucs")
    compare(network, network, make_noise(2, length)[None], **settings)


@pytest.mark.parametrize("kind", ["HTDemucs", "Demucs"])
def test_several_recordings_through_a_bag_of_upstream_equal_upstream(kind: str) -> None:
    mix = torch.stack([make_noise(2, 9000, seed) for seed in range(3)])
    bag = UpstreamBag([upstream_network(kind, 0), upstream_network(kind, 1)], MIXED)
    compare(bag, bag, mix, shifts=2)


@pytest.mark.parametrize("segment", [0.5, 2.0])
def test_segment_of_a_bag_equals_upstream(segment: float) -> None:
    """Upstream changes its members; here only the result is the same."""
    theirs = [upstream_network("HTDemucs", seed, segment=1) for seed in (0, 1)]
    ours = [upstream_network("HTDemucs", seed, segment=1) for seed in (0, 1)]
    bag = BagOfModels(ours, MIXED, segment=segment)
    assert [network.segment for network in ours] == [1, 1]
    upstream = UpstreamBag(theirs, MIXED, segment=segment)
    assert bag.max_allowed_segment == upstream.max_allowed_segment == min(segment, 1)
    compare(upstream, bag, make_noise(2, 9000)[None], shifts=1)


@pytest.mark.parametrize("kind", OURS)
def test_our_networks_are_close_to_upstream(kind: str) -> None:
    length = 10_000 if kind != "HDemucs" else 30_000
    mix = make_noise(2, length)[None]
    random.seed(3)
    expected = upstream_apply(upstream_network(kind), mix, shifts=2)
    got = apply_model(our_network(kind), mix, shifts=2, seed=3)
    # The networks may take the same sums in another order; the engine must draw the shifts of
    # upstream, though ours draw nothing when they run.
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_global_generator_is_used_only_without_a_seed() -> None:
    network, mix = upstream_network("Demucs"), make_noise(2, 9000)[None]
    random.seed(11)
    expected = upstream_apply(network, mix)
    random.seed(11)
    assert torch.equal(apply_model(network, mix, seed=None), expected)
    state = random.getstate()
    default = apply_model(network, mix)
    assert random.getstate() == state
    assert torch.equal(default, apply_model(network, mix, seed=0))


@pytest.mark.parametrize("batch_size", [2, 5, 100])
@pytest.mark.parametrize("kind", ["HTDemucs", "Demucs"])
def test_batch_size_changes_at_most_the_order_of_sums(kind: str, batch_size: int) -> None:
    network, mix = upstream_network(kind), make_noise(2, 40_000)[None]
    one = apply_model(network, mix, shifts=2)
    many = apply_model(network, mix, shifts=2, batch_size=batch_size)
    # Another batch may choose another kernel: 1e-5 of full scale, at least 100 dB.
    error = (one - many).double()
    assert float(error.abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))
    assert 10 * torch.log10(one.double().square().sum() / error.square().sum()) >= 100


def test_batches_are_filled() -> None:
    network = RecordingModel()
    network.valid_length = lambda length: 8000  # type: ignore[assignment]  # windows all alike
    apply_model(network, make_noise(2, 60_000)[None], 0, batch_size=4)
    assert len(network.seen) == -(-10 // 4)
    assert [shape[0] for shape in network.seen] == [4, 4, 2]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_and_pool_do_not_change_bits(workers: int) -> None:
    network, mix = upstream_network("Demucs"), make_noise(2, 30_000)[None]
    expected = apply_model(network, mix, shifts=2)
    assert torch.equal(apply_model(network, mix, shifts=2, num_workers=workers), expected)
    with ThreadPoolExecutor(workers) as pool:
        assert torch.equal(apply_model(network, mix, shifts=2, pool=pool), expected)
        assert pool.submit(int).result() == 0, "the pool of the caller still works"


class StateRecorder:
    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def __call__(self, state: dict[str, Any]) -> None:
        self.states.append(dict(state))


def test_callback_states_equal_upstream() -> None:
    members = [upstream_network("Demucs", seed) for seed in (0, 1)]
    mix, theirs, ours = make_noise(2, 20_000)[None], StateRecorder(), StateRecorder()
    extra = {"audio_length": 20_000, "mine": 1}
    random.seed(5)
    upstream_apply(UpstreamBag(members), mix, shifts=2, callback=theirs, callback_arg=dict(extra))
    lock = threading.Lock()
    apply_model(BagOfModels(members), mix, 2, callback=ours, callback_arg=extra, lock=lock, seed=5)
    assert extra == {"audio_length": 20_000, "mine": 1}

    def rank(state: dict[str, Any]) -> tuple[Any, ...]:
        keys = "model_idx_in_bag", "shift_idx", "segment_offset"
        return *(state[key] for key in keys), state["state"] == "end"

    # Passes are interleaved here, so only the order within a pass is the same.
    assert sorted(ours.states, key=rank) == sorted(theirs.states, key=rank)
    for _, group in itertools.groupby(ours.states, key=lambda state: rank(state)[:3]):
        assert [state["state"] for state in group] == ["start", "end"]


@pytest.mark.parametrize("when", ["start", "end"])
def test_callback_can_stop_the_separation(when: str) -> None:
    network = RecordingModel()

    def callback(state: dict[str, object]) -> None:
        if state["state"] == when and state["segment_offset"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_model(network, make_noise(2, 80_000)[None], 0, callback=callback)
    assert len(network.seen) == (1 if when == "start" else 2)


def test_network_modes_are_restored() -> None:
    bag = BagOfModels([ScaleModel(), ScaleModel()])
    bag.train()
    bag.models[1].eval()
    apply_model(bag, make_noise(2, 9000)[None])
    assert bag.models[0].training
    assert not bag.models[1].training


def test_result_is_an_ordinary_tensor() -> None:
    mix = make_noise(2, 9000)[None].requires_grad_()
    out = apply_model(ScaleModel(), mix)
    assert not out.is_inference()
    assert not out.requires_grad
    scale = nn.Parameter(torch.ones(()))
    (out * scale).sum().backward()
    assert scale.grad is not None


def test_bar_is_shown_only_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    apply_model(ScaleModel(), make_noise(2, 20_000)[None])
    assert capsys.readouterr() == ("", "")
    apply_model(ScaleModel(), make_noise(2, 20_000)[None], progress=True)
    shown = capsys.readouterr()
    assert "2.5/2.5" in shown.err
    assert not shown.out


def test_model_kwargs_reach_every_call() -> None:
    class Gain(ScaleModel):
        def forward(self, mix: torch.Tensor, *, gain: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(mix) * gain

    mix = make_noise(2, 20_000)[None]
    plain = apply_model(ScaleModel(), mix)
    # Doubling is exact in binary.
    assert torch.equal(apply_model(Gain(), mix, model_kwargs={"gain": 2.0}), 2 * plain)


def test_fixed_network_rejects_a_longer_segment() -> None:
    network, mix = upstream_network("HTDemucs"), make_noise(2, 9000)[None]
    for model in (network, BagOfModels([network])):
        with pytest.raises(ValueError, match="longer than the 1 s this network was trained at"):
            apply_model(model, mix, segment=1.5)


def test_split_false_and_a_shorter_segment_exclude_each_other() -> None:
    network, mix = upstream_network("HTDemucs"), make_noise(2, 7000)[None]
    with pytest.raises(ValueError, match="split=False makes one window of 7000"):
        apply_model(network, mix, 0, split=False, segment=0.5)


def test_reduced_batch_size_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    network = OomModel(limit=1)
    apply_model(network, make_noise(2, 30_000)[None], 0, batch_size=4)
    assert "BatchSizeReduced(old=4, new=2" in caplog.text


@pytest.mark.parametrize("shape", [(2, 100), (1, 1, 100), (1, 3, 100), (1, 2, 0), (1, 1, 2, 100)])
def test_mix_of_another_shape_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, 2 channels, samples\) with"):
        apply_model(ScaleModel(), torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"overlap": float("nan")},
        {"shifts": -1},
        {"segment": 0},
        {"transition_power": 0.5},
        {"batch_size": 0},
        {"overlap": 0.9999999},
    ],
)
def test_invalid_options_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).partition("_")[0]):
        apply_model(ScaleModel(), make_noise(2, 100)[None], **options)


def test_invalid_bags_are_rejected() -> None:
    one, other = ScaleModel(), ScaleModel(["vocals", "bass"])
    with pytest.raises(ValueError, match="differ in sources"):
        BagOfModels([one, other])
    with pytest.raises(ValueError, match="differ in samplerate"):
        BagOfModels([one, ScaleModel(samplerate=16_000)])
    with pytest.raises(ValueError, match="at least one network"):
        BagOfModels([])
    with pytest.raises(ValueError, match="2 lists of weights for 1 networks"):
        BagOfModels([one], [[1, 1], [1, 1]])
    with pytest.raises(ValueError, match="3 weights for 2 stems"):
        BagOfModels([one], [[1, 1, 1]])
    with pytest.raises(ValueError, match="'bass' add up to 0"):
        BagOfModels([one, one], [[1, 1], [1, -1]])
    with pytest.raises(ValueError, match="has no sources, .*: wrap it with"):
        BagOfModels([nn.Identity()])
    with pytest.raises(NotImplementedError, match="apply_model"):
        BagOfModels([one])(make_noise(2, 100)[None])


def test_signature_starts_with_that_of_upstream() -> None:
    theirs = inspect.signature(upstream_apply).parameters
    ours = inspect.signature(apply_model).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
    added = list(ours.values())[len(theirs) :]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added)
