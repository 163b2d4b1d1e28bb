"""Names: what is known without a network, what is fetched, kept, checked, moved and removed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from demucs_infer import pretrained, repo
from demucs_infer.api import Separator
from demucs_infer.apply import BagOfModels
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
from tests.helpers.networks import TINY, need_module, randomise

# ── the catalogue ──


def test_the_catalogue_is_complete_and_sound() -> None:
    catalog = load_catalog()
    assert len(catalog.checkpoints) >= 34
    assert len(catalog.bags) >= 17
    for one in catalog.checkpoints.values():
        assert re.fullmatch("[0-9a-f]{64}", one.sha256)
        assert all(url.startswith("https://") for url in one.urls)
        assert bool(one.urls) != one.ships
        checksum = Path(one.file).stem.rpartition("-")[2]
        if re.fullmatch("[0-9a-f]{8}", checksum) and "-" in one.file:
            assert one.sha256.startswith(checksum)
    for bag in catalog.bags.values():
        stems = {catalog.checkpoints[one].stems for one in bag.models}
        assert len(stems) == 1, "the networks of a bag separate the same stems"
        for row in bag.weights or ():
            assert len(row) == len(stems.copy().pop() or row)


def test_upstreams_own_list_is_in_it() -> None:
    remote = Path(need_module("demucs").__file__).parent / "remote"
    catalog = load_catalog()
    yaml = need_module("yaml")
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


def test_no_licence_is_made_up() -> None:
    for one in load_catalog().checkpoints.values():
        if one.ships:
            continue
        assert one.source is not None
        if "fbaipublicfiles" in one.urls[0]:
            assert "scientific purposes only" in one.licence
            assert one.source.endswith("/facebookresearch/demucs/issues/327")
        else:
            assert one.licence == NOT_STATED


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
def test_a_catalogue_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match="catalog"):
        read_catalog(tmp_path / "c.toml")


def test_what_is_known_about_a_name() -> None:
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
    assert "scientific" in info.licence
    assert info.size == sum(file.size or 0 for file in info.files) == 4 * 84_141_271
    assert model_info("mdx_q").size is None  # one that nobody states
    assert not info.is_cached
    assert model_info("htdemucs_6s").stems == (*info.stems, "guitar", "piano")
    assert model_info("uvr_demucs_model_1").stems is None
    assert model_info("955717e8").is_bag is False


def test_the_two_kinds_of_models() -> None:
    found = list_models()
    assert set(found) == {"single", "bag"}
    assert "htdemucs" in found["bag"]
    assert "955717e8" in found["single"]


def test_listing_and_missing_take_no_torch() -> None:
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
    checkpoint = load_catalog().checkpoints["955717e8"]
    for message in (missing, single):
        assert all(part in message for part in (checkpoint.file, checkpoint.sha256))
        assert checkpoint.urls[0] in message
        assert os.environ["DEMUCS_INFER_CACHE"] in message
    assert "f7e0c4bc" in first
    assert "huggingface.co/adefossez/HTDemucs/resolve/main/htdemucs.yaml" in hub


def test_offline_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, end: str
) -> None:
    monkeypatch.delenv("DEMUCS_INFER_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "base"))
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / end
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other"
    assert cache_folder(tmp_path / "third") == tmp_path / "third"


# ── a catalogue of our own, and the server that it names ──


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet."""


