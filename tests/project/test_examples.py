"""Install the example packages into an environment of their own, and use them as users would."""

import importlib
import importlib.util
import io
import os
import re
import shutil
import site
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demucs_infer import (
    BagOfModels,
    BatchSizeReduced,
    ChunkProcessed,
    Config,
    Separator,
    Stage,
    register_model,
)
from demucs_infer.cli.main import main
from demucs_infer.custom import registry
from demucs_infer.custom.build import build_network
from demucs_infer.engine.pipeline import Block
from demucs_infer.engine.stitch import PIECE
from demucs_infer.system.cores import count_cores
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import environment, load, save, tree
from tests.helpers.networks import ScaleModel, randomize
from tests.helpers.oracles import skip_or_fail

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RATE = 44100
SLOW = 8000
"""Of the networks that are only to be run: sizes are small, and so is the work."""


# ── in a fresh environment, from the shell and from Python ──


class Environment:
    """An environment with the example packages, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"

    def run(self, *words: str | Path, code: int = 0) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [self.python, *words], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def separate(self, *words: str | Path, code: int = 0) -> str:
        return self.run("-m", "demucs_infer", "song.wav", "-d", "cpu", *words, code=code)


def tone_and_clicks(seconds: float = 4.0) -> tuple[Tensor, Tensor]:
    """Return a steady tone and a row of clicks, (C T) each."""
    time = torch.arange(int(seconds * RATE)) / RATE
    tone = 0.1 * torch.sin(2 * torch.pi * 440 * time).expand(2, -1)
    clicks = torch.zeros_like(tone)
    clicks[:, 5000::11025] = 0.85
    return tone, clicks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    if importlib.util.find_spec("hatchling") is None:
        skip_or_fail("hatchling, which builds the examples, is not installed")
    folder = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "venv", "--without-pip", "venv"]
    subprocess.run(command, cwd=folder, check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # torch and the rest are those of this environment: they would take minutes to install again.
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "parent.pth").write_text("\n".join([str(ROOT), *lines]))
    shutil.copytree(EXAMPLES, folder / "examples")
    shutil.copytree(folder / "examples/ext_project/hpss_example", folder / "hpss_files")
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "install", "-q"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    both = [folder / "examples/ext_project", folder / "examples/open_unmix"]
    subprocess.run([*pip, *alone, *both], cwd=folder, check=True)
    made = Environment(folder)
    made.run("examples/ext_project/make_weights.py", "weights.safetensors")
    save(folder / "song.wav", sum(tone_and_clicks(), torch.zeros(())), RATE)
    return made


CONFIG = ("--config", "hpss_files/config.json", "--checkpoint", "weights.safetensors")


def loudness(wav: Any) -> float:
    return float((wav**2).mean())


def test_command_separates_with_a_configuration(home: Environment) -> None:
    home.separate(
        *CONFIG, "-o", "a", "--set", "inference.batch_size=2", "--float32", "--format", "wav"
    )
    files = [f"hpss-44k/song/{name}" for name in ("harmonic.wav", "percussive.wav", "rest.wav")]
    assert tree(home.folder / "a") == [*files, "hpss-44k/song/stems.json"]
    tone, clicks = tone_and_clicks()
    found = {Path(file).stem: load(home.folder / "a" / file).T for file in files}
    # Physics: most of a steady tone is harmonic, most of a click is percussive. 20 dB and 3 dB are
    # well below what was measured (25 dB and 6 dB); a swap of the stems would be below 0.
    for name, truth, ratio in (("harmonic", tone, 100.0), ("percussive", clicks, 2.0)):
        assert loudness(truth.numpy()) > ratio * loudness(found[name] - truth.numpy())
    # Both masks sum to 1, so nothing is left; 16 bits of the input, and a transform and back.
    assert abs(found["rest"]).max() < 1e-5
    assert "done before" in home.separate(
        *CONFIG, "-o", "a", "--set", "inference.batch_size=2", "--float32", "--format", "wav"
    )


def test_command_separates_with_the_name_of_a_registered_model(home: Environment) -> None:
    home.separate("-n", "hpss-plain", "-o", "c", "--stems", "percussive")
    assert tree(home.folder / "c") == [
        "hpss-plain/song/percussive.wav",
        "hpss-plain/song/stems.json",
    ]
    assert "hpss-example==1.0.0" in (home.folder / "c/hpss-plain/song/stems.json").read_text()
    assert "hpss-plain" in home.run("-m", "demucs_infer", "--list-models")


def test_flags_take_precedence_over_the_configuration(
    home: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.folder)
    module = ["--module", "hpss_example.network", "--class", "Hpss", "--set", "model_type=mine"]
    words = ["song.wav", "-d", "cpu", "-q", "-o", str(tmp_path), *CONFIG, *module]
    assert main([*words, "--two-stems", "percussive", "--set", "identifier=me"]) == 0
    names = ["no_percussive.flac", "percussive.flac", "rest.flac", "stems.json"]
    assert tree(tmp_path) == [f"me/song/{name}" for name in names]


def test_track_is_separated_again_when_class_or_code_changes(
    home: Environment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home.folder)
    monkeypatch.syspath_prepend(tmp_path)
    same = (
        "from hpss_example.network import Hpss, HpssParams\nOther, OtherParams = Hpss, HpssParams\n"
    )
    (tmp_path / "one_net.py").write_text(same)
    words = ["song.wav", "-d", "cpu", "-o", str(tmp_path / "out"), *CONFIG, "--module", "one_net"]
    words += ["--set", "model_type=mine", "--class"]

    def is_skipped(name: str) -> bool:
        assert main([*words, name]) == 0
        return "skipped" in capsys.readouterr().err

    assert [is_skipped(name) for name in ("Hpss", "Hpss", "Other")] == [False, True, False]
    (tmp_path / "one_net.py").write_text(same + "GAIN = 2\n")
    assert not is_skipped("Other")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((*CONFIG, "--set", "inference.speed=3"), 2, "inference.speed: unknown key"),
        ((*CONFIG, "--set", "model.num_taps=4"), 4, "model: num_taps must be odd, got 4"),
        ((*CONFIG, "--set", "model.num_taps=5"), 4, "2 differ"),
        ((*CONFIG, "--set", "model_type=gone"), 4, "no network is registered as 'gone'"),
        ((*CONFIG, "--module", "hpss_example.network"), 2, "--module and --class go together"),
        ((*CONFIG, "--module", "nowhere", "--class", "A"), 2, "no module 'nowhere'"),
        ((*CONFIG, "--module", "json", "--class", "A"), 2, "module 'json' has no class 'A'"),
        (
            (*CONFIG, "--module", "json", "--class", "JSONEncoder"),
            2,
            "no class 'JSONEncoderParams'",
        ),
        ((*CONFIG[:3], "none.ckpt"), 4, "checkpoint not found: none.ckpt"),
        (CONFIG[:2], 2, "--config needs --checkpoint"),
        (CONFIG[2:], 2, "--checkpoint needs --config"),
        (["--class", "Split"], 2, "--class needs --config"),
        ((*CONFIG, "-n", "mdx"), 2, "not allowed with argument"),
        (("-n", "hpss"), 4, "'hpss' is a type of network without weights"),
    ],
)
def test_invalid_command_gives_exit_code_and_message(
    words: Sequence[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    home: Environment,
) -> None:
    from hpss_example.network import METADATA  # type: ignore[import-not-found]  # from the fixture

    monkeypatch.chdir(home.folder)
    register_model(METADATA)
    try:
        found = main(["song.wav", "-d", "cpu", "-o", str(tmp_path), *words])
    except SystemExit as left:
        found = int(left.code or 0)
    assert message in capsys.readouterr().err
    assert found == code
    assert tree(tmp_path) == []


def test_snippet_of_the_example_runs(home: Environment) -> None:
    text = (EXAMPLES / "ext_project/README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = home.folder / "examples/ext_project"
    shutil.copy(home.folder / "weights.safetensors", folder)
    shutil.copy(home.folder / "song.wav", folder)
    code = f"import os; os.chdir({str(folder)!r})\n{block}\nassert list(stems)[2] == 'rest'"
    home.run("-c", code)


def test_custom_network_of_the_docs_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs/howto/network.md").read_text("utf-8")
    code = text.partition("```py\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) <= 30
    (tmp_path / "split.py").write_text(code, "utf-8")
    # So soft that no weights, which are drawn anew each time, bring a stem to full scale.
    save(tmp_path / "song.wav", 0.02 * make_noise(2, 2 * RATE), RATE)
    (tmp_path / "song.wav").rename(tmp_path / "song.mp3")  # told by what is inside
    # What pip makes of the package, and finds without a word in the environment.
    command = tmp_path / "bin/demucs-infer"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.append({str(ROOT)!r})\n"
        "from demucs_infer.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    words = text.partition("```bash\n")[2].partition("```")[0].replace("python ", "$PYTHON ")
    variables = {"PYTHON": sys.executable, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", words], cwd=tmp_path, check=True, env=environment() | variables)
    assert tree(tmp_path / "split") == ["high.wav", "low.wav"]
    both = load(tmp_path / "split/high.wav") + load(tmp_path / "split/low.wav")
    # Half a step of 16 bits for the sum, as it is rounded, and two of the input.
    assert abs(both - load(tmp_path / "song.mp3")).max() <= 2.5 / 2**15
    for stem in ("high", "low"):
        made = (tmp_path / f"separated/split/song/{stem}.wav").read_bytes()
        assert made == (tmp_path / f"split/{stem}.wav").read_bytes()


# ── a network that is not Demucs, against the one it was written after ──


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ext_project", "open_unmix"):
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
    monkeypatch.setattr(registry, "_registered", {})
    yield


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import `openunmix.model` without its package, which imports torchaudio for other modules."""
    folders = [os.environ.get("DEMUCS_INFER_ORACLES", str(ROOT / ".oracles")), *sys.path]
    found = [Path(folder) / "openunmix" for folder in folders]
    root = next((folder for folder in found if (folder / "model.py").is_file()), None)
    if root is None:
        skip_or_fail("openunmix is not installed")
    package = types.ModuleType("openunmix")
    package.__path__ = [str(root)]
    monkeypatch.setitem(sys.modules, "openunmix", package)
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    yield importlib.import_module("openunmix.model")
    for name in [name for name in sys.modules if name.startswith("openunmix.")]:
        del sys.modules[name]


