"""A server process under load: concurrent clients, leaks, restarts and start-up errors."""

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from demucs_infer.api import Separator
from demucs_infer.errors import ConfigError
from demucs_infer.server.run import serve
from tests.helpers.cli_process import ROOT, environment
from tests.helpers.oracles import require_tool
from tests.helpers.server_process import (
    FAST,
    RATE,
    Server,
    client,
    free_port,
    make_settings,
    run_server,
    song,
    wait_until,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def server(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    temporary = tmp_path_factory.mktemp("tmp")
    words = ["--repo", repo, "--models", f"{FAST},bag", "--data-dir", data]
    with run_server(*words, "--max-bytes", "2000000", TMPDIR=str(temporary)) as running:
        yield running
        assert running.stop() in (0, -signal.SIGTERM)
        assert list(temporary.iterdir()) == list((data / "uploads").iterdir()) == []


def stems_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-4:] == ".wav"}


@pytest.mark.usefixtures("one_thread")
def test_concurrent_clients_get_their_own_stems(server: Server, repo: Path, tmp_path: Path) -> None:
    songs = [song(0.3 + 0.05 * (seed % 7), seed) for seed in range(32)]
    slow = json.loads(
        server.call("POST", "/v1/jobs?model=bag&shifts=12", song(8.0, 99))[1]
    )  # keeps the worker busy while health is requested
    waits: list[float] = []

    def one(audio: bytes) -> tuple[int, bytes]:
        return server.call("POST", "/v1/separate", audio)

    with ThreadPoolExecutor(32) as pool:
        responses = pool.map(one, songs)
        for _ in range(20):
            began = time.perf_counter()
            assert server.call("GET", "/health")[0] == 200
            waits.append(time.perf_counter() - began)
        server.call("DELETE", f"/v1/jobs/{slow['id']}")
        responses = list(responses)
    print(f"health during a job: at most {1000 * max(waits):.0f} ms")
    with Separator(FAST, repo, device="cpu") as separator:
        for number, (audio, (status, body)) in enumerate(zip(songs, responses, strict=True)):
            assert status == 200
            expected = separator.run(audio).save(tmp_path / str(number))
            for stem, path in expected.items():
                assert stems_of(body)[f"{stem}.wav"] == path.read_bytes()


