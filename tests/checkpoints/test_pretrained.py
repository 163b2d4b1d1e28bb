"""Test the catalog, and how models are downloaded, verified, copied and removed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from demucs_infer import pretrained, repo
from demucs_infer.api import Separator
from demucs_infer.apply import BagOfModels, apply_model
from demucs_infer.checkpoints.cache import CheckpointStore, cache_folder
from demucs_infer.checkpoints.catalog import NOT_STATED, Catalog, load_catalog, read_catalog
from demucs_infer.demucs import Demucs
from demucs_infer.errors import (
    CheckpointError,
    ConfigError,
    DownloadError,
    ModelLoadingError,
    ModelNotFound,
)
from demucs_infer.pretrained import (
    add_checkpoint,
    get_model,
    list_models,
    model_info,
    paths,
    pull,
    remove,
    verify,
)
from tests.helpers.networks import TINY, ScaleModel, randomize
from tests.helpers.oracles import require_module

# ── catalog ──


def test_catalog_is_complete_and_consistent() -> None:
    catalog = load_catalog()
    assert len(catalog.checkpoints) >= 34
    assert len(catalog.bags) >= 17
    for one in catalog.checkpoints.values():
        assert re.fullmatch("[0-9a-f]{64}", one.sha256)
        assert all(url.startswith("https://") for url in one.urls)
        assert bool(one.urls) != one.is_bundled
        checksum = Path(one.file).stem.rpartition("-")[2]
        if re.fullmatch("[0-9a-f]{8}", checksum) and "-" in one.file:
            assert one.sha256.startswith(checksum)
    for bag in catalog.bags.values():
        stems = {catalog.checkpoints[one].stems for one in bag.models}
        assert len(stems) == 1, "the networks of a bag separate the same stems"
        for row in bag.weights or ():
            assert len(row) == len(stems.copy().pop() or row)


def test_catalog_contains_all_models_of_upstream() -> None:
    remote = Path(require_module("demucs").__file__).parent / "remote"
    catalog = load_catalog()
    yaml = require_module("yaml")
    for file in remote.glob("*.yaml"):
        bag = yaml.safe_load(file.read_text())
        ours = catalog.bags[file.stem]
        assert list(ours.models) == bag["models"]
        assert [list(row) for row in ours.weights or ()] == bag.get("weights", [])
        assert ours.segment == bag.get("segment")
    lines = [line.strip() for line in (remote / "files.txt").read_text().splitlines()]
    for line in lines:
        if line.endswith(".th"):
            published = catalog.checkpoints.values()
            assert any(url.endswith(line) for one in published for url in one.urls)


def test_each_stated_license_has_its_source() -> None:
    for one in load_catalog().checkpoints.values():
        if one.is_bundled:
            continue
        assert one.source is not None
        if "fbaipublicfiles" in one.urls[0]:
            assert "scientific purposes only" in one.license
            assert one.source.endswith("/facebookresearch/demucs/issues/327")
        else:
            assert one.license == NOT_STATED


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "[[bag]]\nname = 'x'\nmodels = ['nowhere']",
        "[[checkpoint]]\nsignature = 'x'",
        "[[checkpoint]]\nsignature = 'x'\nfile = 'x'\nsha256 = 'x'\ncolour = 'red'",
        "[[checkpoint]]\nsignature='x'\nfile='x'\nsha256='x'\n" * 2,
    ],
)
def test_invalid_catalog_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match="catalog"):
        read_catalog(tmp_path / "c.toml")


def test_model_info_describes_bags_and_networks() -> None:
    info = model_info("htdemucs_ft")
    assert info.is_bag
    assert info.stems == ("drums", "bass", "other", "vocals")
    assert info.sample_rate == 44100
    assert [file.signature for file in info.files] == [
        "f7e0c4bc",
        "d12395a8",
        "92cfc3b6",
        "04573f0d",
    ]
    assert "scientific" in info.license
    assert info.size == sum(file.size or 0 for file in info.files) == 4 * 84_141_271
    assert model_info("mdx_q").size is None  # not stated by any source
    assert not info.is_cached
    assert model_info("htdemucs_6s").stems == (*info.stems, "guitar", "piano")
    assert model_info("uvr_demucs_model_1").stems is None
    assert model_info("955717e8").is_bag is False


def test_list_models_has_bags_and_single_networks() -> None:
    found = list_models()
    assert set(found) == {"single", "bag"}
    assert "htdemucs" in found["bag"]
    assert "955717e8" in found["single"]


def test_listing_and_errors_import_no_torch() -> None:
    code = """
