"""What upstream's smaller modules offer gives the same numbers here."""

import hashlib
import os
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from importlib import import_module
from pathlib import Path
from typing import Any

import demucs.apply
import demucs.hdemucs
import demucs.hf
import demucs.htdemucs
import demucs.pretrained
import demucs.repo
import demucs.spec
import demucs.states
import demucs.utils
import pytest
import torch
from torch import nn

import demucs_infer.apply
import demucs_infer.audio
import demucs_infer.hf
import demucs_infer.htdemucs
import demucs_infer.pretrained
import demucs_infer.repo
import demucs_infer.spec
import demucs_infer.states
import demucs_infer.utils
from demucs_infer.checkpoints.catalog import load_catalog
from demucs_infer.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ModelLoadingError,
    ModelNotFound,
)
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, ScaleModel, randomize

# ── apply ──


@pytest.mark.parametrize("offset", [0, 1, 37, 90])
@pytest.mark.parametrize("length", [None, 1, 10, 200])
@pytest.mark.parametrize("more", [0, 1, 7, 150])
def test_chunk_is_padded_with_its_surroundings(offset: int, length: int | None, more: int) -> None:
    wav = make_noise(2, 100)[None]
    ours = demucs_infer.apply.TensorChunk(wav, offset, length)
    theirs = demucs.apply.TensorChunk(wav, offset, length)
    inner, their_inner = (
        chunk(outer, min(3, outer.length - 1), 5)
        for chunk, outer in (
            (demucs_infer.apply.TensorChunk, ours),
            (demucs.apply.TensorChunk, theirs),
        )
    )
    for mine, reference in ((ours, theirs), (inner, their_inner)):
        assert (mine.offset, mine.length, mine.shape) == (
            reference.offset,
            reference.length,
            reference.shape,
        )
        target = mine.length + more
        assert torch.equal(mine.padded(target), reference.padded(target))


def test_chunk_of_a_tensor_is_all_of_it_and_a_chunk_stays_itself() -> None:
    wav = make_noise(2, 10)
    chunk = demucs_infer.apply.tensor_chunk(wav)
    assert chunk.tensor is wav and chunk.length == 10
    assert demucs_infer.apply.tensor_chunk(chunk) is chunk


@pytest.mark.parametrize("offset", [-1, 10])
def test_chunk_outside_its_tensor_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="must be one of the 10 samples"):
        demucs_infer.apply.TensorChunk(make_noise(1, 10), offset)