UMX = EXAMPLES / "open_unmix/open_unmix_example/config.json"
TINY_UMX = [
    "model.chunk_size=8192",
    'model.output_stem_names=["vocals","drums"]',
    "model.num_bins=129",
    "model.max_bin=100",
    "model.hidden_size=16",
    "model.num_layers=2",
    "stft.n_fft=256",
    "stft.hop_length=64",
    "inference.device=cpu",
]


def targets(reference: Any, *, causal: bool = False) -> dict[str, nn.Module]:
    found = {}
    for seed, name in enumerate(["vocals", "drums"]):
        found[name] = reference.OpenUnmix(
            nb_bins=129, hidden_size=16, nb_layers=2, max_bin=100, unidirectional=causal
        )
        randomize(found[name], seed)
        for norm in (each for each in found[name].modules() if isinstance(each, nn.BatchNorm1d)):
            # Statistics as training leaves them; fresh ones would hide a swap.
            norm.running_mean.copy_(make_noise(1, norm.num_features, seed)[0])
            norm.running_var.copy_(1 + make_noise(1, norm.num_features, seed + 1)[0])
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_open_unmix_equals_its_reference(reference: Any, tmp_path: Path, causal: bool) -> None:
    from open_unmix_example.join import join  # type: ignore[import-not-found]  # from the fixture
    from open_unmix_example.network import METADATA  # type: ignore[import-not-found]  # so too

    theirs = targets(reference, causal=causal)
    for name, network in theirs.items():
        # Published files of the first release hold the window of the transform besides.
        torch.save(
            network.state_dict() | {"stft.window": torch.ones(256)}, tmp_path / f"{name}.pth"
        )
    files = {name: str(tmp_path / f"{name}.pth") for name in theirs}
    join(str(tmp_path / "all.safetensors"), files)
    separator = Separator.from_pretrained(
        config=UMX,
        checkpoint=tmp_path / "all.safetensors",
        overrides=[*TINY_UMX, f"model.is_causal={str(causal).lower()}"],
        metadata=METADATA,
    )
    both = reference.Separator(theirs, niter=0, n_fft=256, n_hop=64).eval()
    mix = make_noise(2, 8192)[None]
    with torch.inference_mode():
        expected, found = both(mix), separator.model(mix)
    # The same sums in another order, and a mask in place of a magnitude and a phase: class B.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((expected[0, 0] - expected[0, 1]).abs().max()) > 1e-3  # the stems are not alike