class World:
    """Small models on a server, in a catalogue, with a cache of their own."""

    def __init__(self, root: Path, url: str) -> None:
        self.cache, self.served, self.url = root / "cache", root / "served", url
        lines = []
        self.networks = {}
        for seed, signature in enumerate(["aaaa0001", "aaaa0002"]):
            network = randomise(Demucs(**TINY["Demucs"]), seed)
            kwargs, state = TINY["Demucs"], network.state_dict()
            path = self.served / f"{signature}.th"
            torch.save({"klass": Demucs, "args": (), "kwargs": kwargs, "state": state}, path)
            lines.append(self.entry(signature, path))
            self.networks[signature] = network
        bare = self.served / "bare.ckpt"
        torch.save({"state_dict": self.networks["aaaa0001"].state_dict()}, bare)
        kwargs_toml = "\n".join(
            f"{key} = {str(value).lower() if isinstance(value, bool) else value!r}"
            for key, value in TINY["Demucs"].items()
        )
        stems = 'stems = ["kick", "snare", "cymbals", "toms"]\nklass = "Demucs"\n'
        lines.append(f"{self.entry('bare', bare)}{stems}[checkpoint.kwargs]\n{kwargs_toml}")
        lines.append("[[bag]]\nname = 'one'\nmodels = ['aaaa0001']")
        lines.append("[[bag]]\nname = 'two'\nmodels = ['aaaa0001', 'aaaa0002']\nsegment = 1")
        (root / "catalog.toml").write_text("\n".join(lines))
        self.catalog: Catalog = read_catalog(root / "catalog.toml")

    def entry(self, signature: str, path: Path) -> str:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return (
            f"[[checkpoint]]\nsignature = '{signature}'\nfile = '{path.name}'\n"
            f"urls = ['{self.url}/{path.name}']\nsha256 = '{digest}'\n"
        )

    def cached(self, name: str) -> Path:
        return self.cache / "models" / name


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "served").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    world = World(tmp_path, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(pretrained, "load_catalog", lambda: world.catalog)
    monkeypatch.setattr(repo, "load_catalog", lambda: world.catalog)
    monkeypatch.setenv("DEMUCS_INFER_CACHE", str(world.cache))
    yield world
    server.shutdown()
    thread.join()
    server.server_close()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_name_becomes_a_bag(world: World) -> None:
    seen: list[int] = []
    bag = get_model("two", progress=lambda done, total: seen.append(done))
    assert isinstance(bag, BagOfModels)
    assert same(bag.models[1], world.networks["aaaa0002"])
    assert max(seen) == (world.served / "aaaa0002.th").stat().st_size
    assert not bag.models[0].training
    offline = get_model("two", offline=True)
    assert isinstance(offline, BagOfModels)


def test_who_asks_for_progress_sees_a_download(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    Separator("aaaa0001", device="cpu")
    assert capsys.readouterr().err == ""
    Separator("two", device="cpu", progress=True)  # one of its files is there already
    assert "downloading two: " in capsys.readouterr().err
    Separator("two", device="cpu", progress=True)
    assert capsys.readouterr().err == ""


def test_a_signature_becomes_a_network(world: World) -> None:
    network = get_model("aaaa0001")
    assert type(network) is Demucs
    assert same(network, world.networks["aaaa0001"])


def test_a_bare_state_has_its_architecture_and_names_from_the_catalogue(world: World) -> None:
    network = get_model("bare")
    assert isinstance(network, Demucs)
    assert network.sources == ["kick", "snare", "cymbals", "toms"]


def test_a_path_is_a_name(world: World) -> None:
    file = world.served / "aaaa0001.th"
    for name in (file, str(file)):
        assert same(get_model(name), world.networks["aaaa0001"])


def test_a_file_put_there_by_hand_is_checked_once(world: World) -> None:
    """Its digest is taken, and a stamp written; afterwards the stamp is believed."""
    world.cached("x").parent.mkdir(parents=True)
    good = (world.served / "aaaa0001.th").read_bytes()
    world.cached("aaaa0001.th").write_bytes(good)
    get_model("one", offline=True)
    assert world.cached("aaaa0001.th.stamp").is_file()
    world.cached("aaaa0001.th").write_bytes(good[:-1] + b"!")
    with pytest.raises(CheckpointError, match="damaged or a different file"):
        get_model("one", offline=True)


def test_verify_does_not_believe_the_stamp(world: World) -> None:
    (path,) = pull("one")
    assert verify("one") == [path]
    about, data = path.stat(), bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert model_info("one").is_cached  # rot that leaves size and time alone goes unseen…
    with pytest.raises(CheckpointError, match="sha256"):
        verify("one")  # …but not here


def test_the_wrong_bytes_at_the_server_leave_nothing(world: World) -> None:
    (world.served / "aaaa0001.th").write_bytes(b"something else")
    with pytest.raises(DownloadError, match="sha256"):
        get_model("one")
    assert not world.cached("aaaa0001.th").exists()


def test_a_mirror_of_ones_own_goes_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.served / "mirror").mkdir()
    (world.served / "aaaa0001.th").rename(world.served / "mirror" / "aaaa0001.th")
    monkeypatch.setenv("DEMUCS_INFER_MIRROR", f"{world.url}/mirror/")
    pull("one")
    (world.served / "mirror" / "aaaa0002.th").write_bytes(b"a mirror that lies")
    assert len(pull("two")) == 2  # the original host is asked after it


def test_what_is_pulled_is_where_it_is_said_to_be(world: World) -> None:
    assert paths("two") == [world.cached("aaaa0001.th"), world.cached("aaaa0002.th")]
    assert not model_info("two").is_cached
    assert pull("two") == paths("two")
    info = model_info("two")
    assert info.is_cached
    assert info.size == sum(path.stat().st_size for path in paths("two"))


def test_a_pulled_folder_is_a_repository(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    pull("two", to=folder)
    bag = get_model("two", repo=folder)
    assert isinstance(bag, BagOfModels)
    assert same(bag.models[1], world.networks["aaaa0002"])
    assert set(list_models(folder)["bag"]) == {"two"}


def test_import_goes_by_content(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    folder.mkdir()
    renamed = (world.served / "aaaa0001.th").rename(folder / "whatever.th")
    (folder / "notes.txt").write_text("hello")
    assert add_checkpoint(folder) == [world.cached("aaaa0001.th")]
    assert same(get_model("aaaa0001", offline=True), world.networks["aaaa0001"])
    assert renamed.exists()
    renamed.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"whatever\.th"):
        add_checkpoint(renamed)


def test_removing_leaves_what_others_need(world: World) -> None:
    pull("two")
    assert remove("two") == [world.cached("aaaa0002.th")]  # `one` still has its network
    assert remove("one") == [world.cached("aaaa0001.th")]
    assert remove("one") == []
    assert not any(model_info(name).is_cached for name in ("one", "two"))


def test_a_model_that_ships_is_never_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = world.served / "aaaa0001.th"
    text = (
        "[[checkpoint]]\nsignature = 'tiny'\nships = true\n"
        f"file = '{file}'\nsha256 = '{hashlib.sha256(file.read_bytes()).hexdigest()}'\n"
    )
    (tmp_path / "ships.toml").write_text(text)
    world.catalog = read_catalog(tmp_path / "ships.toml")
    assert same(get_model("tiny", offline=True), world.networks["aaaa0001"])
    assert model_info("tiny").ships
    assert model_info("tiny").is_cached
    assert remove("tiny") == []
    assert list_models()["single"] == {"tiny": file}


@pytest.mark.parametrize("ships", [True, False])
def test_what_is_missing_offline_has_a_stand_in_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ships: bool
) -> None:
    text = f"[[checkpoint]]\nsignature = 'small'\nships = {str(ships).lower()}\n"
    text += f"file = 'x.th'\nsha256 = '{'0' * 64}'\n"
    (tmp_path / "one.toml").write_text(text)
    catalog = read_catalog(tmp_path / "one.toml")
    monkeypatch.setattr("demucs_infer.checkpoints.cache.load_catalog", lambda: catalog)
    with pytest.raises(DownloadError) as caught:
        get_model("955717e8", offline=True, cache_dir=tmp_path)
    assert ("bundled model 'small'" in str(caught.value)) is ships


def test_a_cache_that_cannot_be_written_to_is_still_read(world: World) -> None:
    pull("one")
    world.cached("aaaa0001.th.stamp").unlink()
    world.cached("aaaa0001.th").parent.chmod(0o555)
    try:
        assert get_model("aaaa0001", offline=True) is not None
    finally:
        world.cached("aaaa0001.th").parent.chmod(0o755)


def test_an_unknown_name(world: World) -> None:
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
