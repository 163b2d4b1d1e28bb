"""Every route and every error of the server, in this process."""

import base64
import errno
import hashlib
import io
import json
import os
import sqlite3
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.output_paths import OutputPaths
from demucs_infer.batch.request import ModelSpec
from demucs_infer.batch.result import Fault, TrackResult
from demucs_infer.cli.main import main
from demucs_infer.errors import AudioReadError, ConfigError
from demucs_infer.options import Request
from demucs_infer.server import ServerSettings
from demucs_infer.server.errors import ApiError
from demucs_infer.server.middleware import AllowedHosts
from demucs_infer.server.queue import Job
from demucs_infer.server.schemas import MIME_TYPES, RequestSchema
from demucs_infer.server.store import JobRecord, JobStore
from demucs_infer.server.worker import WorkItem, check_result
from tests.helpers.server_process import FAST, RATE, client, decode_wav, song, wait_until

STEMS = ["drums", "bass", "other", "vocals"]
SONG = song(1.5)
PLAIN = {"shifts": "0"}


@pytest.fixture(scope="module")
def web(repo: Path, data: Path) -> Iterator[TestClient]:
    limits = {"max_duration_seconds": 20.0, "max_bytes": 1 << 20, "max_instances": 4}
    with client(repo, data, **limits, max_json_bytes=1 << 21) as opened:
        yield opened
        assert list((data / "uploads").iterdir()) == []  # no test leaves an upload behind


def instance(audio: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(audio).decode()}


def read_error(response: Any) -> tuple[int, str]:
    """Return status and code of an error response; its message must reveal no server path."""
    error = response.json()["error"]
    assert set(error) == {"code", "message"}
    assert "Traceback" not in error["message"] and "/tmp" not in error["message"]
    return response.status_code, error["code"]


def wait_for_job(web: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    wait_until(
        lambda: web.get(f"/v1/jobs/{job['id']}").json()["status"] not in ("queued", "running")
    )
    view: dict[str, Any] = web.get(f"/v1/jobs/{job['id']}").json()
    return view


# ── operation ──


def test_health_liveness_readiness_and_metrics(web: TestClient) -> None:
    assert web.get("/health").json()["status"] == "healthy"
    assert web.head("/health").status_code == 200
    assert web.get("/livez").status_code == web.get("/readyz").status_code == 200
    assert "demucs_ready 1.0" in web.get("/metrics").text


def test_dead_worker_makes_server_unready(repo: Path, tmp_path: Path) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with client(repo, tmp_path) as web:
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        job = web.post("/v1/jobs", params={"model": "bag", "shifts": 9}, content=song(5.0)).json()
        live = jobs.get_job(job["id"])
        wait_until(lambda: live.live is not None)
        live.item.cancel.is_set = die
        wait_until(lambda: jobs.dead_workers == 1)
        wait_until(lambda: web.get(f"/v1/jobs/{job['id']}").json()["status"] == "failed")
        assert "demucs_ready 0.0" in web.get("/metrics").text
        assert "demucs_workers_dead 1.0" in web.get("/metrics").text
        for path in ("/readyz", "/health", "/livez"):
            response = web.get(path)
            assert (response.status_code, response.json()["status"]) == (503, "dead")


def test_metrics_of_tracks(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path) as web:
        for seed in (1, 1, 2):
            web.post("/v1/separate", params=PLAIN, content=song(0.5, seed))
        lines = web.get("/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        for name in ("queue_wait_seconds", "track_duration_seconds", "real_time_factor"):
            assert found[f"demucs_{name}_count"] == "2.0"
        assert found["demucs_track_duration_seconds_sum"] == "1.0"
        assert found["demucs_jobs_cached_total"] == "1.0"
        assert found["demucs_cache_evictions_total"] == "0.0"
        assert float(found["process_resident_memory_bytes"]) > 1e7


def test_unknown_method_is_counted_as_other(web: TestClient) -> None:
    for number in range(3):
        assert web.request(f"INVENTED{number}", "/livez").status_code == 405
    text = web.get("/metrics").text
    assert "INVENTED" not in text
    assert 'demucs_http_requests_total{method="other",route="/livez",status="405"} 3.0' in text


def test_refused_request_is_counted_with_its_method(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, api_keys=("the only key",)) as web:
        for method in ("GET", "POST", "DELETE", "INVENTED"):
            assert web.request(method, "/v1/jobs").status_code == 401
        assert web.get("/nowhere").status_code == 404
        text = web.get("/metrics", headers={"X-API-Key": "the only key"}).text
        for method in ("GET", "POST", "DELETE", "other"):
            labels = f'method="{method}",route="other",status="401"'
            assert f"demucs_http_requests_total{{{labels}}} 1.0" in text
        assert 'method="GET",route="other",status="404"' in text


def test_models_route_lists_models_stems_formats_and_limits(web: TestClient) -> None:
    menu = web.get("/v1/models").json()
    assert [one["name"] for one in menu["models"]] == [FAST, "bag"]
    assert menu["models"][0]["stems"] == STEMS and menu["models"][0]["is_default"]
    assert (
        {one["name"] for one in menu["formats"]} == set(MIME_TYPES) == set(FORMATS) - {"stem.mp4"}
    )
    assert menu["max_duration_seconds"] == 20
    assert set(RequestSchema.model_json_schema()["properties"]["format"]["enum"]) == set(MIME_TYPES)


def test_every_response_has_security_headers(web: TestClient) -> None:
    for path in ("/", "/health", "/nowhere", "/static/app.js"):
        headers = web.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")


def test_pages_load_nothing_from_other_hosts(web: TestClient) -> None:
    for path in ("/", "/docs", "/static/app.js", "/static/player.js", "/static/api.js",
                 "/static/texts.js", "/static/draw.js", "/static/stretch.js",
                 "/static/transport.js", "/static/style.css", "/static/docs.js",
                 "/static/icon.svg"):  # fmt: skip
        response = web.get(path)
        assert response.status_code == 200
        text = response.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text


def test_sample_is_small_and_can_be_separated(web: TestClient) -> None:
    sample = web.get("/sample.wav")
    assert len(sample.content) <= 300_000
    assert web.post("/v1/separate", params=PLAIN, content=sample.content).status_code == 200


def test_openapi_describes_bodies_with_examples(web: TestClient) -> None:
    schema = web.get("/openapi.json").json()
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["examples"] and "instances" in body["schema"]["properties"]
    assert "multipart/form-data" in str(schema["paths"]["/v1/separate"])
    assert "JobView" in schema["components"]["schemas"]


HEALTH = ("/health", "/readyz", "/livez", "/v2/health/live", "/v2/health/ready")


def test_openapi_describes_errors_and_keys(web: TestClient, repo: Path, tmp_path: Path) -> None:
    schema = web.get("/openapi.json").json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "key"}
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and path not in HEALTH:
                    content = response["content"]["application/json"]["schema"]
                    assert content == {"$ref": "#/components/schemas/ErrorBody"}, (path, status)
            if path.startswith("/v1"):
                assert {"401", "403", "421", "422", "503"} <= set(operation["responses"])
                assert {} in operation["security"]
    assert "507" in schema["paths"]["/v1/jobs"]["post"]["responses"]
    locked = _create_app(repo, tmp_path, api_keys=("a long key",)).openapi()
    assert {} not in locked["paths"]["/v1/jobs"]["post"]["security"]


# ── predictions ──


def test_predict_returns_one_result_per_instance_in_order(web: TestClient) -> None:
    lengths = [0.7, 0.4, 1.1]
    instances = [instance(song(seconds, seed)) for seed, seconds in enumerate(lengths)]
    instances.insert(1, instance(b"this is no music"))
    response = web.post("/predict", json={"instances": instances, "parameters": {"format": "wav"}})
    assert response.status_code == 200
    digests = [hashlib.sha256(base64.b64decode(each["b64"])).hexdigest() for each in instances]
    digests[1] = "-"  # refused before it was a job
    assert response.headers["x-demucs-input-sha256"] == ", ".join(digests)
    first, bad, *rest = response.json()["predictions"]
    assert bad["error"]["code"] == "unreadable_audio"
    for seconds, stems in zip(lengths, [first, *rest]):
        assert list(stems) == STEMS
        for text in stems.values():
            assert decode_wav(base64.b64decode(text, validate=True)).shape == (
                round(seconds * RATE),
                2,
            )


def test_predict_flat_returns_mp3_stems_of_one_instance(web: TestClient, tmp_path: Path) -> None:
    (tmp_path / "mixture.wav").write_bytes(SONG)
    encoded = base64.b64encode((tmp_path / "mixture.wav").read_bytes()).decode("utf-8")
    response = web.post("/predict?flat=1", json={"instances": [{"b64": encoded}]})
    assert list(response.json()) == STEMS
    for stem, text in response.json().items():
        (tmp_path / f"{stem}.mp3").write_bytes(base64.b64decode(text))
        info = soundfile.info(tmp_path / f"{stem}.mp3")
        assert (info.format, info.samplerate, info.channels) == ("MP3", RATE, 2)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"no json", (400, "not_json")),
        (b"[" * 100_000, (400, "not_json")),
        (b"[]", (422, "invalid_request")),
        (b"{}", (422, "invalid_request")),
        (b'{"instances": []}', (422, "invalid_request")),
        (b'{"instances": [{}]}', (422, "invalid_request")),
        (b'{"instances": [{"b64": "%%%%"}]}', (422, "bad_base64")),
        (b'{"instances": [{"b64": "AAA"}]}', (422, "bad_base64")),
        (b'{"instances": [{"b64": "AA==AAAA"}]}', (422, "bad_base64")),
        (b'{"instances": [{"b64": ""}]}', (422, "empty_audio")),
        (b'{"instances": [{"b64": "AAAA"}]}', (422, "unreadable_audio")),
        (b'{"instances": [{"b64": "AAAA"}], "parameters": {"format": "midi"}}',
         (422, "invalid_parameters")),
        (b'{"instances": [{"b64": "AAAA"}], "parameters": {"shift": 1}}',
         (422, "invalid_parameters")),
        (json.dumps({"instances": [{"b64": "AAAA"}] * 5}).encode(), (413, "too_many_instances")),
        (b" " * ((1 << 21) + 1), (413, "too_large")),
    ],
)  # fmt: skip
def test_invalid_prediction_returns_status_and_code(
    web: TestClient, body: bytes, expected: tuple[int, str]
) -> None:
    assert read_error(web.post("/predict", content=body)) == expected