def test_open_unmix_has_the_sizes_of_the_published_weights() -> None:
    from open_unmix_example.network import METADATA

    config = Config.from_file(UMX)
    with torch.device("meta"):
        network = METADATA.model(config.model.to_concrete(METADATA.params))
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    # What a file of umxhq holds, as its release lists it.
    assert shapes["targets.vocals.input_mean"] == (1487,)
    assert shapes["targets.vocals.fc1.weight"] == (512, 2974)
    assert shapes["targets.vocals.lstm.weight_ih_l2_reverse"] == (1024, 512)
    assert shapes["targets.vocals.fc2.weight"] == (512, 1024)
    assert shapes["targets.vocals.fc3.weight"] == (4098, 512)
    assert shapes["targets.other.output_mean"] == (2049,)
    assert len(shapes) == 4 * 46


# ── what a network of other people has for free ──


def hpss() -> nn.Module:
    from hpss_example.ready import plain  # type: ignore[import-not-found]  # from the fixture

    network: nn.Module = plain("audio.sample_rate=8000", "model.chunk_size=8192")
    return network


def umx() -> nn.Module:
    from open_unmix_example.network import METADATA

    fewer = ["audio.sample_rate=8000", "stft.hop_length=120", "model.num_layers=1"]
    network = build_network(Config.from_file(UMX, [*TINY_UMX, *fewer]), METADATA)
    randomize(network.model)
    return network