def test_apply_model_takes_a_chunk_and_a_dummy_pool() -> None:
    network = randomize(demucs_infer.htdemucs.HTDemucs(**TINY["HTDemucs"]))
    wav = make_noise(2, 9000)[None]
    chunk = demucs_infer.apply.TensorChunk(wav, 500, 8000)
    pool = demucs_infer.utils.DummyPoolExecutor()
    found = demucs_infer.apply.apply_model(network, chunk, shifts=0, pool=pool)
    assert torch.equal(found, demucs_infer.apply.apply_model(network, chunk, shifts=0))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options",
    [
        {"shifts": 0},
        {"shifts": 2},
        {"shifts": 0, "split": False},
        {"shifts": 1, "split": False},
        {"shifts": 1, "segment": 0.5, "overlap": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("offset", "length"), [(5000, 8000), (100, 900), (14_000, 99_999)])
def test_what_is_around_a_chunk_is_read_as_upstream_does(
    options: dict[str, Any], offset: int, length: int
) -> None:
    theirs = randomize(demucs.htdemucs.HTDemucs(**TINY["HTDemucs"]))
    ours = demucs_infer.htdemucs.HTDemucs(**TINY["HTDemucs"])
    ours.load_state_dict(theirs.state_dict())
    if not options.get("split", True):
        length = min(length, 3000)
    wav = make_noise(2, 15_000)[None]
    random.seed(3)
    expected = demucs.apply.apply_model(
        theirs, demucs.apply.TensorChunk(wav, offset, length), **options
    )
    got = demucs_infer.apply.apply_model(
        ours.eval(), demucs_infer.apply.TensorChunk(wav, offset, length), **options, seed=3
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    alone = demucs_infer.apply.apply_model(ours, wav[..., offset:][..., :length], **options, seed=3)
    assert float((alone - got).abs().max()) > 1e-3


# ── spec ──


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("hop", [None, 100])
def test_padded_spectrogram_is_upstreams_and_is_inverted(pad: int, hop: int | None) -> None:
    wav = make_noise(2, 3000)
    ours = demucs_infer.spec.spectro(wav, 256, hop, pad=pad)
    assert torch.equal(ours, demucs.spec.spectro(wav, 256, hop, pad=pad))
    back = demucs_infer.spec.ispectro(ours, hop or 64, 3000, pad=pad)
    assert torch.equal(back, demucs.spec.ispectro(ours, hop or 64, 3000, pad=pad))


def test_spectrogram_has_upstreams_defaults() -> None:
    wav = make_noise(2, 3000)
    ours = demucs_infer.spec.spectro(wav)
    assert torch.equal(ours, demucs.spec.spectro(wav))
    assert torch.equal(demucs_infer.spec.ispectro(ours, 128), demucs.spec.ispectro(ours, 128))


# ── utils ──


@pytest.mark.parametrize(("length", "size", "stride"), [(10, 4, 2), (11, 4, 3), (5, 8, 4)])
def test_frames_are_upstreams(length: int, size: int, stride: int) -> None:
    wav = make_noise(3, length)
    ours = demucs_infer.utils.unfold(wav, size, stride)
    assert torch.equal(ours, demucs.utils.unfold(wav, size, stride))


@pytest.mark.parametrize("length", [7, 8, 10])
def test_middle_is_upstreams(length: int) -> None:
    wav = make_noise(2, 10)
    for reference in (length, wav[:, :length]):
        ours = demucs_infer.utils.center_trim(wav, reference)
        assert torch.equal(ours, demucs.utils.center_trim(wav, reference))
    with pytest.raises(ValueError, match="cannot be trimmed"):
        demucs_infer.utils.center_trim(wav, 11)


@pytest.mark.parametrize("count", [0, 1023, 1024, 1536, 5e9, -3e14, 2e26])
def test_size_reads_as_upstreams(count: float) -> None:
    assert demucs_infer.utils.sizeof_fmt(count) == demucs.utils.sizeof_fmt(count)


@pytest.mark.parametrize("count", [3, 10, 12])
def test_subset_has_upstreams_items(count: int) -> None:
    items = [*"abcdefghij"]
    ours, theirs = (
        package.utils.random_subset(items, count, seed=7) for package in (demucs_infer, demucs)
    )
    assert [*ours] == [*theirs]


@pytest.mark.parametrize("delete", [True, False])
def test_temporary_files_are_there_inside_the_block(delete: bool) -> None:
    with demucs_infer.utils.temp_filenames(2, delete) as names:
        assert all(Path(name).is_file() for name in names)
    assert [Path(name).exists() for name in names] == [not delete] * 2
    for name in names:
        Path(name).unlink(missing_ok=True)


def test_dummy_pool_runs_tasks_when_asked_until_it_is_shut_down() -> None:
    calls: list[int] = []
    with demucs_infer.utils.DummyPoolExecutor(3) as pool:
        task, late = pool.submit(calls.append, 1), pool.submit(calls.append, 2)
        assert calls == []
        task.result()
        pool.shutdown(wait=True, cancel_futures=True)
        with pytest.raises(CancelledError):
            late.result()
    assert calls == [1]


# ── states ──


def packed(network: nn.Module) -> dict[str, Any]:
    return demucs_infer.states.serialize_model(network, {"epochs": 3}, half=False)


def tiny() -> nn.Module:
    return randomize(demucs_infer.htdemucs.HTDemucs(**TINY["HTDemucs"]))


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())


def test_serialized_network_loads_from_memory_and_from_its_file(tmp_path: Path) -> None:
    network = tiny()
    package = packed(network)
    demucs_infer.states.save_with_checksum(package, tmp_path / "mine.th")
    (file,) = tmp_path.iterdir()
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(file.stem[-8:])
    by_name = demucs_infer.pretrained.get_model("mine", repo=tmp_path)
    for loaded in (
        demucs_infer.states.load_model(package),
        demucs_infer.states.load_model(file),
        by_name,
    ):
        assert_same_weights(loaded, network)
        assert not loaded.training
    assert package["training_args"] == {"epochs": 3}


def test_half_of_the_bytes_are_saved_by_default() -> None:
    package = demucs_infer.states.serialize_model(tiny(), {})
    assert {weight.dtype for weight in package["state"].values()} == {torch.half}


def test_arguments_that_a_network_lacks_are_dropped_or_refused(tmp_path: Path) -> None:
    package = packed(tiny())
    package["kwargs"] = {**package["kwargs"], "former": 1}
    torch.save(package, tmp_path / "old.th")
    for source in (package, tmp_path / "old.th"):
        with pytest.warns(UserWarning, match="former"):
            demucs_infer.states.load_model(source)
        with pytest.raises(CheckpointError, match="former"):
            demucs_infer.states.load_model(source, strict=True)
    assert "former" in package["kwargs"]


@pytest.mark.parametrize("package", [{}, {"klass": nn.Linear, "args": (), "kwargs": {}}])
def test_package_without_its_parts_is_refused_by_name(package: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="lacks .*state"):
        demucs_infer.states.load_model(package)


def test_load_model_refuses_what_is_no_path() -> None:
    with pytest.raises(ValueError, match="expected the path"):
        demucs_infer.states.load_model(3)  # type: ignore[arg-type]


def test_network_without_recorded_arguments_is_not_serialized() -> None:
    with pytest.raises(ValueError, match="capture_init"):
        demucs_infer.states.serialize_model(nn.Linear(1, 1), {})


def test_states_are_copied_swapped_and_set() -> None:
    network, other = tiny(), randomize(tiny(), seed=5)
    before = demucs_infer.states.copy_state(network.state_dict())
    with pytest.raises(KeyError), demucs_infer.states.swap_state(network, other.state_dict()):
        assert_same_weights(network, other)
        raise KeyError
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    state = demucs_infer.states.get_state(other)
    assert demucs_infer.states.set_state(network, state) is state
    assert_same_weights(network, other)


def test_upstreams_state_functions_take_our_networks_and_back() -> None:
    network = tiny()
    theirs = demucs.htdemucs.HTDemucs(**TINY["HTDemucs"])
    demucs.states.set_state(theirs, demucs_infer.states.get_state(network))
    assert_same_weights(theirs, network)
    ours = tiny()
    demucs_infer.states.set_state(ours, demucs.states.get_state(randomize(theirs, 3), None))
    assert_same_weights(ours, theirs)


# ── repo and pretrained ──


def test_remote_files_are_upstreams_and_the_catalogs() -> None:
    ours = demucs_infer.pretrained._parse_remote_files(
        demucs_infer.pretrained.REMOTE_ROOT / "files.txt"
    )
    assert ours == demucs.pretrained._parse_remote_files(
        demucs.pretrained.REMOTE_ROOT / "files.txt"
    )
    catalog = load_catalog()
    assert all(url in catalog.checkpoints[signature].urls for signature, url in ours.items())
    repo = demucs_infer.repo.RemoteRepo(ours)
    bags = demucs_infer.repo.BagOnlyRepo(demucs_infer.pretrained.REMOTE_ROOT, repo)
    their_bags = demucs.repo.BagOnlyRepo(
        demucs.pretrained.REMOTE_ROOT, demucs.repo.RemoteRepo(dict(ours))
    )
    assert {*bags.list_model()} == {*their_bags.list_model()}
    for name in bags.list_model():
        assert bags.bag(name) == catalog.bags[name]


def test_remote_repo_downloads_and_verifies_urls_of_its_own(
    tmp_path: Path, served: Callable[[Path], str]
) -> None:
    demucs_infer.states.save_with_checksum(packed(tiny()), tmp_path / "abcd1234.th")
    (file,) = tmp_path.glob("abcd1234-*.th")
    damaged = tmp_path / "abcd1234-00000000.th"
    damaged.write_bytes(file.read_bytes())
    address = served(tmp_path)
    models = {"good": f"{address}/{file.name}", "bad": f"{address}/{damaged.name}"}
    repo = demucs_infer.repo.RemoteRepo(models)
    assert repo.list_model() == models
    assert_same_weights(repo.get_model("good"), tiny())
    with pytest.raises(CheckpointError, match="expected sha256 00000000"):
        repo.get_model("bad")
    with pytest.raises(ModelNotFound):
        repo.get_model("955717e8")
    with pytest.raises(ModelLoadingError, match="invalid URL"):
        demucs_infer.repo.RemoteRepo({"x": f"{address}/"}).get_model("x")


@pytest.fixture
def served() -> Any:
    """Serve folders over HTTP on this machine."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    servers: list[ThreadingHTTPServer] = []

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_checksum_of_a_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    demucs_infer.repo.check_checksum(file, digest[:8])
    demucs_infer.repo.check_checksum(file, digest)
    for wrong in ("00000000", ""):
        with pytest.raises(demucs_infer.repo.ModelLoadingError):
            demucs_infer.repo.check_checksum(file, wrong)


def test_repositories_have_upstreams_base_class() -> None:
    base = demucs_infer.repo.ModelOnlyRepo
    for kind in (demucs_infer.repo.RemoteRepo, demucs_infer.repo.LocalRepo):
        assert issubclass(kind, base)
    for method in ("has_model", "get_model"):
        with pytest.raises(NotImplementedError):
            getattr(base(), method)("x")
    with pytest.raises(NotImplementedError):
        base().list_model()


def test_model_flags_lead_to_the_model(tmp_path: Path) -> None:
    import argparse

    torch.save(packed(tiny()), tmp_path / "mine.th")
    (tmp_path / "alone.yaml").write_text("models: [mine]\n")
    loaded = []
    for words in (["-n", "mine"], ["--name", "alone"]):
        parser = argparse.ArgumentParser()
        demucs_infer.pretrained.add_model_flags(parser)
        args = parser.parse_args([*words, "--repo", str(tmp_path)])
        loaded.append(demucs_infer.pretrained.get_model_from_args(args))
    assert_same_weights(loaded[0], tiny())
    bag = loaded[1]
    assert isinstance(bag, demucs_infer.apply.BagOfModels)
    assert_same_weights(bag.models[0], tiny())
    assert bag.weights == [[1.0] * 4]


def test_unittest_model_is_there_by_name_and_by_call() -> None:
    for model in (
        demucs_infer.pretrained.get_model("demucs_unittest"),
        demucs_infer.pretrained.demucs_unittest(),
    ):
        assert [*model.sources] == demucs.pretrained.SOURCES  # type: ignore[misc, arg-type]
        expected = demucs.pretrained.demucs_unittest().state_dict()
        assert {name: weight.shape for name, weight in model.state_dict().items()} == {
            name: weight.shape for name, weight in expected.items()
        }


def test_signature_of_a_training_is_looked_up_in_the_catalog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEMUCS_INFER_OFFLINE", "1")
    with pytest.raises(DownloadError, match="955717e8"):
        demucs_infer.pretrained.get_model_from_sig("955717e8")


# ── hf ──


@pytest.mark.parametrize("name", ["htdemucs", "htdemucs_ft", "mdx_extra_q", "hdemucs_mmi"])
def test_repository_on_the_hub_is_upstreams(name: str) -> None:
    assert demucs_infer.hf.hf_repo_name(name) == demucs.hf.hf_repo_name(name)
    assert demucs_infer.hf.DEFAULT_NAMESPACE == demucs.hf.DEFAULT_NAMESPACE


def test_hub_model_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUCS_INFER_OFFLINE", "1")
    with pytest.raises(DownloadError, match="resolve/main/htdemucs_ft.yaml"):
        demucs_infer.hf.get_hf_model("someone/htdemucs_ft")


def test_safetensors_of_the_package_load_by_path() -> None:
    path = load_catalog().checkpoints["tiny"].path
    assert demucs_infer.hf.load_safetensors_model(path) is not None


# ── what is left out ──


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("utils", "EMA"),
        ("utils", "pull_metric"),
        ("states", "get_quantizer"),
        ("demucs", "rescale_module"),
        ("hdemucs", "rescale_module"),
        ("transformer", "get_mask"),
        ("wiener", "atan2"),
    ],
)
def test_name_that_is_left_out_says_why(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"{module}.{name} is left out: .*it is"):
        exec(f"from demucs_infer.{module} import {name}")
    loaded = import_module(f"demucs_infer.{module}")
    assert not hasattr(loaded, name)
    assert getattr(loaded, name, None) is None
    with pytest.raises(AttributeError, match=f"{module}.{name} is left out: .*it is"):
        getattr(loaded, name)
    with pytest.raises(ImportError, match="cannot import name"):
        exec(f"from demucs_infer.{module} import nonsense")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("api", "th"),
        ("api", "subprocess"),
        ("apply", "th"),
        ("apply", "tqdm"),
        ("apply", "ThreadPoolExecutor"),
        ("audio", "lameenc"),
        ("audio", "julius"),
        ("separate", "th"),
    ],
)
def test_what_a_module_of_upstream_imports_is_in_ours(module: str, name: str) -> None:
    theirs, ours = (import_module(f"{package}.{module}") for package in ("demucs", "demucs_infer"))
    assert getattr(ours, name) is getattr(theirs, name)


def test_absent_and_damaged_checkpoints_raise_upstreams_kinds_too(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.th"
    damaged.write_bytes(b"no checkpoint")
    for package in (demucs.states, demucs_infer.states):
        with pytest.raises(FileNotFoundError):
            package.load_model(tmp_path / "absent.th")
        with pytest.raises(pickle.UnpicklingError):
            package.load_model(damaged)
    with pytest.raises(ModelLoadingError, match=r"^cannot read .*absent.th: No such file"):
        demucs_infer.states.load_model(tmp_path / "absent.th")
    with pytest.raises(CheckpointError, match=r"damaged.th is not a valid checkpoint"):
        demucs_infer.states.load_model(damaged)


def test_pretrained_has_a_logger() -> None:
    assert demucs_infer.pretrained.logger.name == "demucs_infer.pretrained"


@pytest.mark.parametrize("module", ["train", "solver", "evaluate", "augment"])
def test_module_that_is_left_out_says_what_to_use(module: str) -> None:
    with pytest.raises(ImportError, match=f"demucs_infer.{module} is left out: .*(demucs|metrics)"):
        exec(f"from demucs_infer import {module}")


def test_fatal_writes_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demucs_infer.utils.fatal("no", 3)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "no 3\n"


# ── mistakes ──

WAV = make_noise(2, 800)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: demucs_infer.audio.save_audio(WAV.numpy(), "a.wav", 8000), "from_numpy"),
        (lambda: demucs_infer.audio.convert_audio(WAV.numpy(), 1, 1, 1), "from_numpy"),
        (lambda: demucs_infer.audio.i16_pcm(WAV.numpy()), "got ndarray"),
        (lambda: demucs_infer.audio.f32_pcm([1.0]), "got list"),
        (lambda: demucs_infer.apply.apply_model(ScaleModel(), WAV[None].numpy()), "from_numpy"),
        (lambda: demucs_infer.audio.save_audio(WAV[None], "a.wav", 8000), r"\(1, 2, 800\): pass"),
        (
            lambda: demucs_infer.apply.apply_model(ScaleModel(), WAV[None], device="foo"),
            "'foo' is not a device; use 'auto'",
        ),
        (
            lambda: demucs_infer.apply.apply_model(ScaleModel(), WAV[None], device="cuda:99"),
            "cuda:99 is not available here",
        ),
    ],
)
def test_mistake_at_a_front_of_upstream_is_explained(
    use: Callable[[], object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError, ConfigError), match=message):
        use()


def test_audio_file_takes_a_path_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    demucs_infer.audio.save_audio(WAV, path, 8000)
    assert demucs_infer.audio.AudioFile(os.fsencode(path)).samplerate() == 8000