def test_predict_requires_post(web: TestClient) -> None:
    response = web.get("/predict")
    assert read_error(response) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


# ── files ──


def test_zip_equals_files_of_command_line(web: TestClient, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(SONG)
    words = ["--repo", repo, "-n", FAST, "-d", "cpu", "-q", "-o", tmp_path, tmp_path / "song.wav"]
    assert main([str(word) for word in words]) == 0
    response = web.post("/v1/separate", files={"file": ("../../song.wav", SONG)})
    assert response.status_code == 200
    assert 'filename="song.zip"' in response.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [*(f"{stem}.wav" for stem in STEMS), "stems.json"]
        for stem in STEMS:
            written = (tmp_path / FAST / "song" / f"{stem}.wav").read_bytes()
            assert archive.read(f"{stem}.wav") == written
        about = json.loads(archive.read("stems.json"))
    assert about["recipe"]["input_sha256"] == hashlib.sha256(SONG).hexdigest()
    assert response.headers["x-demucs-input-sha256"] == hashlib.sha256(SONG).hexdigest()
    assert "input" not in about and str(web.app.state.jobs.uploads) not in json.dumps(about)  # type: ignore[attr-defined]  # our app


@pytest.mark.parametrize("name", sorted(set(MIME_TYPES) - {"alac"}))
def test_accept_header_selects_format_of_single_stem(web: TestClient, name: str) -> None:
    response = web.post(
        "/v1/separate",
        params={"stems": "vocals"},
        content=SONG,
        headers={"Accept": MIME_TYPES[name]},
    )
    assert response.status_code == 200 and response.headers["content-type"] == MIME_TYPES[name]
    assert int(response.headers["content-length"]) == len(response.content)
    from demucs_infer.audio.reader import probe

    info = probe(response.content)
    assert info.channels == 2 and info.sample_rate >= RATE


def test_form_raw_body_and_prediction_give_equal_bytes(web: TestClient) -> None:
    fields = {"stems": "bass", "shifts": "0", "format": "flac"}
    accept = {"Accept": "audio/flac"}
    raw = web.post("/v1/separate", params=fields, content=SONG, headers=accept)
    form = web.post("/v1/separate", data=fields, files={"file": SONG}, headers=accept)
    parameters = {"stems": ["bass"], "shifts": 0, "format": "flac"}
    prediction = web.post(
        "/predict", json={"instances": [instance(SONG)], "parameters": parameters}
    )
    assert raw.content == form.content
    assert base64.b64decode(prediction.json()["predictions"][0]["bass"]) == raw.content
    assert (raw.headers["x-demucs-cached"], form.headers["x-demucs-cached"]) == ("no", "yes")


def test_two_stems_and_derived_stems(web: TestClient) -> None:
    job = web.post("/v1/jobs", params={"two_stems": "vocals", **PLAIN}, content=SONG).json()
    assert [one["name"] for one in wait_for_job(web, job)["stems"]] == ["vocals", "no_vocals"]
    parameters = {"stems": "drums", "derive": "band=bass+other", **PLAIN}
    job = web.post("/v1/jobs", params=parameters, content=SONG).json()
    assert [one["name"] for one in wait_for_job(web, job)["stems"]] == ["drums", "band"]


def test_silence_stays_silent(web: TestClient) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros((RATE, 2)), RATE, format="WAV")
    response = web.post(
        "/v1/separate", params={"stems": "vocals", "clip": "none", "bits": "32"},
        content=file.getvalue(), headers={"Accept": "audio/wav"},
    )  # fmt: skip
    assert response.status_code == 200
    # The output of the network for silence, scaled to the level of silence.
    assert abs(decode_wav(response.content)).max() < 1e-3


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        ("/v1/jobs/x", "PUT", "DELETE, GET, HEAD"),
        ("/v1/jobs", "DELETE", "GET, HEAD, POST"),
        ("/health", "POST", "GET, HEAD"),
        ("/static/app.js", "POST", "GET, HEAD"),
    ],
)
def test_allow_header_lists_every_method_of_the_path(
    web: TestClient, path: str, method: str, expected: str
) -> None:
    response = web.request(method, path)
    assert read_error(response) == (405, "method_not_allowed")
    assert response.headers["allow"] == expected


