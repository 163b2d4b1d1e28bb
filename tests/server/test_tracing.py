"""Traces of requests and jobs, messages as JSON, and what load balancers see at shutdown."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from demucs_infer.server import create_app
from demucs_infer.server.logs import REQUEST_ID, make_formatter
from tests.helpers.cli_process import ROOT, environment
from tests.helpers.oracles import require_module
from tests.helpers.server_process import FAST, make_settings, run_server, song, wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what keeps all spans of the server in memory."""
    require_module("opentelemetry.exporter.otlp.proto.http")
    module = require_module("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = module.InMemorySpanExporter()
    monkeypatch.setattr(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter.OTLPSpanExporter", lambda: exporter
    )
    return exporter


def test_request_and_steps_of_its_job_are_spans_of_the_callers_trace(
    repo: Path, tmp_path: Path, exporter: Any
) -> None:
    with TestClient(create_app(make_settings(repo, tmp_path, traces=True))) as web:
        job = web.post("/v1/jobs", content=song(2.0), headers=PARENT).json()
        wait_until(lambda: web.get(f"/v1/jobs/{job['id']}").json()["status"] == "done")
        web.get("/livez")
        assert web.post("/v1/jobs", content=b"no audio", headers=PARENT).status_code == 422
    spans = exporter.get_finished_spans()
    trace = [span for span in spans if f"{span.context.trace_id:032x}" == TRACE]
    requests = [span for span in trace if span.name == "POST /v1/jobs"]
    assert [span.attributes["http.response.status_code"] for span in requests] == [202, 422]
    assert {f"{span.parent.span_id:016x}" for span in requests} == {"b7ad6b7169203331"}
    steps = {span.name: span for span in trace if span not in requests}
    assert set(steps) == {"queue", "load", "separate", "write"}
    assert {span.parent.span_id for span in steps.values()} == {requests[0].context.span_id}
    assert steps["separate"].attributes["demucs.model"] == FAST
    times = [steps[name].end_time for name in ("queue", "load", "separate", "write")]
    assert times == sorted(times)
    (health,) = (span for span in spans if span.name == "GET /livez")
    assert health not in trace and health.parent is None
    assert all(job["id"] not in span.name for span in spans)


def test_failed_step_has_the_error_code(repo: Path, tmp_path: Path, exporter: Any) -> None:
    settings = make_settings(repo, tmp_path, traces=True, job_seconds=1)
    with TestClient(create_app(settings), raise_server_exceptions=False) as web:
        response = web.post("/v1/separate?model=bag&shifts=9", content=song(60.0))
        assert response.status_code == 504
    failed = {
        s.name: s.status.description for s in exporter.get_finished_spans() if not s.status.is_ok
    }
    assert failed == {"separate": "out_of_time", "POST /v1/separate": None}


@pytest.mark.slow
def test_nothing_is_imported_unless_traces_are_on(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from demucs_infer.server import ServerSettings, create_app; "
        f"create_app(ServerSettings(data_dir=Path({str(tmp_path)!r}), models=('htdemucs',))); "
        "assert not {'opentelemetry.sdk', 'redis'} & set(sys.modules)"  # FastAPI imports the API
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=True)


def test_messages_as_json_have_request_and_traceback() -> None:
    formatter = make_formatter("json")
    try:
        raise ValueError("of\ntwo lines")
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("demucs_infer.x", logging.ERROR, "", 0, "%s is bad", ("é",), error)
    token = REQUEST_ID.set("abc")
    try:
        text = formatter.format(record)
    finally:
        REQUEST_ID.reset(token)
    assert "\n" not in text
    line = json.loads(text)
    assert line["time"].endswith("Z") and "ValueError: of\ntwo lines" in line.pop("exception")
    del line["time"]
    assert line == {
        "level": "error", "logger": "demucs_infer.x", "message": "é is bad", "request": "abc",
    }  # fmt: skip
    assert make_formatter("text").format(record).startswith("ERROR: é is bad\nTraceback")


@pytest.mark.slow
def test_server_drains_until_a_second_signal(repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", FAST, "--data-dir", tmp_path, "--log-format", "json"]
    with run_server(*words, "--drain-seconds", "600") as server:
        server.process.terminate()
        wait_until(lambda: not server.is_ready())
        status, body = server.call("GET", "/readyz")
        assert (status, json.loads(body)["status"]) == (503, "draining")
        assert server.call("GET", "/livez")[0] == 200
        assert server.call("POST", "/v1/separate", song(0.5))[0] == 200
        server.process.terminate()
        _, errors = server.process.communicate(timeout=60)
        assert all(json.loads(line)["level"] for line in errors.splitlines())
        assert b"http://127.0.0.1" in errors


@pytest.mark.slow
def test_server_shuts_down_when_the_drain_is_over(repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", FAST, "--data-dir", tmp_path]
    with run_server(*words, "--drain-seconds", "1") as server:
        assert server.stop() in (0, -signal.SIGTERM)
