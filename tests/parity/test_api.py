"""A script that was written for upstream runs here, but for the name of the package."""

import copy
import inspect
from pathlib import Path
from typing import Any

import demucs.api
import demucs.apply
import demucs.htdemucs
import demucs.states
import pytest
import soundfile
import torch

import demucs_infer.api
from demucs_infer import DemucsError
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, randomize

SCRIPT = """
import random
from pathlib import Path
import demucs.api

random.seed(0)
log = []
separator = demucs.api.Separator(model=NAME, repo=Path(REPO), device="cpu", **OPTIONS)
separator.update_parameter(callback=log.append, callback_arg={"state": "mine", "who": "me"})
try:
    origin, separated = separator.separate_audio_file(Path(TRACK))
except demucs.api.LoadAudioError:
    raise SystemExit("no audio")
random.seed(0)
again, tensors = separator.separate_tensor(origin, separator.samplerate)
for stem, source in separated.items():
    path = Path(OUT) / f"{stem}.wav"
    demucs.api.save_audio(source, str(path), samplerate=separator.samplerate, clip="rescale")
    path = Path(OUT) / f"{stem}-float.wav"
    demucs.api.save_audio(source, path, separator.samplerate, as_float=True, clip="none")
shape = (separator.samplerate, separator.audio_channels, list(separator.model.sources))
names = demucs.api.list_models(Path(REPO))
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny networks and a bag of both, in files that upstream itself has written."""
    folder = tmp_path_factory.mktemp("repo")
    for seed, name in enumerate(["aaaa0000", "bbbb1111"]):
        network = randomize(demucs.htdemucs.HTDemucs(**TINY["HTDemucs"]), seed)
        args, kwargs = network._init_args_kwargs  # type: ignore[attr-defined,misc]  # upstream's
        package = {
            "klass": type(network),
            "args": args,
            "kwargs": kwargs,
            "state": demucs.states.get_state(network, None),
            "training_args": {},
        }
        demucs.states.save_with_checksum(package, folder / f"{name}.th")
    weights = "[[1., 0., 1., 0.5], [0., 1., 1., 0.25]]"
    (folder / "tiny.yaml").write_text(f"models: [aaaa0000, bbbb1111]\nweights: {weights}\n")
    return folder


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loud enough to clip in some stem, at another rate than the model's."""
    path = tmp_path_factory.mktemp("track") / "song.wav"
    soundfile.write(path, 5 * make_noise(2, 44_100).T.numpy(), 11_025, subtype="FLOAT")
    return path


