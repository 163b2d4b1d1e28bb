"""Send a server an hour of mixed requests, and write its metrics.

    python -m tests.bench.hour --metrics FILE
    python -m tests.bench.hour --seconds 600 --share 0.2 --metrics FILE

Four clients send songs of 3 to 120 seconds. Some wait for their stems, others create jobs and read
stems while they are made; some songs come again, or several at once, are damaged or cancelled; some
keys are wrong; and webhooks go to a receiver that fails now and then. Weights are random. With
`--share`, the clients pause so that the server takes that share of a core. The exit code is 1 if a
response had an unexpected status, or a job did not end as it should.
"""

import argparse
import base64
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from tests.helpers.cli_process import make_repo
from tests.helpers.server_process import FAST, Server, run_server, song
from tests.helpers.web_server import WebRequest, run_web_server

KEYS = [f"key-of-client-{number:04d}" for number in range(4)]
SECONDS = (3.0, 10.0, 30.0, 120.0)
MODELS = (FAST, "4f2b8e3d", "bag")
FORMATS = ("wav", "flac", "mp3")
_POLL_SECONDS = 0.5
_JOB_SECONDS = 600.0
"""How long a job may take before it counts as one that does not end."""


class Client:
    """Sends one request after the other, with a key of its own."""

    def __init__(self, server: Server, key: str, hook: str) -> None:
        self._server = server
        self._key = key
        self._hook = hook
        self._random = random.Random(key)
        self._song = song(3.0, 0)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def step(self) -> None:
        """Send a random kind of request, and check its outcome."""
        kinds = (
            "separate",
            "job",
            "job",
            "live",
            "again",
            "several",
            "damaged",
            "cancel",
            "predict",
        )
        kind = self._random.choice((*kinds, "refused"))
        self.counts[kind] += 1
        getattr(self, f"_{kind}")()

    def _call(self, method: str, path: str, body: bytes | None, *statuses: int) -> bytes:
        status, data = self._server.call(method, path, body, X_API_Key=self._key)
        if status not in statuses:
            self.problems.append(f"{method} {path}: {status} {data[:200]!r}")
        return data

    def _make_song(self) -> bytes:
        self._song = song(self._random.choice(SECONDS), self._random.getrandbits(32))
        return self._song

    def _choose(self, **parameters: object) -> str:
        names = {"model": MODELS, "format": FORMATS, "shifts": (0, 0, 1)}
        return urlencode({k: self._random.choice(v) for k, v in names.items()} | parameters)

    def _create(self, audio: bytes, **parameters: object) -> str:
        path = f"/v1/jobs?{self._choose(webhook=self._hook, **parameters)}"
        return str(json.loads(self._call("POST", path, audio, 202))["id"])

    def _wait(self, id: str, *statuses: str) -> None:
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            job = json.loads(self._call("GET", f"/v1/jobs/{id}", None, 200))
            if job["status"] in statuses:
                return
            if job["status"] not in ("queued", "running"):
                break
            time.sleep(_POLL_SECONDS)
        self.problems.append(f"job {id} is {job['status']}: {job['error']}")

    def _separate(self) -> None:
        self._call("POST", f"/v1/separate?{self._choose()}", self._make_song(), 200)

    def _job(self) -> None:
        id = self._create(self._make_song())
        self._wait(id, "done")
        self._call("GET", f"/v1/jobs/{id}/stems.zip", None, 200)
        self._call("GET", f"/v1/jobs/{id}/stems/vocals/waveform", None, 200)

    def _live(self) -> None:
        id = self._create(self._make_song())
        path = f"/v1/jobs/{id}/stems/vocals?live=true"
        while b'"not_done"' in self._call("GET", path, None, 200, 409)[:100]:
            time.sleep(_POLL_SECONDS)
        self._wait(id, "done")

    def _again(self) -> None:
        for _ in range(2):
            self._wait(self._create(self._song, model=FAST, format="flac", shifts=0), "done")

    def _several(self) -> None:
        for id in [self._create(self._make_song()) for _ in range(4)]:
            self._wait(id, "done")

    def _damaged(self) -> None:
        self._call("POST", f"/v1/jobs?{self._choose()}", self._random.randbytes(2000), 422)

    def _cancel(self) -> None:
        id = self._create(self._make_song())
        time.sleep(self._random.random())
        self._call("DELETE", f"/v1/jobs/{id}", None, 202, 204)

    def _predict(self) -> None:
        instances = [{"b64": base64.b64encode(song(3.0, seed)).decode()} for seed in range(2)]
        self._call("POST", "/predict", json.dumps({"instances": instances}).encode(), 200)

    def _refused(self) -> None:
        key, self._key = self._key, "a wrong key"
        self._call("POST", "/v1/jobs", self._song, 401)
        self._key = key
        self._call("GET", "/v1/jobs/unknown", None, 404)
        self._call("POST", "/v1/jobs?format=wax", self._song, 422)


@contextmanager
def run_receiver() -> Iterator[str]:
    """Yield the URL of a receiver of webhooks that refuses one message of eight."""
    numbers, lock = iter(range(10**9)), threading.Lock()

    def handle(connection: socket.socket, _: WebRequest) -> None:
        with lock:
            status = 503 if next(numbers) % 8 == 7 else 204
        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)

    with run_web_server() as web:
        web.handlers["/hook"] = handle
        yield f"{web.url}/hook"


def read_cpu_seconds(server: Server) -> float:
    """Return the CPU time of the server so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work(client: Client, server: Server, until: float, share: float) -> None:
    """Send requests until the time is over, with pauses that keep the server below its share."""
    began, cpu = time.monotonic(), read_cpu_seconds(server)
    while time.monotonic() < until:
        client.step()
        while time.monotonic() < until and (
            read_cpu_seconds(server) - cpu > share * (time.monotonic() - began)
        ):
            time.sleep(0.2)


def main() -> int:
    """Send the requests, and write the metrics."""
    parser = argparse.ArgumentParser("python -m tests.bench.hour", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--share", type=float, default=1.0, help="share of a core for the server")
    parser.add_argument("--metrics", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, run_receiver() as hook:
        folder = Path(name)
        (folder / "keys").write_text("\n".join(KEYS) + "\n")
        (folder / "secret").write_text("a secret of this run\n")
        for file in ("keys", "secret"):
            (folder / file).chmod(0o600)
        words: list[str | Path] = [
            "--repo",
            make_repo(folder / "repo"),
            "--models",
            ",".join(MODELS),
        ]
        words += ["--data-dir", folder / "data", "--api-keys-file", folder / "keys"]
        words += ["--allowed-webhooks", hook, "--webhook-secret-file", folder / "secret"]
        words += ["--max-store-bytes", "500000000", "--no-access-log"]
        with run_server(*words) as server, ThreadPoolExecutor(len(KEYS)) as pool:
            clients = [Client(server, key, hook) for key in KEYS]
            until = time.monotonic() + args.seconds
            for done in [pool.submit(work, one, server, until, args.share) for one in clients]:
                done.result()
            time.sleep(3)  # so that the last messages are delivered
            args.metrics.write_bytes(server.call("GET", "/metrics", X_API_Key=KEYS[0])[1])
    problems = [problem for client in clients for problem in client.problems]
    print(json.dumps(sum((client.counts for client in clients), Counter()), indent=1))
    print("\n".join(problems) or "no unexpected response")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