def test_two_hundred_requests_leak_neither_memory_nor_files(server: Server, data: Path) -> None:
    status = Path(f"/proc/{server.process.pid}")

    def memory() -> int:
        return int((status / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files() -> int:
        return len(list((status / "fd").iterdir()))

    body = json.dumps({"instances": [{"b64": base64.b64encode(song(0.2)).decode()}]}).encode()
    kinds: list[Any] = [
        lambda seed: server.call("POST", "/v1/separate?shifts=0", song(0.2, seed)),
        lambda seed: server.call("POST", "/predict", body),
        lambda seed: server.call("POST", "/predict", b"no json"),
        lambda seed: server.call("POST", "/v1/separate", b"no music"),
        lambda seed: server.call("POST", "/v1/separate", bytes(2_100_000)),
        lambda seed: server.call("GET", "/v1/jobs/nobody"),
        lambda seed: hang_up(server, b"half of what was promised", 5000),
        lambda seed: hang_up(server, song(1.5, seed)),  # while it is separated
    ]
    rounds: list[tuple[int, int]] = []
    server.call("POST", "/v1/separate?model=bag", song(1.5))  # so that every network has run once
    for seed in range(200):
        response = kinds[seed % len(kinds)](1000 + seed)
        assert response is None or response[0] in (200, 400, 404, 413, 422), response
        if seed in (79, 199):
            wait_until(lambda: idle(server))
            rounds.append((memory(), files()))
    (memory_before, files_before), (memory_after, files_after) = rounds
    print(f"memory {memory_before / 1e6:.0f} -> {memory_after / 1e6:.0f} MB, files {files_after}")
    # A connection that the client has not closed yet may be counted.
    assert abs(files_after - files_before) <= 2
    # 120 requests that leaked what they were about, 30 kB, would make 4 MB; torch's own caches
    # for lengths that are new stay below 20.
    assert memory_after - memory_before < 25e6
    assert list((data / "uploads").iterdir()) == []


def hang_up(server: Server, body: bytes, length: int | None = None) -> None:
    """Send a request and disconnect before the response."""
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        head = f"POST /v1/separate?model=bag&shifts=9 HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
        line.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.05)


def idle(server: Server) -> bool:
    text = server.call("GET", "/metrics")[1].decode()
    return "demucs_jobs_waiting 0.0" in text and "demucs_jobs_running 0.0" in text


def test_long_track_is_streamed(server: Server, data: Path) -> None:
    job = json.loads(server.call("POST", "/v1/jobs?shifts=0&bits=32", song(58.0, 5))[1])
    wait_until(lambda: server.json("GET", f"/v1/jobs/{job['id']}")["status"] == "done")
    status, archive = server.call("GET", f"/v1/jobs/{job['id']}/stems.zip")
    assert status == 200
    assert {
        name: len(wav) > 58 * RATE * 8 for name, wav in stems_of(archive).items()
    } == dict.fromkeys(["drums.wav", "bass.wav", "other.wav", "vocals.wav"], True)


@pytest.mark.usefixtures("one_thread")
def test_jobs_survive_sigkill(repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", f"{FAST},bag", "--data-dir", tmp_path]
    rng = random.Random(4)
    first = Server(*words)
    wait_until(first.is_ready)
    done = first.json("POST", "/v1/jobs?shifts=0", song(0.4, 1))["id"]
    wait_until(lambda: first.json("GET", f"/v1/jobs/{done}")["status"] == "done")
    stem = first.call("GET", f"/v1/jobs/{done}/stems/bass")[1]
    preferences = ["model=bag&shifts=3", "shifts=1", "shifts=2", "model=bag&shifts=0&format=flac"]
    ids = [
        first.json("POST", f"/v1/jobs?{wish}", song(2.0, 10 + seed))["id"]
        for seed, wish in enumerate(preferences)
    ]
    hang_up(first, song(2.0, 77))  # not persistent: its client is gone after the restart
    time.sleep(rng.uniform(0.1, 0.6))
    first.kill()
    with run_server(*words) as second:
        assert second.call("GET", f"/v1/jobs/{done}/stems/bass") == (200, stem)
        for id in ids:
            wait_until(lambda id=id: second.json("GET", f"/v1/jobs/{id}")["status"] == "done")  # type: ignore[misc]  # a default binds
        audio = second.call("GET", f"/v1/jobs/{ids[1]}/stems/vocals")[1]
        assert list((tmp_path / "uploads").iterdir()) == []
    with Separator(FAST, repo, device="cpu") as separator:
        expected = separator.run(song(2.0, 11)).save(tmp_path / "expected")
    assert audio == expected["vocals"].read_bytes()


def test_second_server_cannot_use_same_data_dir(server: Server, repo: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="another server"), client(repo, data):
        pass
    assert server.is_ready()


def test_server_starts_from_vertex_environment(repo: Path, tmp_path: Path) -> None:
    port = free_port()
    variables = {
        "AIP_HTTP_PORT": str(port),
        "AIP_PREDICT_ROUTE": "/models/7:predict",
        "AIP_HEALTH_ROUTE": "/alive",
        "AIP_STORAGE_URI": repo.as_uri(),
        "DEMUCS_INFER_DATA_DIR": str(tmp_path),
        "DEMUCS_INFER_MODELS": FAST,
        "DEMUCS_INFER_DEVICES": "cpu",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", "serve"],
        env={**environment(), **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        vertex = Server.__new__(Server)
        vertex.port, vertex.url, vertex.process = port, f"http://127.0.0.1:{port}", process

        def is_healthy() -> bool:
            try:
                return vertex.call("GET", "/alive")[0] == 200
            except OSError:
                return False

        wait_until(is_healthy)
        body = {"instances": [{"b64": base64.b64encode(song(0.3, n)).decode()} for n in (1, 2)]}
        status, response = vertex.call("POST", "/models/7:predict", json.dumps(body).encode())
        assert status == 200 and len(json.loads(response)["predictions"]) == 2
        process.terminate()
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_client_examples_of_readme(server: Server, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8").replace("http://127.0.0.1:8080", server.url)
    section = text[text.index("## Serve") :].split("\n## ")[0]
    blocks = dict(re.findall(r"```(py|bash)\n(.*?)```", section, re.DOTALL))
    (tmp_path / "song.mp3").write_bytes(song(0.5, 3))  # recognized by its content
    assert len(blocks["py"].splitlines()) <= 6
    subprocess.run([sys.executable, "-c", blocks["py"]], cwd=tmp_path, check=True, timeout=60)
    stems = {path.name: path.read_bytes() for path in (tmp_path / "stems").glob("*.wav")}
    assert set(stems) == {"drums.wav", "bass.wav", "other.wav", "vocals.wav"}
    require_tool("curl")
    commands = [line for line in blocks["bash"].splitlines() if line.startswith("curl")]
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=60)
    assert stems_of((tmp_path / "stems.zip").read_bytes()) == stems
    assert (tmp_path / "vocals.flac").read_bytes()[:4] == b"fLaC"
    (tmp_path / "song.mp3").write_bytes(b"no music")
    words = [sys.executable, "-c", blocks["py"]]
    failed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and "it looks like text" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_request_beyond_shutdown_limit_gets_json_error(repo: Path, tmp_path: Path) -> None:
    words = ["--repo", repo, "--models", f"bag,{FAST}", "--data-dir", tmp_path]
    with run_server(*words, "--shutdown-seconds", "1") as server, ThreadPoolExecutor(1) as pool:
        response = pool.submit(server.call, "POST", "/v1/separate?shifts=15", song(30.0, 1))
        wait_until(lambda: not idle(server))
        server.process.terminate()
        status, body = response.result(30)
        assert (status, json.loads(body)["error"]["code"]) == (503, "stopping")


def test_port_in_use_is_reported_with_advice(
    repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as other, caplog.at_level("ERROR"):
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = make_settings(repo, tmp_path, host="127.0.0.1", port=port)
        assert not serve(settings)
    assert caplog.messages[-1] == (
        f"cannot listen at 127.0.0.1, port {port}: set another port or host, or end the program "
        "that uses this one"
    )


def test_startup_failure_is_one_line(
    server: Server, repo: Path, data: Path, tmp_path: Path
) -> None:
    """The data folder is in use, or the device does not exist."""
    words = [sys.executable, "-m", "demucs_infer", "serve", "--repo", repo, "--port"]
    wrong: dict[str, list[str | Path]] = {
        "is another server running there": ["--data-dir", data],
        "cuda:9 is not available here": ["--data-dir", tmp_path, "--devices", "cuda:9"],
    }

    def serve(flags: list[str | Path]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*words, str(free_port()), *flags], env=environment(), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip

    with ThreadPoolExecutor() as pool:
        for message, process in zip(wrong, pool.map(serve, wrong.values()), strict=True):
            assert process.returncode == 2, process.stderr
            assert "Traceback" not in process.stderr
            errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and message in errors[0]