def play(package: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(SCRIPT.replace("demucs.api", f"{package}.api"), names)
    return names


def decibels(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    error = (ours.double() - theirs.double()).square().sum()
    return float(10 * torch.log10(theirs.double().square().sum() / error.clamp_min(1e-30)))


# Class B, which is what the engine promises on a CPU: the same sums in another order.
def assert_class_b(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert decibels(ours, theirs) >= 100
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aaaa0000", {}),
        ("tiny", {"shifts": 2, "overlap": 0.1}),
        ("tiny", {"shifts": 0, "segment": 0.8, "jobs": 2}),
        ("bbbb1111", {"shifts": 0, "overlap": 0.5, "progress": True}),
    ],
)
def test_the_same_script_gives_the_same_files(
    name: str, options: dict[str, Any], repo: Path, track: Path, tmp_path: Path
) -> None:
    played = {}
    for package in ("demucs", "demucs_infer"):
        out = tmp_path / package
        out.mkdir()
        names = {"NAME": name, "REPO": repo, "TRACK": track, "OUT": out, "OPTIONS": options}
        played[package] = play(package, names)
    theirs, ours = played["demucs"], played["demucs_infer"]
    assert_class_b(ours["origin"], theirs["origin"])
    for results in ("separated", "tensors"):
        assert list(ours[results]) == list(theirs[results])
        for stem, sound in theirs[results].items():
            assert_class_b(ours[results][stem], sound)
    assert ours["shape"] == theirs["shape"]
    assert {key: set(found) for key, found in ours["names"].items()} == {
        key: set(found) for key, found in theirs["names"].items()
    }
    assert_same_log(ours["log"], theirs["log"])
    assert_same_files(tmp_path / "demucs_infer", tmp_path / "demucs")


def assert_same_log(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare calls in any order: here, passes are merged by time."""

    def key(call: dict[str, Any]) -> list[tuple[str, str]]:
        return sorted((name, str(value)) for name, value in call.items())

    assert sorted(map(key, ours)) == sorted(map(key, theirs))
    begun: list[dict[str, Any]] = []
    for call in ours:
        if call["state"] == "start":
            begun.append(call)
        else:
            begun.remove({**call, "state": "start"})
    assert not begun


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        mine, rate = soundfile.read(ours / name, dtype="float32", always_2d=True)
        reference, their_rate = soundfile.read(theirs / name, dtype="float32", always_2d=True)
        assert rate == their_rate
        if name.endswith("-float.wav"):
            # Upstream cuts these at full scale; ours are whole.
            assert_class_b(torch.from_numpy(mine).clamp(-1, 1), torch.from_numpy(reference))
        else:
            # Upstream truncates and we round: one step of 16 bits.
            assert abs(mine - reference).max() <= 1.0001 / 2**15


def test_upstreams_seedless_shifts_are_there_for_who_asks(repo: Path) -> None:
    import random

    wav = make_noise(2, 20_000)
    random.seed(7)
    _, theirs = demucs.api.Separator("tiny", repo=repo).separate_tensor(wav)
    random.seed(7)
    _, ours = demucs_infer.api.Separator("tiny", repo=repo, seed=None).separate_tensor(wav)
    for stem in theirs:
        assert_class_b(ours[stem], theirs[stem])


@pytest.mark.parametrize("method", ["__init__", "update_parameter", "separate_tensor"])
def test_upstreams_parameters_come_first_with_their_defaults(method: str) -> None:
    theirs = inspect.signature(getattr(demucs.api.Separator, method)).parameters.values()
    ours = list(inspect.signature(getattr(demucs_infer.api.Separator, method)).parameters.values())
    for mine, upstreams in zip(ours, theirs):
        assert (mine.name, mine.kind) == (upstreams.name, upstreams.kind)
        if upstreams.default is demucs.api.NotProvided:
            assert mine.default is demucs_infer.api.NotProvided
        elif mine.name == "device":  # upstream's is decided when it is imported
            assert mine.default == "auto"
        else:
            assert mine.default == upstreams.default
    more = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    assert all(mine.kind in more for mine in ours[len(theirs) :])


def test_upstreams_names_are_all_there() -> None:
    for name in ("save_audio", "list_models", "LoadAudioError", "LoadModelError", "Separator"):
        assert hasattr(demucs_infer.api, name)
        if name.endswith("Error"):
            continue
        theirs = inspect.signature(getattr(demucs.api, name)).parameters
        ours = inspect.signature(getattr(demucs_infer.api, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
    public = {name for name in vars(demucs.api.Separator) if not name.startswith("_")}
    assert public <= set(dir(demucs_infer.api.Separator))


def test_what_upstream_code_catches_is_raised(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(demucs_infer.api.LoadModelError):
        demucs_infer.api.Separator("absent", repo=repo)
    with pytest.raises(demucs_infer.api.LoadModelError):
        demucs_infer.api.Separator("tiny", repo=tmp_path / "nowhere")
    separator = demucs_infer.api.Separator("aaaa0000", repo=repo)
    (tmp_path / "text.wav").write_text("no sound at all")
    for name in ("text.wav", "absent.wav"):
        with pytest.raises(demucs_infer.api.LoadAudioError) as caught:
            separator.separate_audio_file(tmp_path / name)
        assert isinstance(caught.value, DemucsError)
        assert name in str(caught.value)


def test_an_interrupt_from_the_callback_ends_the_work(repo: Path) -> None:
    calls: list[dict[str, object]] = []

    def stop(call: dict[str, object]) -> None:
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt

    separator = demucs_infer.api.Separator("aaaa0000", repo=repo, callback=stop)
    with pytest.raises(KeyboardInterrupt):
        separator.separate_tensor(make_noise(2, 80_000))
    assert len(calls) == 3
    separator.update_parameter(callback=None)
    assert separator.separate_tensor(make_noise(2, 8_000))[0].shape == (2, 8_000)


def test_copy_of_a_separator_keeps_its_settings_and_whether_it_is_usable() -> None:
    separator = demucs_infer.api.Separator("tiny", device="cpu", stems=["vocals"])
    assert copy.deepcopy(separator).stems == ("vocals",)
    separator.close()
    with pytest.raises(ValueError, match="this Separator is closed"):
        copy.deepcopy(separator).separate_tensor(torch.zeros(2, 1000))
    consumed = demucs_infer.api.Separator("tiny", device="cpu")
    consumed.free_original_weights()
    with pytest.raises(TypeError, match="its weights were freed"):
        copy.deepcopy(consumed)