import sys, socket
def refuse(*_): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from demucs_infer.errors import DemucsError
from demucs_infer.pretrained import (
    add_checkpoint, get_model, list_models, model_info, paths, verify
)
list_models(); model_info("htdemucs"); paths("mdx")
for name in ("htdemucz", "htdemucs", "htdemucs_ft", "955717e8", "hf://htdemucs"):
    try:
        get_model(name, offline=True)
    except DemucsError as error:
        print(error)
    else:
        raise AssertionError(name)
assert "torch" not in sys.modules and "yaml" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    typo, missing, first, single, hub = done.stdout.splitlines()
    assert "Did you mean 'htdemucs'" in typo
    for name, message in (("htdemucs", missing), ("htdemucs_ft", first), ("955717e8", single)):
        assert message.startswith(f"{name}: "), "the name that was given, and not that of a file"
        assert f"models pull {name} --to" in message and f"models info {name}" in message
        assert "'tiny'" in message and os.environ["DEMUCS_INFER_CACHE"] not in message
    assert "its file is not in the cache (84 MB)" in missing
    assert "4 of 4 files are not in the cache (337 MB)" in first
    assert "huggingface.co/adefossez/HTDemucs/resolve/main/htdemucs.yaml" in hub


def test_environment_variable_disables_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUCS_INFER_OFFLINE", "1")
    assert CheckpointStore.from_environment().offline
    assert not CheckpointStore.from_environment(offline=False).offline
    monkeypatch.setenv("DEMUCS_INFER_OFFLINE", "0")
    assert not CheckpointStore.from_environment().offline


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [
        ("linux", "XDG_CACHE_HOME", "base/demucs-infer"),
        ("win32", "LOCALAPPDATA", "base/demucs-infer"),
        ("darwin", "HOME", "base/Library/Caches/demucs-infer"),
    ],
)
def test_cache_folder_follows_platform_and_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, end: str
) -> None:
    monkeypatch.delenv("DEMUCS_INFER_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "base"))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / end
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"
    assert cache_folder(tmp_path / "third") == tmp_path / "third"


# ── a small catalog and its server ──


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


class ModelServer:
    """Small models on a server, with a catalog and a cache of their own."""

    def __init__(self, root: Path, url: str) -> None:
        self.cache, self.served, self.url = root / "cache", root / "served", url
        lines = []
        self.networks = {}
        for seed, signature in enumerate(["aaaa0001", "aaaa0002"]):
            network = randomize(Demucs(**TINY["Demucs"]), seed)
            kwargs, state = TINY["Demucs"], network.state_dict()
            path = self.served / f"{signature}.th"
            torch.save({"klass": Demucs, "args": (), "kwargs": kwargs, "state": state}, path)
            lines.append(self.catalog_entry(signature, path))
            self.networks[signature] = network
        bare = self.served / "bare.ckpt"
        torch.save({"state_dict": self.networks["aaaa0001"].state_dict()}, bare)
        kwargs_toml = "\n".join(
            f"{key} = {str(value).lower() if isinstance(value, bool) else value!r}"
            for key, value in TINY["Demucs"].items()
        )
        stems = 'stems = ["kick", "snare", "cymbals", "toms"]\nklass = "Demucs"\n'
        lines.append(f"{self.catalog_entry('bare', bare)}{stems}[checkpoint.kwargs]\n{kwargs_toml}")
        lines.append("[[bag]]\nname = 'one'\nmodels = ['aaaa0001']")
        lines.append("[[bag]]\nname = 'two'\nmodels = ['aaaa0001', 'aaaa0002']\nsegment = 1")
        (root / "catalog.toml").write_text("\n".join(lines))
        self.catalog: Catalog = read_catalog(root / "catalog.toml")

    def catalog_entry(self, signature: str, path: Path) -> str:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return (
            f"[[checkpoint]]\nsignature = '{signature}'\nfile = '{path.name}'\n"
            f"urls = ['{self.url}/{path.name}']\nsha256 = '{digest}'\n"
        )

    def cached_path(self, name: str) -> Path:
        return self.cache / "models" / name


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "served").mkdir()
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    models = ModelServer(tmp_path, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(pretrained, "load_catalog", lambda: models.catalog)
    monkeypatch.setattr(repo, "load_catalog", lambda: models.catalog)
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(models.cache))
    yield models
    server.shutdown()
    thread.join()
    server.server_close()


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_get_model_downloads_and_builds_a_bag(models: ModelServer) -> None:
    seen: list[int] = []
    bag = get_model("two", progress=lambda done, total: seen.append(done))
    assert isinstance(bag, BagOfModels)
    assert have_equal_weights(bag.models[1], models.networks["aaaa0002"])
    assert max(seen) == (models.served / "aaaa0002.th").stat().st_size
    assert not bag.models[0].training
    offline = get_model("two", offline=True)
    assert isinstance(offline, BagOfModels)