@pytest.mark.parametrize(
    ("params", "headers", "content", "expected"),
    [
        ({}, {}, b"", (422, "empty_audio")),
        ({}, {}, b"noise", (422, "unreadable_audio")),
        ({}, {}, SONG[:30], (422, "unreadable_audio")),
        ({}, {}, b"x" * ((1 << 20) + 1), (413, "too_large")),
        ({}, {}, song(20.5), (413, "too_long")),
        ({"model": "nobody"}, {}, SONG, (422, "unknown_model")),
        ({"model": "../../etc/passwd"}, {}, SONG, (422, "unknown_model")),
        ({"stems": "kazoo"}, {}, SONG, (422, "invalid_parameters")),
        ({"overlap": "1"}, {}, SONG, (422, "invalid_parameters")),
        ({"overlap": "nan"}, {}, SONG, (422, "invalid_parameters")),
        ({"bits": "12"}, {}, SONG, (422, "invalid_parameters")),
        ({"format": "mp3", "bitrate": "9"}, {}, SONG, (422, "invalid_parameters")),
        ({"format": "mp3", "bitrate": "320"}, {}, SONG, (422, "invalid_parameters")),  # of 8 kHz
        ({"shifts": "21"}, {}, SONG, (422, "too_much_work")),
        ({"start": "30"}, {}, SONG, (422, "unreadable_audio")),
        ({"nonsense": "1"}, {}, SONG, (422, "invalid_parameters")),
        ([("shifts", "0"), ("shifts", "1")], {}, SONG, (422, "invalid_parameters")),
        ([("stems", "drums"), ("stems", "kazoo")], {}, SONG, (422, "invalid_parameters")),
        ({}, {"Accept": "audio/midi"}, SONG, (406, "unknown_type")),
        ({"format": "mp3"}, {"Accept": "audio/flac"}, SONG, (406, "contradiction")),
        ({}, {"Accept": "audio/wav"}, SONG, (406, "several_stems")),
        ({}, {"Content-Type": "multipart/form-data"}, SONG, (400, "bad_form")),
        ({}, {"Content-Type": "multipart/form-data; boundary=x"}, SONG, (400, "bad_form")),
        (
            {},
            {"Content-Type": f"multipart/form-data; boundary={'x' * 257}"},
            SONG,
            (400, "bad_form"),
        ),
        ({}, {"Origin": "https://evil.example"}, SONG, (403, "foreign_origin")),
        ({}, {"Sec-Fetch-Site": "cross-site"}, SONG, (403, "foreign_origin")),
    ],
)
def test_invalid_separate_request_returns_status_and_code(
    web: TestClient, params: Any, headers: Any, content: bytes, expected: tuple[int, str]
) -> None:
    response = web.post("/v1/separate", params=params, headers=headers, content=content)
    assert read_error(response) == expected


def test_single_stem_is_required_for_audio_before_any_work(web: TestClient) -> None:
    def ended() -> list[str]:
        lines = web.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("demucs_jobs_total")]

    web.post("/v1/separate", content=SONG)  # the stems of the model are known from now on
    before = ended()
    for params in ({}, {"two_stems": "drums"}, {"stems": "drums,bass"}):
        headers = {"Accept": "audio/wav"}
        response = web.post(
            "/v1/separate", params=params, headers=headers, content=song(0.2, seed=9)
        )
        assert read_error(response) == (406, "several_stems")
    assert before and ended() == before


def test_list_parameter_may_be_repeated(web: TestClient) -> None:
    twice = [("stems", "drums"), ("stems", "vocals")]
    in_query = web.post("/v1/separate", params=twice, content=SONG)
    parts = [(name, (None, value)) for name, value in twice]
    in_form = web.post("/v1/separate", files=[*parts, ("file", ("a.wav", SONG))])
    for response in (in_query, in_form):
        names = zipfile.ZipFile(io.BytesIO(response.content)).namelist()
        assert sorted(Path(name).stem for name in names if name.endswith(".wav")) == [
            "drums", "vocals",
        ]  # fmt: skip


def test_form_needs_exactly_one_file(web: TestClient) -> None:
    assert read_error(web.post("/v1/separate", files={"shifts": (None, "0")})) == (
        422,
        "no_file",
    )
    two = [("file", ("a", SONG)), ("file", ("b", SONG))]
    assert read_error(web.post("/v1/separate", files=two)) == (422, "several_files")
    long = {"model": (None, "x" * 70_000), "file": ("a", SONG)}
    assert read_error(web.post("/v1/separate", files=long)) == (413, "too_large")