def four_attributes() -> nn.Module:
    """Check the least that a network can be: without metadata, without configuration."""
    return ScaleModel(["drums", "bass"], [0.25, 0.75], samplerate=SLOW, segment=1.0)


class LongTrack:
    """Noise that is made when it is read; it knows how far it was read."""

    channels = 2
    length = 40 * SLOW

    def __init__(self) -> None:
        self.read = 0

    def blocks(self) -> Iterator[Tensor]:
        self.read = 0
        for seed in range(80):
            self.read += SLOW // 2
            yield make_noise(2, SLOW // 2, seed)


def check_streaming(network: nn.Module, tmp_path: Path) -> None:
    """Check that a few windows at most are read ahead, however long the track is."""
    track, done, most = LongTrack(), 0, 0
    separator = Separator.from_model(network, device="cpu", shifts=0)
    for item in separator.stream_blocks(track):
        if isinstance(item, Block):
            most = max(most, track.read - done)
            done = item.start + item.stems.shape[-1]
    assert done == track.length
    # Two windows, those that run, and what the engine takes from a source at a time; the track has
    # 320 000 samples.
    assert most <= (2 + count_cores() + 1) * 8192 + PIECE + SLOW // 2


def check_derived_stems(network: nn.Module, tmp_path: Path) -> None:
    """Check that a derived stem is the sum that its rule says."""
    mix = make_noise(2, SLOW)
    first: str = network.sources[0]  # type: ignore[index,assignment]  # every network has them
    rules = [f"rest=mixture-{first}"]
    stems = Separator.from_model(network, device="cpu", derive=rules, shifts=0).run(mix)
    assert list(stems) == [*network.sources, "rest"]  # type: ignore[misc]  # so too
    # One subtraction in float32.
    torch.testing.assert_close(stems["rest"], mix - stems[first], rtol=0, atol=1e-6)


def check_bags(network: nn.Module, tmp_path: Path) -> None:
    """Two networks weighed 1 to 3 answer the weighed mean of their answers."""
    import copy

    mix, other = make_noise(2, SLOW), copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.data *= 0.5
    count = len(network.sources)  # type: ignore[arg-type]  # every network has them
    bag = BagOfModels([network, other], [[1.0] * count, [3.0] * count])
    found, *alone = (
        Separator.from_model(model, device="cpu", shifts=0).run(mix)
        for model in (bag, network, other)
    )
    for name in found:
        expected = (alone[0][name] + 3 * alone[1][name]) / 4
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)