def test_models_make_a_bag_on_the_spot(models: ModelServer) -> None:
    bag = get_model("two+aaaa0001@0.5")
    assert isinstance(bag, BagOfModels)
    assert bag.weights == [[0.5] * 4, [0.5] * 4, [0.5] * 4]
    assert have_equal_weights(bag.models[2], models.networks["aaaa0001"])
    info = model_info("two+aaaa0001@0.5")
    assert info.is_bag and [file.signature for file in info.files] == ["aaaa0001", "aaaa0002"]
    assert sorted(path.name for path in pull("aaaa0002+aaaa0001@3")) == [
        "aaaa0001.th",
        "aaaa0002.th",
    ]
    folder = models.cache / "usb"
    pull("two", to=folder)
    local = get_model("two+aaaa0001@0.25", repo=folder)
    assert isinstance(local, BagOfModels) and local.weights[2] == [0.25] * 4
    # A file is a model too, and so is a path with a plus in its name.
    path = models.cached_path("aaaa0001.th")
    mixed = get_model(f"{path}@3+aaaa0002")
    assert isinstance(mixed, BagOfModels) and mixed.weights == [[3.0] * 4, [1.0] * 4]
    odd = path.rename(path.with_name("a+b.th"))
    assert have_equal_weights(get_model(str(odd)), models.networks["aaaa0001"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aaaa0001+", "invalid bag .*'' must be the name of a model, or NAME@WEIGHT"),
        ("aaaa0001+aaaa0002@x", "'aaaa0002@x' must be"),
        ("aaaa0001+aaaa0002@0", "a weight above 0"),
        ("aaaa0001+aaaa0002@nan", "a weight above 0"),
        ("aaaa0001+@2", "'@2' must be"),
        ("aaaa0001+nosuch@2", "nosuch"),
        ("+".join(["aaaa0001"] * 17), "17 models in one bag: the limit is 16"),
        ("aaaa0001+bare", r"cannot make a bag of 'aaaa0001\+bare': .* differ in sources"),
    ],
)
def test_invalid_bag_on_the_spot_is_refused(models: ModelServer, name: str, message: str) -> None:
    with pytest.raises(ModelLoadingError, match=message):
        get_model(name)


def test_bag_on_the_spot_of_a_pair_of_files_is_refused_before_downloads() -> None:
    name = "tiny+mel_band_roformer_kim"
    for function in (get_model, pull):
        with pytest.raises(ModelLoadingError, match="cannot make a bag of .*write a bag with the"):
            function(name)


def test_bag_on_the_spot_is_the_weighted_mean() -> None:
    networks = [ScaleModel(gains=[0.2, 0.4]), ScaleModel(gains=[1.0, 0.0])]
    inner = BagOfModels([ScaleModel(gains=[0.0, 1.0]), networks[1]], [[1.0, 3.0], [3.0, 1.0]])
    bag = repo.combine_models("a+b@0.5", [(networks[0], 1.0), (inner, 0.5)])
    wav = torch.randn(1, 2, 4000)
    parts = [apply_model(model, wav, shifts=0) for model in (networks[0], inner)]
    expected = (parts[0] + 0.5 * parts[1]) / 1.5
    torch.testing.assert_close(apply_model(bag, wav, shifts=0), expected, rtol=0, atol=1e-6)