def test_unknown_length_is_limited_while_decoding(web: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "bomb.flac"  # 40 s of silence, in a few kilobytes
    soundfile.write(path, np.zeros((40 * RATE, 2)), RATE)
    data = bytearray(path.read_bytes())
    assert len(data) < 50_000
    data[21] &= 0xF0  # the 36 bits of the sample count: 0 means unknown
    data[22:26] = bytes(4)
    assert read_error(web.post("/v1/separate", content=bytes(data))) == (413, "too_long")


def test_declared_length_is_limited_before_decoding(web: TestClient) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros((8, 2)), RATE, format="FLAC")
    data = bytearray(file.getvalue())
    frames = 36_000 * RATE
    data[21] = (data[21] & 0xF0) | frames >> 32
    data[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    assert read_error(web.post("/v1/separate", content=bytes(data))) == (413, "too_long")


# ── jobs ──


def test_job_lifecycle(web: TestClient) -> None:
    response = web.post(
        "/v1/jobs", params={"model": "bag", "shifts": 2, "format": "wav"}, content=SONG,
        headers={"X-File-Name": "Bl%C3%BCten.wav"},
    )  # fmt: skip
    assert response.status_code == 202
    job = response.json()
    assert job["input_sha256"] == hashlib.sha256(SONG).hexdigest()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    received = parse_events(web.get(f"/v1/jobs/{job['id']}/events").text)
    names = [name for name, _ in received]
    assert names[0] == "Stage.Started" and names[-1] == "end"
    parts = [data for name, data in received if name == "ChunkProcessed"]
    assert [one["batch_index"] for one in parts] == list(range(1, parts[0]["total_batches"] + 1))
    fractions = [one["fraction"] for one in parts]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    view = received[-1][1]
    assert (view["status"], view["name"], view["progress"]) == ("done", "Blüten.wav", 1)
    assert [one["name"] for one in view["stems"]] == STEMS
    for one in view["stems"]:
        stem = web.get(one["url"])
        assert len(stem.content) == one["bytes"]
        part = web.get(one["url"], headers={"Range": "bytes=4-99"})
        assert (part.status_code, part.content) == (206, stem.content[4:100])
    assert web.head(view["stems"][0]["url"]).status_code == 200
    beyond = web.get(view["stems"][0]["url"], headers={"Range": "bytes=999999999-"})
    assert read_error(beyond) == (416, "bad_range")
    assert beyond.headers["content-range"] == f"bytes */{view['stems'][0]['bytes']}"
    malformed = web.get(view["stems"][0]["url"], headers={"Range": "bytes=x-y"})
    assert read_error(malformed) == (400, "bad_request")
    archive = web.get(f"/v1/jobs/{job['id']}/stems.zip")
    assert zipfile.ZipFile(io.BytesIO(archive.content)).testzip() is None
    assert read_error(web.get(f"/v1/jobs/{job['id']}/stems/kazoo")) == (404, "no_such_stem")
    assert web.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert read_error(web.get(f"/v1/jobs/{job['id']}")) == (404, "no_such_job")


def parse_events(text: str) -> list[tuple[str, Any]]:
    parsed = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        parsed.append((lines["event"], json.loads(lines["data"])))
    return parsed


def test_job_events_equal_engine_events_and_resume_after_last_event_id(
    web: TestClient, repo: Path
) -> None:
    from demucs_infer.api import Separator
    from demucs_infer.events import event_to_json

    audio = song(2.5, seed=11)
    job = web.post("/v1/jobs", params={"shifts": 0}, content=audio).json()
    wait_for_job(web, job)
    received = parse_events(web.get(f"/v1/jobs/{job['id']}/events").text)[:-1]
    expected = [
        event_to_json(item)
        for item in Separator(FAST, repo, device="cpu", shifts=0).stream(audio)
        if type(item).__name__ not in ("InferenceOutput",)
    ]
    chunks = [one for one in expected if one["event"] == "ChunkProcessed"]
    assert [data for name, data in received if name == "ChunkProcessed"] == chunks
    later = web.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": "3"})
    assert parse_events(later.text)[:-1] == received[3:]


def test_stages_of_a_job_follow_each_other_and_end_with_it(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stages: list[str] = []
    until_stopped = threading.Event()
    notify = Job.notify

    def record_stage(job: Job) -> None:
        stages.append(job.stage)
        if until_stopped.is_set():  # the worker waits at its next event until the server stops
            job.item.cancel.is_set = lambda: not job.item.stop.wait(60)  # type: ignore[method-assign]
        notify(job)

    monkeypatch.setattr(Job, "notify", record_stage)
    with client(repo, tmp_path, base_path="/music") as web:
        done = wait_for_job(web, web.post("/v1/jobs", content=song(0.3, seed=6)).json())
        assert [stage for stage, _ in groupby(stages)][-5:] == [
            "load", "read", "separate", "save", ""
        ]  # fmt: skip
        assert (done["status"], done["stage"]) == ("done", "")
        urls = [stem["url"] for stem in done["stems"]]
        assert urls == [f"/music/v1/jobs/{done['id']}/stems/{stem}" for stem in STEMS]
        assert web.get(urls[0]).status_code == 200
        until_stopped.set()
        running = web.post("/v1/jobs", content=song(0.3, seed=7)).json()
        wait_until(lambda: web.get(f"/v1/jobs/{running['id']}").json()["status"] == "running")
    assert f"job {running['id']} is suspended: the next process continues it" in caplog.text
    assert done["id"] not in caplog.text


def test_failed_job_reports_error(web: TestClient) -> None:
    job = web.post("/v1/jobs", params={"stems": "kazoo"}, content=song(0.3, seed=5)).json()
    view = wait_for_job(web, job)
    assert (view["status"], view["error"]["code"]) == ("failed", "invalid_parameters")
    assert "kazoo" in view["error"]["message"]
    assert read_error(web.get(f"/v1/jobs/{job['id']}/stems/vocals")) == (409, "failed")
    assert read_error(web.get(f"/v1/jobs/{job['id']}/stems.zip")) == (409, "failed")


@pytest.mark.parametrize("path", ["nobody", "nobody/events", "nobody/stems/bass", "..%2f..%2fx"])
def test_unknown_job_id_is_not_found(web: TestClient, path: str) -> None:
    assert web.get(f"/v1/jobs/{path}").status_code == 404


def test_running_job_is_cancelled_within_one_batch(web: TestClient) -> None:
    long = {"model": "bag", "shifts": "15", "overlap": "0.2"}
    job = web.post("/v1/jobs", params=long, content=song(6.0, seed=3)).json()
    where = f"/v1/jobs/{job['id']}"
    wait_until(lambda: web.get(where).json()["progress"] > 0)
    assert read_error(web.get(f"{where}/stems/vocals")) == (409, "not_done")
    assert web.delete(where).status_code == 202
    live = web.app.state.jobs.get_job(job["id"])  # type: ignore[attr-defined]  # our app
    seen = sum(one["event"] == "ChunkProcessed" for one in live.events)
    view = wait_for_job(web, job)
    assert view["status"] == "cancelled"
    after = sum(one["event"] == "ChunkProcessed" for one in live.events)
    # One batch may have been under way, and its event on the way to the loop.
    assert after <= seen + 2 and after < live.events[-1].get("total_batches", 1e9)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_parts_of_stem_join_to_the_whole(web: TestClient, format: str) -> None:
    parameters = {**PLAIN, "format": format}
    job = web.post("/v1/jobs", params=parameters, content=song(1.3, 61)).json()
    view = wait_for_job(web, job)
    preview = view["preview"]
    assert preview["stems"] == STEMS and preview["sample_rate"] == RATE
    assert preview["available_seconds"] == preview["duration_seconds"] == 1.3
    whole = soundfile.read(io.BytesIO(web.get(view["stems"][1]["url"]).content), always_2d=True)[0]
    path = f"/v1/jobs/{job['id']}/stems/bass"
    parts = [
        decode_wav(web.get(f"{path}/part", params={"start": start, "duration": 0.5}).content)
        for start in (0, 0.5, 1)
    ]
    assert sum(map(len, parts)) == len(whole) == 1.3 * RATE
    assert abs(np.concatenate(parts) - whole.clip(-1, 1)).max() < 1e-3
    waveform = web.get(f"{path}/waveform").json()
    assert max(waveform["peaks"]) == pytest.approx(abs(whole).max(), abs=1e-3)
    assert waveform["duration_seconds"] == 1.3 and 0 not in waveform["peaks"]
    zoomed = web.get(f"{path}/waveform", params={"start": 0.3, "duration": 0.6}).json()["peaks"]
    expected = abs(whole[round(0.3 * RATE) : round(0.9 * RATE)]).max(1).reshape(1200, -1).max(1)
    assert np.abs(np.array(zoomed) - expected).max() < 1e-3
    late = web.get(f"{path}/waveform", params={"start": 1.2, "duration": 600}).json()["peaks"]
    assert late[0] > 0 and not any(late[1:])
    beyond = web.get(f"{path}/part", params={"start": 99})
    assert beyond.status_code == 200 and len(decode_wav(beyond.content)) == 0
    for bad in ({"start": "-1"}, {"start": "nan"}, {"duration": 0}, {"duration": 61}):
        assert read_error(web.get(f"{path}/part", params=bad)) == (422, "invalid_request")
    assert web.get(f"{path}/waveform", params={"duration": 601}).status_code == 422
    assert read_error(web.get(f"{path.replace('bass', 'kazoo')}/part")) == (404, "no_such_stem")


def test_stems_can_be_heard_while_they_are_made(web: TestClient) -> None:
    long = {"model": "bag", "shifts": "15", "overlap": "0.2", "bits": "32", "clip": "none"}
    job = web.post("/v1/jobs", params=long, content=song(8.0, seed=62)).json()
    where = f"/v1/jobs/{job['id']}"
    wait_until(lambda: (web.get(where).json()["preview"] or {}).get("available_seconds", 0) > 1)
    early = web.get(f"{where}/stems/bass/part", params={"duration": 1})
    waveform = web.get(f"{where}/stems/bass/waveform").json()
    assert web.get(where).json()["status"] == "running"
    assert 1 < waveform["available_seconds"] < waveform["duration_seconds"] == 8
    assert waveform["peaks"][0] > 0 and waveform["peaks"][-1] == 0
    wait_for_job(web, job)
    late = web.get(f"{where}/stems/bass/part", params={"duration": 1})
    assert early.content == late.content and len(decode_wav(early.content)) == RATE


def test_client_lists_its_own_jobs(web: TestClient) -> None:
    mine, other = {"X-Client-Id": "a" * 20}, {"X-Client-Id": "b" * 20}
    ids = [
        web.post("/v1/jobs", params=PLAIN, content=song(0.2, seed), headers=mine).json()["id"]
        for seed in (71, 72)
    ]
    listed = web.get("/v1/jobs", headers=mine).json()["jobs"]
    assert [job["id"] for job in listed] == ids[::-1]
    assert len(web.get("/v1/jobs?limit=1", headers=mine).json()["jobs"]) == 1
    assert web.get("/v1/jobs", headers=other).json() == {"jobs": []}
    assert read_error(web.get("/v1/jobs")) == (400, "no_client")
    assert read_error(web.get("/v1/jobs", headers={"X-Client-Id": "short"})) == (400, "no_client")


# ── cache ──


def test_repeated_request_is_answered_from_cache(web: TestClient) -> None:
    audio, runs = song(0.6, seed=21), lambda: web.app.state.jobs.counts["cached"]  # type: ignore[attr-defined]  # our app
    first = web.post("/v1/separate", params=PLAIN, content=audio)
    before = runs()
    second = web.post("/v1/separate", params=PLAIN, files={"file": ("other name.wav", audio)})
    assert runs() == before + 1 and second.content == first.content
    other = web.post("/v1/separate", params={"shifts": "2"}, content=audio)
    assert runs() == before + 1 and other.headers["x-demucs-cached"] == "no"
    again = web.post("/v1/separate", params={**PLAIN, "no_cache": "true"}, content=audio)
    assert runs() == before + 1 and again.headers["x-demucs-cached"] == "no"
    read = zipfile.ZipFile
    assert read(io.BytesIO(again.content)).read("bass.wav") == read(io.BytesIO(first.content)).read(
        "bass.wav"
    )


@pytest.mark.parametrize("damage", ["missing stem", "short stem", "no manifest", "bad manifest"])
def test_damaged_cache_entry_is_recomputed(web: TestClient, data: Path, damage: str) -> None:
    audio = song(0.5, seed=31)
    first = web.post("/v1/separate", params=PLAIN, content=audio)
    entry = max((data / "results").iterdir(), key=lambda one: one.stat().st_mtime_ns)
    if damage == "missing stem":
        (entry / "vocals.wav").unlink()
    elif damage == "short stem":
        (entry / "vocals.wav").write_bytes(b"RIFF")
    elif damage == "no manifest":
        (entry / "stems.json").unlink()
    else:
        (entry / "stems.json").write_text("{")
    again = web.post("/v1/separate", params=PLAIN, content=audio)
    assert again.headers["x-demucs-cached"] == "no"
    with (
        zipfile.ZipFile(io.BytesIO(first.content)) as one,
        zipfile.ZipFile(io.BytesIO(again.content)) as two,
    ):
        assert one.read("vocals.wav") == two.read("vocals.wav")


def test_results_and_jobs_expire(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, keep_seconds=1.5, max_store_bytes=120_000) as web:
        jobs = [
            wait_for_job(web, web.post("/v1/jobs", params=PLAIN, content=song(0.8, seed)).json())
            for seed in range(4)
        ]
        assert all(job["status"] == "done" for job in jobs)
        wait_until(lambda: web.get(f"/v1/jobs/{jobs[0]['id']}").status_code == 404)
        wait_until(lambda: not list((tmp_path / "results").iterdir()))


def test_evicted_stems_return_410(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, max_store_bytes=1) as web:
        job = wait_for_job(web, web.post("/v1/jobs", params=PLAIN, content=SONG).json())
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        assert web.portal is not None
        web.portal.call(jobs.clean_up)
        assert read_error(web.get(f"/v1/jobs/{job['id']}/stems/vocals")) == (410, "expired")


def test_recovered_job_without_upload_fails(repo: Path, tmp_path: Path) -> None:
    record = JobRecord(
        id="1" * 32, status="running", created=0.0, name="a.wav", sha256="", size=1,
        upload="missing", request={},
    )  # fmt: skip
    store = JobStore(tmp_path / "jobs.sqlite")
    store.put(record)
    store.close()
    with client(repo, tmp_path) as web:
        job = web.get(f"/v1/jobs/{record.id}").json()
        assert (job["status"], job["error"]["code"]) == ("failed", "failed")


# ── access and limits ──


def test_api_key_is_required(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, api_keys=("correct horse", "battery staple")) as web:
        assert web.get("/health").status_code == web.get("/").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert read_error(web.get(path)) == (401, "no_key")
        for headers in ({}, {"X-API-Key": "correct"}, {"Authorization": "Bearer wrong"},
                        {"Authorization": "Basic correct horse"}):  # fmt: skip
            response = web.post("/predict", json={"instances": [instance(SONG)]}, headers=headers)
            assert read_error(response) == (401, "no_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert web.get("/v1/models", headers={"X-API-Key": "battery staple"}).status_code == 200
        bearer = {"Authorization": "Bearer correct horse"}
        assert web.get("/metrics", headers=bearer).status_code == 200


def test_api_key_does_not_see_jobs_of_another(repo: Path, tmp_path: Path) -> None:
    keys = ("correct horse", "battery staple")
    mine, other = ({"X-API-Key": key, "X-Client-Id": "c" * 20} for key in keys)
    with client(repo, tmp_path, api_keys=keys) as web:
        job = web.post("/v1/jobs", params=PLAIN, content=SONG, headers=mine).json()["id"]
        wait_until(lambda: web.get(f"/v1/jobs/{job}", headers=mine).json()["status"] == "done")
        for path in ("", "/events", "/stems.zip", "/stems/bass", "/stems/bass/part",
                     "/stems/bass/waveform"):  # fmt: skip
            assert web.get(f"/v1/jobs/{job}{path}", headers=mine).status_code == 200
            refused = web.get(f"/v1/jobs/{job}{path}", headers=other)
            assert read_error(refused) == (404, "no_such_job")
        refused = web.delete(f"/v1/jobs/{job}", headers=other)
        assert read_error(refused) == (404, "no_such_job")
        assert web.get("/v1/jobs", headers=other).json() == {"jobs": []}
        assert len(web.get("/v1/jobs", headers=mine).json()["jobs"]) == 1


def test_cors_allows_listed_origins_only(repo: Path, web: TestClient, tmp_path: Path) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in web.options("/v1/jobs", headers=ask).headers
    with client(repo, tmp_path, cors_origins=("https://a.example",)) as open_:
        allowed = open_.options("/v1/jobs", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other_site = open_.options("/v1/jobs", headers={**ask, "Origin": "https://b.example"})
        assert other_site.status_code == 400
        cross = {"Origin": "https://a.example", "Sec-Fetch-Site": "cross-site"}
        assert open_.post("/v1/separate", content=SONG, headers=cross).status_code == 200


def test_base_path_behind_proxy(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, base_path="/music/stems", api_keys=("a long key",)) as web:
        moved = web.get("/music/stems", follow_redirects=False)
        assert moved.headers["location"] == "/music/stems/"
        for base in ("/music/stems", ""):  # whether the proxy takes the path away or not
            assert web.get(f"{base}/").status_code == 200
            assert web.get(f"{base}/static/app.js").status_code == 200
            assert read_error(web.get(f"{base}/v1/models")) == (401, "no_key")


def test_full_disk_returns_507_and_server_recovers(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with client(repo, tmp_path) as web:

        def pages(most: int) -> None:
            base = web.app.state.jobs._store._database  # type: ignore[attr-defined]
            assert web.portal is not None
            web.portal.call(lambda: base.execute(f"pragma max_page_count = {most}"))

        pages(1)  # the current size: the next rows fill the last page
        responses = [
            web.post("/v1/jobs", content=song(0.2, seed), headers={"x-file-name": "x" * 99})
            for seed in range(40)
        ]
        assert {response.status_code for response in responses} == {202, 507}
        assert (
            read_error(responses[-1]) == (507, "no_room") and "Retry-After" in responses[-1].headers
        )
        pages(1 << 30)
        for response in responses:
            if response.status_code == 202:
                assert wait_for_job(web, response.json())["status"] == "done"
        for place in (
            "demucs_infer.server.uploads.UploadWriter.write",
            "demucs_infer.audio.spool.Spool.append",
        ):
            with monkeypatch.context() as patch:
                patch.setattr(place, full)
                assert read_error(web.post("/v1/separate", content=SONG)) == (507, "no_room")
        assert web.post("/v1/separate", content=SONG).status_code == 200
        assert web.get("/metrics").text.count("jobs_running 0") == 1
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("demucs_infer.server.uploads.UploadWriter.write", OSError(errno.EIO, "I/O error")),
        ("demucs_infer.server.store.JobStore.get", sqlite3.OperationalError("disk I/O error")),
    ],
    ids=["upload", "database"],
)
def test_failing_disk_returns_500_in_one_line(
    place: str,
    error: Exception,
    web: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        reply = web.get("/v1/jobs/x") if "store" in place else web.post("/v1/jobs", content=SONG)
        assert read_error(reply) == (500, "failed")
    assert str(error) in caplog.text and "Traceback" not in caplog.text
    assert web.post("/v1/separate", content=SONG).status_code == 200


def test_stem_that_cannot_be_opened_is_cut_off_in_one_line(
    web: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    job = wait_for_job(web, web.post("/v1/jobs", content=SONG).json())
    with monkeypatch.context() as patch:
        patch.setattr("anyio.open_file", fail)
        assert web.get(f"/v1/jobs/{job['id']}/stems/vocals").content == b""
    assert "a response is cut off: " in caplog.text and "Traceback" not in caplog.text
    assert web.get(f"/v1/jobs/{job['id']}/stems/vocals").content


@pytest.mark.parametrize(
    ("fault", "error", "code"),
    [
        ("input", "cannot be read: Invalid data", "unreadable_audio"),
        ("input", f"cannot be read: {os.strerror(errno.EMFILE).lower()}", "failed"),
        ("other", "cannot write the file: Permission denied; choose a writable folder", "failed"),
        ("other", "the model has one stem", "cannot_separate"),
        ("disk", "cannot write the file: No space left on device", "no_room"),
    ],
    ids=["damaged", "descriptors", "not writable", "impossible", "full"],
)
def test_clients_are_not_blamed_for_the_disk(fault: Fault, error: str, code: str) -> None:
    item = WorkItem(
        source=Path("x"), name="x", output=OutputPaths(folder=Path(), track="x", extension="wav"),
        model=ModelSpec(name="x"), request=Request(), weights=(), client="", max_seconds=1,
        max_duration_seconds=1,
    )  # fmt: skip
    result = TrackResult(track="x", status="failed", model="x", fault=fault, error=error)
    with pytest.raises(ApiError) as caught:
        check_result(result, item)
    assert caught.value.code == code


def test_probe_without_descriptors_is_no_fault_of_the_client(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AudioReadError("cannot read track: too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("demucs_infer.server.worker.probe", fail)
        assert read_error(web.post("/v1/jobs", content=SONG)) == (500, "failed")


def test_upload_that_cannot_be_deleted_delays_no_job(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "uploads":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        remove(path, missing_ok)

    with client(repo, tmp_path, max_queue=1) as web:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail)
            for seed in range(3):  # one waits for the other's place
                response = web.post("/v1/jobs", content=song(0.2, seed))
                assert wait_for_job(web, response.json())["status"] == "done"
        assert len(list((tmp_path / "uploads").iterdir())) == 3
    with client(repo, tmp_path):
        assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", ""]
)
def test_other_host_names_are_refused(web: TestClient, host: str) -> None:
    """A page can make its own name resolve to this server (DNS rebinding)."""
    for path in ("/", "/v1/models", "/static/app.js", "/docs"):
        assert web.get(path, headers={"Host": host}).status_code == 421
    refused = web.post("/v1/separate", content=SONG, headers={"Host": host})
    assert read_error(refused) == (421, "unknown_host")
    assert web.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "host", "is_allowed"),
    [
        ({}, "localhost:8080", True),
        ({}, "LOCALHOST.", True),
        ({}, "127.0.0.1:1", True),
        ({}, "[::1]:8080", True),
        ({}, "192.168.1.20", True),
        ({}, "evil.example", False),
        ({"host": "my.host"}, "my.host:8080", True),
        ({"allowed_hosts": ("stems.example",)}, "stems.example", True),
        ({"allowed_hosts": ("stems.example",)}, "127.0.0.1", False),
        ({"allowed_hosts": ("*",)}, "evil.example", True),
        ({"api_keys": ("a long key",)}, "stems.example", True),
        ({"public": True}, "stems.example", True),
        ({"public": True, "allowed_hosts": ("a",)}, "stems.example", False),
    ],
)
def test_allowed_hosts(settings: dict[str, Any], host: str, is_allowed: bool) -> None:
    made = ServerSettings(**settings)
    hosts = AllowedHosts.make(made.allowed_host_names, made.host)
    assert hosts.contains(host) is is_allowed


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://testserver:3000", "Sec-Fetch-Site": "same-site"},
        {"Origin": "http://testserver:3000"},
        {"Origin": "null"},
    ],
    ids=["same site", "no fetch metadata", "sandboxed page"],
)
def test_page_of_other_port_cannot_send_requests(web: TestClient, headers: dict[str, str]) -> None:
    refused = web.post("/v1/separate", content=SONG, headers=headers)
    assert read_error(refused) == (403, "foreign_origin")


def test_refusal_can_be_read_by_pages_of_allowed_sites(repo: Path, tmp_path: Path) -> None:
    settings = {"cors_origins": ("https://a.example",), "api_keys": ("a long key",)}
    with client(repo, tmp_path, **settings) as web:
        refused = web.get("/v1/models", headers={"Origin": "https://a.example"})
        assert read_error(refused) == (401, "no_key")
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


def test_every_response_has_request_id(web: TestClient) -> None:
    first, second = (web.get(path).headers["x-request-id"] for path in ("/livez", "/nowhere"))
    assert first != second
    sent = {"X-Request-Id": "trace-0.1:a"}
    assert web.get("/livez", headers=sent).headers["x-request-id"] == "trace-0.1:a"
    for bad in ("a b", "x" * 65, "<script>"):
        assert web.get("/livez", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_requests_above_limit_are_refused_but_health_is_answered(
    repo: Path, tmp_path: Path
) -> None:
    with client(repo, tmp_path) as web:
        job = web.post("/v1/jobs", params={"model": "bag", "shifts": "9"}, content=song(9.0))
        layer = web.app.middleware_stack  # type: ignore[attr-defined]  # our app
        while type(layer).__name__ != "AccessMiddleware":
            layer = getattr(layer, "_app", None) or layer.app
        layer._requests = layer._max_requests
        refused = web.get("/v1/models")
        assert read_error(refused) == (503, "busy") and "retry-after" in refused.headers
        assert web.get("/livez").status_code == web.get("/readyz").status_code == 200
        layer._requests = 0
        web.delete(f"/v1/jobs/{job.json()['id']}")


def test_full_queue_returns_retry_after(repo: Path, tmp_path: Path) -> None:
    long = {"model": "bag", "shifts": "15"}
    keys = ("the first key", "the second key", "the third key")
    headers = {number: {"X-API-Key": key} for number, key in enumerate(keys, 1)}
    limits = {"max_queue": 3, "max_per_client": 2, "max_tracks": 1}
    with client(repo, tmp_path, **limits, api_keys=keys) as web:
        jobs = [
            web.post("/v1/jobs", params=long, content=song(5.0, seed), headers=headers[key])
            for seed, key in enumerate([1, 1, 2])
        ]
        assert [job.status_code for job in jobs] == [202] * 3
        assert jobs[2].json()["position"] is not None
        for key in (1, 3):
            full = web.post("/v1/separate", content=SONG, headers=headers[key])
            assert read_error(full) == (503, "busy") and int(full.headers["retry-after"]) >= 1
        web.delete(f"/v1/jobs/{jobs[2].json()['id']}", headers=headers[2])
        mine = web.post("/v1/jobs", content=SONG, headers=headers[1])
        assert read_error(mine) == (429, "too_many") and "retry-after" in mine.headers
        for job in jobs:
            web.delete(f"/v1/jobs/{job.json()['id']}", headers=headers[1])


def test_job_time_limit(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, job_seconds=1.0) as web:
        slow = {"model": "bag", "shifts": "15"}
        began = time.monotonic()
        response = web.post("/v1/separate", params=slow, content=song(15.0, 7))
        assert read_error(response) == (504, "out_of_time")
        assert time.monotonic() - began < 60
        assert web.post("/v1/separate", params=PLAIN, content=song(0.2)).status_code == 200


def test_unloadable_model_returns_503(repo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "folder of models"
    bad.mkdir()
    (bad / "aaaa1111.th").write_bytes(b"no checkpoint")
    with TestClient(app := _create_app(bad, tmp_path / "data", models=())) as web:
        wait_until(lambda: app.state.jobs.load_error)
        health = web.get("/health")
        assert health.status_code == 503
        assert_names_reason(health.json()["message"], bad)
        assert web.get("/livez").status_code == 200
        response = web.post("/v1/separate", content=SONG)
        assert read_error(response) == (503, "model_unavailable")
        assert "retry-after" in response.headers
        assert_names_reason(response.json()["error"]["message"], bad)


def assert_names_reason(message: str, folder: Path) -> None:
    """Check that a model's load error is explained, without the folder of the model."""
    assert message.startswith("the model 'aaaa1111' cannot be loaded: aaaa1111.th is not a ")
    assert folder.name not in message and str(folder.parent) not in message


def _create_app(repo: Path, data: Path, **more: Any) -> Any:
    from demucs_infer.server import create_app
    from tests.helpers.server_process import make_settings

    return create_app(make_settings(repo, data, **more))


def test_configured_vertex_routes(repo: Path, tmp_path: Path) -> None:
    routes = {"predict_route": "/v1/endpoints/7:predict", "health_route": "/ping"}
    with client(repo, tmp_path, **routes) as web:
        assert web.get("/ping").status_code == 200
        response = web.post("/v1/endpoints/7:predict", json={"instances": [instance(SONG)]})
        assert len(response.json()["predictions"]) == 1
        assert web.post("/predict").status_code == 404


@pytest.mark.parametrize(
    ("name", "route"),
    [("predict_route", route) for route in ("/v1/jobs", "/v1/separate")]
    + [("health_route", route) for route in ("/", "/livez", "/metrics", "/v1/jobs/7", "/docs")]
    + [("health_route", route) for route in ("/openapi.json", "/static/app.js", "/v1/models")],
)
def test_configured_route_must_not_replace_another(
    repo: Path, tmp_path: Path, name: str, route: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name} = '{route}' is already"):
        _create_app(repo, tmp_path, **{name: route})


@pytest.mark.parametrize(
    ("name", "route"), [("predict_route", "/v1/models"), ("health_route", "/readyz")]
)
def test_configured_route_may_share_path_with_other_method(
    repo: Path, tmp_path: Path, name: str, route: str
) -> None:
    assert _create_app(repo, tmp_path, **{name: route})


def test_models_are_loaded_once_and_least_recently_used_is_evicted(
    repo: Path, tmp_path: Path
) -> None:
    with client(repo, tmp_path, model_memory_bytes=1) as web:
        jobs = web.app.state.jobs  # type: ignore[attr-defined]  # our app
        for seed in range(3):
            web.post("/v1/separate", params=PLAIN, content=song(0.2, seed))
        assert jobs.counts["loaded"] == 1
        for seed in (5, 6):
            web.post("/v1/separate", params={"model": "bag", **PLAIN}, content=song(0.2, seed))
        assert jobs.counts["loaded"] == 2
        web.post("/v1/separate", params=PLAIN, content=song(0.2, 9))
        assert jobs.counts["loaded"] == 3


def test_models_are_loaded_and_unloaded_on_request(repo: Path, tmp_path: Path) -> None:
    def states(web: TestClient) -> dict[str, str]:
        return {one["name"]: one["state"] for one in web.get("/v1/models").json()["models"]}

    with client(repo, tmp_path) as web:
        assert states(web) == {FAST: "loaded", "bag": "unloaded"}
        loaded = web.post("/v1/models/bag/load")
        assert loaded.status_code == 200 and loaded.json()["state"] == "loaded"
        assert loaded.json()["stems"] == STEMS
        assert web.post(f"/v1/models/{FAST}/unload").json()["state"] == "unloaded"
        assert web.get(f"/v1/models/{FAST}").json()["state"] == "unloaded"
        assert web.post(f"/v1/models/{FAST}/unload").status_code == 200
        assert states(web) == {FAST: "unloaded", "bag": "loaded"}
        assert web.post("/v1/separate", params=PLAIN, content=song(0.2)).status_code == 200
        assert states(web) == {FAST: "loaded", "bag": "loaded"}
        for path in ("nobody", "nobody/load"):
            method = "POST" if path.endswith("load") else "GET"
            assert read_error(web.request(method, f"/v1/models/{path}")) == (404, "no_such_model")


def test_idle_model_is_unloaded(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, idle_unload=0.5) as web:
        wait_until(lambda: web.get(f"/v1/models/{FAST}").json()["state"] == "unloaded", 10)
        assert web.get("/readyz").status_code == 200
        assert web.post("/v1/separate", params=PLAIN, content=song(0.2)).status_code == 200


def test_model_that_cannot_be_loaded_is_reported(repo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "models"
    bad.mkdir()
    (bad / "aaaa1111.th").write_bytes(b"no checkpoint")
    with TestClient(_create_app(bad, tmp_path / "data", models=(), warmup=False)) as web:
        refused = web.post("/v1/models/aaaa1111/load")
        assert read_error(refused) == (503, "model_unavailable")


def test_separations_have_a_second_name(web: TestClient) -> None:
    form = {"model": FAST, **PLAIN}
    first = web.post("/v1/audio/separations", data=form, files={"file": ("a.wav", SONG)})
    second = web.post("/v1/separate", data=form, files={"file": ("a.wav", SONG)})
    assert first.status_code == 200 and first.content == second.content


def damage_flac(audio: bytes) -> bytes:
    """Return a flac file whose header alone is well."""
    file = io.BytesIO()
    soundfile.write(file, decode_wav(audio), RATE, format="FLAC")
    data = bytearray(file.getvalue())
    data[200:] = bytes(len(data) - 200)
    return bytes(data)


def test_bad_tracks_fail_beside_good_ones_that_are_as_if_alone(repo: Path, tmp_path: Path) -> None:
    good = {f"good {seed}": song(0.5 + 0.4 * seed, seed) for seed in range(4)}
    bad = {"text": b"no music", "damaged": damage_flac(SONG), "empty": b"", "too late": SONG}
    errors = dict.fromkeys(bad, "unreadable_audio") | {"empty": "empty_audio"}
    with client(repo, tmp_path) as web:

        def separate(name: str) -> Any:
            start = "100" if name == "too late" else "0"
            parameters = {"no_cache": "1", "start": start}
            return web.post("/v1/separate", params=parameters, content=(good | bad)[name])

        def read_stems(response: Any) -> dict[str, bytes]:
            assert response.status_code == 200, response.text
            with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
                names = [name for name in archive.namelist() if name != "stems.json"]
                return {name: archive.read(name) for name in names}

        alone = {name: read_stems(separate(name)) for name in good}
        names = [name for pair in zip(good, bad) for name in pair]
        with ThreadPoolExecutor(len(names)) as clients:
            responses = dict(zip(names, clients.map(separate, names)))
        for name in good:
            assert read_stems(responses[name]) == alone[name]
        for name, code in errors.items():
            assert read_error(responses[name]) == (422, code)


def test_concurrent_requests_load_model_once(repo: Path, tmp_path: Path) -> None:
    with client(repo, tmp_path, warmup=False) as web:
        responses: list[int] = []

        def one(seed: int) -> None:
            sent = web.post("/v1/separate", params=PLAIN, content=song(0.3, seed))
            responses.append(sent.status_code)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert responses == [200] * 4
        assert web.app.state.jobs.counts["loaded"] == 1  # type: ignore[attr-defined]  # our app
