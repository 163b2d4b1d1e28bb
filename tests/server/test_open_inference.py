"""The open inference protocol of KServe and Triton, version 2."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer import __version__
from tests.helpers.server_process import FAST, client, decode_wav, song

STEMS = ["drums", "bass", "other", "vocals"]
SONG = song(0.5)


@pytest.fixture(scope="module")
def web(repo: Path, data: Path) -> Iterator[TestClient]:
    with client(repo, data) as opened:
        yield opened


def make_body(audio: bytes = SONG, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(audio).decode()]
    tensor = {"name": "audio", "datatype": "BYTES", "shape": [1], "data": data}
    return {"inputs": [tensor], "parameters": {"shifts": 0}} | changes


def infer(web: TestClient, body: dict[str, Any], model: str = FAST) -> Any:
    return web.post(f"/v2/models/{model}/infer", json=body)


def test_server_and_model_describe_themselves(web: TestClient) -> None:
    assert web.get("/v2").json() == {
        "name": "demucs-infer",
        "version": __version__,
        "extensions": [],
    }
    assert web.get("/v2/health/live").status_code == 200
    assert web.get("/v2/health/ready").status_code == 200
    about = web.get(f"/v2/models/{FAST}").json()
    assert about["name"] == FAST and about["versions"] == ["1"]
    assert about["inputs"] == [{"name": "audio", "datatype": "BYTES", "shape": [1]}]
    assert [output["name"] for output in about["outputs"]] == STEMS
    assert web.get(f"/v2/models/{FAST}/ready").json() == {"name": FAST, "ready": True}
    unready = web.get("/v2/models/bag/ready")
    assert (unready.status_code, unready.json()["ready"]) == (503, False)


def test_inference_returns_stems_of_separate(web: TestClient) -> None:
    response = infer(web, make_body(id="42")).json()
    assert (response["id"], response["model_name"]) == ("42", FAST)
    assert [output["name"] for output in response["outputs"]] == STEMS
    expected = web.post("/v1/separate", params={"shifts": 0, "model": FAST}, content=SONG)
    archive = zipfile.ZipFile(io.BytesIO(expected.content))
    for output in response["outputs"]:
        assert (output["datatype"], output["shape"]) == ("BYTES", [1])
        stem = base64.b64decode(output["data"][0], validate=True)
        assert len(decode_wav(stem)) == 4000
        assert stem == archive.read(f"{output['name']}.wav")


def test_outputs_select_stems(web: TestClient) -> None:
    response = infer(web, make_body(outputs=[{"name": "vocals"}])).json()
    assert [output["name"] for output in response["outputs"]] == ["vocals"]
    assert "id" not in response


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({}, "nobody", (404, "no_such_model")),
        ({"inputs": []}, FAST, (422, "invalid_request")),
        ({"inputs": make_body()["inputs"] * 2}, FAST, (422, "invalid_request")),
        ({"parameters": {"nonsense": 1}}, FAST, (422, "invalid_parameters")),
        ({"outputs": [{"name": "kazoo"}]}, FAST, (422, "invalid_parameters")),
        (make_body(b"no music"), FAST, (422, "unreadable_audio")),
        (json.loads(json.dumps(make_body()).replace("BYTES", "FP32")), FAST,
         (422, "invalid_request")),
    ],
    ids=["model", "no input", "two inputs", "parameter", "stem", "audio", "type"],
)  # fmt: skip
def test_invalid_inference_is_refused(
    web: TestClient, changes: dict[str, Any], model: str, expected: tuple[int, str]
) -> None:
    response = infer(web, make_body() | changes, model)
    assert (response.status_code, response.json()["error"]["code"]) == expected
