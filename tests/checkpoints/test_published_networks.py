"""Test the networks of the community in the catalog: what is known of them, and their files."""

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demucs_infer import CheckpointError, ModelLoadingError, get_model, model_info
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.checkpoints.catalog import PublishedNetwork, load_catalog
from demucs_infer.cli.main import main
from demucs_infer.custom.community import TYPES
from tests.helpers.cli_process import write_song
from tests.helpers.community import CONFIGS, write_files
from tests.helpers.oracles import require_module

NETWORKS = load_catalog().networks


def test_catalog_has_what_is_known_of_a_dozen_networks() -> None:
    assert len(NETWORKS) >= 12
    for name, network in NETWORKS.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert network.architecture in TYPES
        assert network.stems and len(set(network.stems)) == len(network.stems)
        for url in (network.config, network.checkpoint, network.source):
            assert url.startswith("https://")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", network.as_of)
        assert (network.score is None) == (network.score_source is None)
        assert network.sha256 == "" or re.fullmatch(r"[0-9a-f]{64}", network.sha256)


def test_license_is_stated_only_where_the_weights_are_published() -> None:
    licenses = {name: net.license for name, net in NETWORKS.items() if net.license != "not stated"}
    assert licenses == {
        "mel_band_roformer_kim": "MIT; an earlier copy of its page says unknown",
        "mel_band_roformer_dereverb": "GPL-3.0",
        "mel_band_roformer_dereverb_echo": "CC-BY-NC-SA-4.0",
    }
    for name in licenses:
        assert NETWORKS[name].checkpoint.startswith(f"{NETWORKS[name].source}/")


def test_score_is_that_of_the_file_or_another_test_set_is_named() -> None:
    for network in NETWORKS.values():
        own = re.search(r"sdr_(\d+\.\d\d)", network.checkpoint)
        if network.score is None or own is None or own[1] in network.score:
            continue
        assert re.search("dataset|test set", network.score_source or "")


def test_every_network_is_listed_with_what_is_known_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["models", "ls", "--json", "--cache-dir", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for name, network in NETWORKS.items():
        row = rows[name]
        assert row["stems"] == list(network.stems) and not row["is_cached"]
        assert row["license"] == f"{network.license} (as of {network.as_of})"
        with_source = f"{network.score} ({network.score_source})"
        score = with_source if network.score else "no score published"
        for text in (f"{network.architecture} by {network.author}", score):
            assert text in row["note"]


def test_list_and_description_have_type_license_and_score(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["models", "ls", "--cache-dir", str(tmp_path)]) == 0
    listing = capsys.readouterr().out
    for text in ("mel_band_roformer_kim", "scnet by starrytong", "GPL-3.0", "as listed by MSST"):
        assert text in listing
    assert main(["models", "info", "scnet_large", "--cache-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "9.32 dB SDR" in text and "license: not stated" in text
    assert text.count("sha256 not published: that of the first download is enforced") == 2
    assert main(["models", "info", "htdemucs", "--cache-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2026-07-11" in text and "2026-08-31" in text


def test_library_says_how_to_load_one() -> None:
    with pytest.raises(ModelLoadingError, match=r"pull\('scnet_large'\), then Separator"):
        get_model("scnet_large")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "server"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", folder
    running.shutdown()
    thread.join()
    running.server_close()


def test_first_download_is_kept_and_enforced(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    (folder / "a.yaml").write_text("training: {}")
    (folder / "a.ckpt").write_bytes(b"weights")
    network = PublishedNetwork(
        name="a",
        architecture="scnet",
        author="somebody",
        config=f"{url}/a.yaml",
        checkpoint=f"{url}/a.ckpt",
        stems=("vocals",),
        source=url,
        as_of="2026-01-01",
    )
    store = CheckpointStore.from_environment(tmp_path / "cache")
    config, weights = (store.obtain(file) for file in network.files)
    assert (config.name, weights.name) == ("a.yaml", "a.ckpt")
    digest = store.digest(network.files[1])
    assert len(digest) == 64
    for file in network.files:
        store.verify(file)
    weights.write_bytes(b"others!")
    with pytest.raises(CheckpointError, match=f"expected sha256 {digest}"):
        store.obtain(network.files[1])


def test_command_runs_a_network_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_module("pymss_core")
    models = tmp_path / "cache/models"
    models.mkdir(parents=True)
    config = {**CONFIGS["bs_roformer, one target"]}
    config["audio"] = {**config["audio"], "sample_rate": 8000}
    write_files(config, models, "mel_band_roformer_kim")
    write_song(tmp_path / "song.wav", 1)
    monkeypatch.chdir(tmp_path)
    words = ["song.wav", "-n", "mel_band_roformer_kim", "--cache-dir", "cache", "--offline"]
    assert main([*words, "--json"]) == 0
    folder = tmp_path / "separated/mel_band_roformer_kim/song"
    assert {path.name for path in folder.glob("*.wav")} == {"vocals.wav", "other.wav"}
    assert json.loads(capsys.readouterr().out)
    assert model_info("mel_band_roformer_kim", cache_dir=tmp_path / "cache").is_cached