def check_out_of_memory(network: nn.Module, tmp_path: Path) -> None:
    """Check that a batch that does not fit is halved until it does, with the same stems."""

    def refuse(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("out of memory (simulated)")

    mix = make_noise(2, 4 * SLOW)
    expected = Separator.from_model(network, device="cpu", shifts=0, batch_size=1, jobs=1).run(mix)
    hook = network.register_forward_pre_hook(refuse)
    separator = Separator.from_model(network, device="cpu", shifts=0, batch_size=4)
    *events, found = separator.stream(mix)
    hook.remove()
    sizes = [(each.old, each.new) for each in events if isinstance(each, BatchSizeReduced)]
    assert sizes == [(4, 2), (2, 1)]
    for name in expected:
        assert torch.equal(found[name], expected[name])  # type: ignore[index]  # the last is the output


def check_events(network: nn.Module, tmp_path: Path) -> None:
    """Each batch is told once, in order, between the stages before and after."""
    *events, _ = Separator.from_model(network, device="cpu", shifts=0).stream(
        make_noise(2, 2 * SLOW)
    )
    batches = [each for each in events if isinstance(each, ChunkProcessed)]
    assert [each.batch_index for each in batches] == list(range(1, batches[0].total_batches + 1))
    ends = [each.stage for each in events if isinstance(each, Stage.Completed)]
    assert ends[-2:] == ["stitch", "collect_outputs"]


def check_command(network: nn.Module, tmp_path: Path) -> None:
    """By the name it is registered under, with skipping of what is done."""
    register_model(lambda: network, "mine")
    save(tmp_path / "song.wav", make_noise(2, SLOW), SLOW)
    words = [str(tmp_path / "song.wav"), "-n", "mine", "-d", "cpu", "-o", str(tmp_path / "out")]
    assert main([*words, "-q"]) == 0
    stems = [f"mine/song/{name}.wav" for name in network.sources]  # type: ignore[union-attr]  # every network has them
    assert tree(tmp_path / "out") == sorted([*stems, "mine/song/stems.json"])


def check_server(network: nn.Module, tmp_path: Path) -> None:
    """Stems over HTTP, by the same name."""
    from tests.helpers.server_process import client, song

    register_model(lambda: network, "mine")
    with client(None, tmp_path, models=("mine",)) as http:
        answer = http.post("/v1/separate", content=song(1.0, rate=SLOW))
    assert answer.status_code == 200, answer.text
    names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
    assert {f"{name}.wav" for name in network.sources} <= {Path(each).name for each in names}  # type: ignore[union-attr]  # every network has them


@pytest.mark.parametrize("network", [four_attributes, hpss, umx], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "feature",
    [
        check_streaming,
        check_derived_stems,
        check_bags,
        check_out_of_memory,
        check_events,
        check_command,
        check_server,
    ],
    ids=lambda feature: feature.__name__.removeprefix("check_"),
)
def test_feature_works_with_any_network(feature: Any, network: Any, tmp_path: Path) -> None:
    feature(network(), tmp_path)