def test_progress_draws_a_bar_for_downloads_only(
    models: ModelServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Separator("aaaa0001", device="cpu")
    assert capsys.readouterr().err == ""
    Separator("two", device="cpu", progress=True)  # one of its files is there already
    assert "downloading two: " in capsys.readouterr().err
    Separator("two", device="cpu", progress=True)
    assert capsys.readouterr().err == ""


def test_get_model_loads_a_network_by_signature(models: ModelServer) -> None:
    network = get_model("aaaa0001")
    assert type(network) is Demucs
    assert have_equal_weights(network, models.networks["aaaa0001"])


def test_bare_state_dict_takes_architecture_and_stems_from_the_catalog(models: ModelServer) -> None:
    network = get_model("bare")
    assert isinstance(network, Demucs)
    assert network.sources == ["kick", "snare", "cymbals", "toms"]


def test_get_model_loads_a_network_by_path(models: ModelServer) -> None:
    file = models.served / "aaaa0001.th"
    for name in (file, str(file)):
        assert have_equal_weights(get_model(name), models.networks["aaaa0001"])


def test_file_copied_into_the_cache_is_hashed_once(models: ModelServer) -> None:
    """Hashing it writes a stamp, which is trusted afterwards."""
    models.cached_path("x").parent.mkdir(parents=True)
    good = (models.served / "aaaa0001.th").read_bytes()
    models.cached_path("aaaa0001.th").write_bytes(good)
    get_model("one", offline=True)
    assert models.cached_path("aaaa0001.th.stamp").is_file()
    models.cached_path("aaaa0001.th").write_bytes(good[:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged or a different file"):
        get_model("one", offline=True)


def test_verify_hashes_a_file_despite_its_stamp(models: ModelServer) -> None:
    (path,) = pull("one")
    assert verify("one") == [path]
    about, data = path.stat(), bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert model_info("one").is_cached  # rot that leaves size and time alone goes unseen…
    with pytest.raises(CheckpointError, match="sha256"):
        verify("one")  # …but not here


def test_download_with_wrong_digest_is_not_kept(models: ModelServer) -> None:
    (models.served / "aaaa0001.th").write_bytes(b"something else")
    with pytest.raises(DownloadError, match="sha256"):
        get_model("one")
    assert not models.cached_path("aaaa0001.th").exists()


def test_mirror_is_tried_before_the_original_url(
    models: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models.served / "mirror").mkdir()
    (models.served / "aaaa0001.th").rename(models.served / "mirror" / "aaaa0001.th")
    monkeypatch.setenv("DEMUCS_INFER_MIRROR", f"{models.url}/mirror/")
    pull("one")
    (models.served / "mirror" / "aaaa0002.th").write_bytes(b"a mirror that lies")
    assert len(pull("two")) == 2  # the original host is asked after it


def test_pull_returns_the_paths_of_its_files(models: ModelServer) -> None:
    assert paths("two") == [models.cached_path("aaaa0001.th"), models.cached_path("aaaa0002.th")]
    assert not model_info("two").is_cached
    assert pull("two") == paths("two")
    info = model_info("two")
    assert info.is_cached
    assert info.size == sum(path.stat().st_size for path in paths("two"))


def test_folder_of_a_pull_is_a_repository(models: ModelServer, tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    pull("two", to=folder)
    bag = get_model("two", repo=folder)
    assert isinstance(bag, BagOfModels)
    assert have_equal_weights(bag.models[1], models.networks["aaaa0002"])
    assert set(list_models(folder)["bag"]) == {"two"}


def test_add_checkpoint_identifies_files_by_digest(models: ModelServer, tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    folder.mkdir()
    renamed = (models.served / "aaaa0001.th").rename(folder / "whatever.th")
    (folder / "notes.txt").write_text("hello")
    assert add_checkpoint(folder) == [models.cached_path("aaaa0001.th")]
    assert have_equal_weights(get_model("aaaa0001", offline=True), models.networks["aaaa0001"])
    assert renamed.exists()
    renamed.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"whatever\.th"):
        add_checkpoint(renamed)


def test_remove_keeps_files_of_other_bags(models: ModelServer) -> None:
    pull("two")
    assert remove("two") == [models.cached_path("aaaa0002.th")]  # `one` still has its network
    assert remove("one") == [models.cached_path("aaaa0001.th")]
    assert remove("one") == []
    assert not any(model_info(name).is_cached for name in ("one", "two"))


def test_bundled_model_is_never_downloaded(
    models: ModelServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = models.served / "aaaa0001.th"
    text = (
        "[[checkpoint]]\nsignature = 'tiny'\nis_bundled = true\n"
        f"file = '{file}'\nsha256 = '{hashlib.sha256(file.read_bytes()).hexdigest()}'\n"
    )
    (tmp_path / "is_bundled.toml").write_text(text)
    models.catalog = read_catalog(tmp_path / "is_bundled.toml")
    assert have_equal_weights(get_model("tiny", offline=True), models.networks["aaaa0001"])
    assert model_info("tiny").is_bundled
    assert model_info("tiny").is_cached
    assert remove("tiny") == []
    assert list_models()["single"] == {"tiny": file}


@pytest.mark.parametrize("is_bundled", [True, False])
def test_error_of_missing_file_offers_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_bundled: bool
) -> None:
    text = f"[[checkpoint]]\nsignature = 'small'\nis_bundled = {str(is_bundled).lower()}\n"
    text += f"file = 'x.th'\nsha256 = '{'0' * 64}'\n"
    (tmp_path / "one.toml").write_text(text)
    catalog = read_catalog(tmp_path / "one.toml")
    shipped = load_catalog()
    bags = {"htdemucs_ft": shipped.bags["htdemucs_ft"]}
    checkpoints = {**catalog.checkpoints, **{c.signature: c for c in shipped.files("htdemucs_ft")}}
    catalog = replace(catalog, bags=bags, checkpoints=checkpoints)
    monkeypatch.setattr("demucs_infer.pretrained.load_catalog", lambda: catalog)
    with pytest.raises(DownloadError) as caught:
        get_model("htdemucs_ft", offline=True, cache_dir=tmp_path)
    message = str(caught.value)
    assert ("bundled model 'small'" in message) is is_bundled
    assert message.startswith("htdemucs_ft: 4 of 4 files are not in the cache (337 MB)")
    assert "models pull htdemucs_ft --to FOLDER" in message and str(tmp_path) not in message


def test_read_only_cache_is_used(models: ModelServer) -> None:
    pull("one")
    models.cached_path("aaaa0001.th.stamp").unlink()
    models.cached_path("aaaa0001.th").parent.chmod(0o555)
    try:
        assert get_model("aaaa0001", offline=True) is not None
    finally:
        models.cached_path("aaaa0001.th").parent.chmod(0o755)


def test_unknown_name_is_refused_by_all_functions(models: ModelServer) -> None:
    for function in (get_model, pull, paths, verify, remove, model_info):
        with pytest.raises(ModelNotFound, match="no model named 'three'"):
            function("three")


@pytest.mark.parametrize("function", [get_model, model_info, pull])
@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        pytest.param("nope", [], id="nothing similar"),
        pytest.param("htdemucz", ["htdemucs"], id="typo in a bag"),
        pytest.param("tny", ["tiny"], id="typo in a bundled model"),
        pytest.param("955717e9", ["955717e8"], id="typo in a signature"),
    ],
)
def test_error_of_unknown_name_suggests_similar_ones_and_how_to_list_all(
    function: Callable[[str], object], name: str, suggestions: list[str]
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        function(name)
    message = str(caught.value)
    assert "list_models()" in message and "demucs-infer models ls" in message
    assert all(repr(suggestion) in message for suggestion in suggestions)
    assert ("Did you mean" in message) == bool(suggestions)
    signatures = re.findall(r"\b[0-9a-f]{8,9}\b", message)
    assert set(signatures) <= {name, *suggestions}
    assert len(message) < 200


def test_error_of_unknown_name_in_a_folder_says_how_to_list_it(tmp_path: Path) -> None:
    (tmp_path / "abc.th").touch()
    with pytest.raises(ModelNotFound, match="Did you mean 'abc'.*list_models") as caught:
        get_model("abd", repo=tmp_path)
    assert "models ls" not in str(caught.value), "it lists the catalog, not a folder"


def test_model_loading_errors_are_runtime_errors_as_upstreams() -> None:
    from demucs.repo import ModelLoadingError as UpstreamError

    assert issubclass(UpstreamError, RuntimeError)
    for error in (ModelLoadingError, ModelNotFound, CheckpointError, DownloadError):
        assert issubclass(error, RuntimeError)
