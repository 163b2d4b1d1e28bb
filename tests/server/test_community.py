"""Test that a server serves networks of the community: a configuration and a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from demucs_infer import Separator
from demucs_infer.errors import ConfigError
from demucs_infer.server import ServerSettings, create_app
from demucs_infer.server.store import JobStore
from tests.helpers.community import CONFIGS, decibels, write_files
from tests.helpers.oracles import require_module
from tests.helpers.server_process import client, decode_wav, song

KIND = "bs_roformer, one target"
NAME = "singer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_module("pymss_core")
    folder = tmp_path_factory.mktemp("models")
    write_files(CONFIGS[KIND], folder, NAME)
    return folder


@pytest.fixture(scope="module")
def web(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client(folder, tmp_path_factory.mktemp("data"), models=(NAME,)) as web:
        yield web


def separate(web: TestClient, data: bytes, **parameters: Any) -> torch.Tensor:
    response = web.post(
        "/v1/separate",
        params={"bits": "32", "clip": "none", **parameters},
        content=data,
        headers={"Accept": "audio/wav"},
    )
    assert response.status_code == 200, response.text
    return torch.from_numpy(decode_wav(response.content).T)


def test_stems_of_the_file_are_listed(web: TestClient) -> None:
    (model,) = web.get("/v1/models").json()["models"]
    assert (model["name"], model["stems"]) == (NAME, ["vocals", "other"])


def test_windows_are_those_of_the_file(web: TestClient, folder: Path, tmp_path: Path) -> None:
    data = song(0.7, rate=44100)
    (tmp_path / "song.wav").write_bytes(data)
    samples = torch.from_numpy(soundfile.read(tmp_path / "song.wav", dtype="float32")[0].T)
    files = {"config": folder / f"{NAME}.yaml", "checkpoint": folder / f"{NAME}.ckpt"}
    separator = Separator.from_pretrained(**files)
    for stem, expected in separator.run(samples, sample_rate=44100).stems.items():
        assert decibels(expected, separate(web, data, stems=stem)) >= 100


def test_client_may_change_settings(web: TestClient) -> None:
    data = song(0.7, rate=44100)
    usual = separate(web, data, stems="vocals")
    assert not torch.equal(usual, separate(web, data, stems="vocals", overlap="0.75"))


def test_stored_job_keeps_settings_that_equal_the_usual_defaults(
    folder: Path, tmp_path: Path
) -> None:
    parameters = {"overlap": "0.25", "stems": "vocals"}
    with client(folder, tmp_path, models=(NAME,), warmup=False) as web:
        job = web.post("/v1/jobs", params=parameters, content=song(0.7, rate=44100)).json()
    store = JobStore(tmp_path / "jobs.sqlite")
    record = store.get(job["id"])
    store.close()
    assert record is not None
    assert record.request == {"overlap": 0.25, "stems": ["vocals"]}


def test_server_without_the_files_of_a_network_does_not_start(tmp_path: Path) -> None:
    network = {"models": ("mel_band_roformer_kim",), "offline": True, "cache_dir": tmp_path}
    with pytest.raises(ConfigError, match="mel_band_roformer_kim: 2 of 2 files are not in the"):
        create_app(ServerSettings(data_dir=tmp_path, **network))
