"""Measure a server under load: songs per minute, latency, and the time to the first readable part.

    python -m tests.bench.server                        # `tiny` networks, one to two minutes
    python -m tests.bench.server --network htdemucs     # the real shapes, half an hour or more
    python -m tests.bench.server --server-path CHECKOUT # the server of another checkout
    python -m tests.bench.server --server-python PYTHON # or of another installation
    python -m tests.bench.server --json FILE

For each number of clients a server is started, and all songs are sent at once: a long one by the
first client, then short ones by all clients in turn. Latency is that of the short songs, from the
end of the upload to the finished files. Each client has an API key of its own. The songs and their
order are the same for every number of clients. Weights are random. Nothing else should run on the
machine.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from tests.bench.music import RATE, song
from tests.bench.shapes import write_repo
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import RATE as TINY_RATE
from tests.helpers.cli_process import make_repo

HEADER = (
    "| clients | songs a minute | latency p50 | p95 | first part p50 | p95 | long song | CPU s |\n"
    "|---|---|---|---|---|---|---|---|"
)
_POLLS_PER_SECOND = 50
"""Requests of all clients together, so that the polling does not slow the server."""


@dataclass(frozen=True, slots=True)
class Load:
    """A network, and the songs that are sent to it."""

    model: str
    rate: int
    short: tuple[float, ...]
    """Seconds of the short songs, used in turn."""
    long: float
    songs: int
    """Number of short songs."""


LOADS = {
    "tiny": Load("4f2b8e3d", TINY_RATE, (3.0, 6.0, 10.0), 120.0, 96),
    "htdemucs": Load("htdemucs", RATE, (15.0, 30.0, 60.0), 600.0, 64),
}


@dataclass(slots=True)
class Job:
    """A song that was sent."""

    id: str
    client: int
    seconds: float
    """Duration of the song."""
    created: float
    is_long: bool
    first_part: float | None = None
    """Seconds until a part of a stem could be read."""
    latency: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A row of the table."""

    network: str
    clients: int
    songs_per_minute: float
    latency_p50: float
    latency_p95: float
    first_part_p50: float
    first_part_p95: float
    long_seconds: float
    cpu_seconds: float
    wall_seconds: float
    audio_seconds: float
    failed: int
    server_options: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the row."""
        return (
            f"| {self.clients} | {self.songs_per_minute:.1f} | {self.latency_p50:.1f} s | "
            f"{self.latency_p95:.1f} s | {self.first_part_p50:.1f} s | {self.first_part_p95:.1f} s "
            f"| {self.long_seconds:.1f} s | {self.cpu_seconds:.1f} |"
            + (f" {self.failed} failed" if self.failed else "")
        )


class Server:
    """A `demucs-infer serve` process with a key for each client."""

    def __init__(
        self,
        command: Sequence[str],
        load: Load,
        repo: Path,
        work: Path,
        clients: int,
        options: Sequence[str],
    ) -> None:
        self.keys = [f"bench-key-of-client-{number:04d}" for number in range(clients)]
        self._log_path = work / "server.log"
        keys = work / "keys.txt"
        keys.write_text("".join(f"{key}\n" for key in self.keys))
        keys.chmod(0o600)
        words: list[object] = ["--port", 0, "--repo", repo, "--models", load.model]
        words += ["--data-dir", work / "data", "--api-keys-file", keys, "--max-queue", 1000]
        words += ["--offline", *options]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "-m", "demucs_infer", "serve", *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=work,
            )
        self._url = ""

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded."""
        while True:
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended: {self._log_path.read_text()}")
            log = self._log_path.read_text()
            # An earlier line has the port that was asked for, 0.
            self._url = log.partition("running on ")[2].partition(" ")[0]
            with suppress(OSError, ValueError):
                self.call(0, "/readyz")
                return
            time.sleep(0.1)

    def call(self, client: int, path: str, body: bytes | None = None) -> Any:
        """Send a request, and return the JSON of the response."""
        request = urllib.request.Request(self._url + path, body)
        request.add_header("X-API-Key", self.keys[client])
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def run_server(
    command: Sequence[str], load: Load, repo: Path, clients: int, options: Sequence[str]
) -> Iterator[Server]:
    """Yield a server whose model is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(command, load, repo, Path(folder), clients, options)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def measure(
    network: str,
    load: Load,
    server: Server,
    songs: Sequence[tuple[float, bytes]],
    options: list[str],
) -> Result:
    """Send all songs, and return the figures once they are done."""
    clients = len(server.keys)
    cpu, began = server.cpu_seconds(), time.time()

    def submit(number: int) -> Job:
        client = 0 if number == 0 else (number - 1) % clients
        seconds, audio = songs[number]
        view = server.call(client, "/v1/jobs?shifts=0", audio)
        return Job(view["id"], client, seconds, view["created"], number == 0)

    jobs = [submit(0)]  # the long song has begun when the others arrive
    while server.call(0, f"/v1/jobs/{jobs[0].id}")["status"] == "queued":
        time.sleep(0.02)
    with ThreadPoolExecutor(4) as pool:
        jobs += pool.map(submit, range(1, len(songs)))
    by_id = {job.id: job for job in jobs}
    open_jobs = {
        client: {job.id for job in jobs if job.client == client} for client in range(clients)
    }
    failed = 0
    while open_jobs:
        for client in list(open_jobs):
            time.sleep(1 / _POLLS_PER_SECOND)
            for view in server.call(client, "/v1/jobs?limit=200")["jobs"]:
                if view["id"] not in open_jobs[client]:
                    continue
                job, preview = by_id[view["id"]], view["preview"]
                if job.first_part is None and preview and preview["available_seconds"] > 0:
                    job.first_part = time.time() - job.created
                if view["status"] in ("done", "failed", "cancelled"):
                    open_jobs[client].remove(job.id)
                    failed += view["status"] != "done"
                    latency = float(view["expires"]) - 3600 - job.created  # --keep-seconds
                    job.latency = latency
                    job.first_part = min(job.first_part or latency, latency)
            if not open_jobs[client]:
                del open_jobs[client]
    wall = max(job.created + (job.latency or 0) for job in jobs) - began
    short = [job for job in jobs if not job.is_long]
    latencies = sorted(job.latency or 0 for job in short)
    first_parts = sorted(job.first_part or 0 for job in short)
    return Result(
        network=network,
        clients=clients,
        songs_per_minute=60 * len(jobs) / wall,
        latency_p50=statistics.median(latencies),
        latency_p95=_percentile_95(latencies),
        first_part_p50=statistics.median(first_parts),
        first_part_p95=_percentile_95(first_parts),
        long_seconds=jobs[0].latency or 0,
        cpu_seconds=server.cpu_seconds() - cpu,
        wall_seconds=wall,
        audio_seconds=sum(job.seconds for job in jobs),
        failed=failed,
        server_options=options,
    )


def _percentile_95(values: Sequence[float]) -> float:
    return values[min(len(values) - 1, round(0.95 * (len(values) - 1)))]


def write_songs(load: Load, folder: Path) -> list[tuple[float, bytes]]:
    """Return (seconds, wav file) of the long song, then of the short ones; no two are equal."""
    lengths = [load.long, *(load.short[n % len(load.short)] for n in range(load.songs))]
    path, songs = folder / "song.wav", []
    for seed, seconds in enumerate(lengths):
        if load.rate == RATE:
            wav = song(seconds, seed)
        else:
            wav = make_noise(2, round(seconds * load.rate), seed)
        soundfile.write(path, wav.T.numpy(), load.rate)
        songs.append((seconds, path.read_bytes()))
    path.unlink()
    return songs


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; other words are options of the server."""
    parser = argparse.ArgumentParser("python -m tests.bench.server", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", choices=list(LOADS), default="tiny")
    parser.add_argument("--clients", default="1,4,16,64", help="numbers of clients: 1,4,16,64")
    parser.add_argument("--songs", type=int, help="number of short songs")
    parser.add_argument("--long", type=float, help="seconds of the long song")
    parser.add_argument("--server-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--server-path", type=Path, metavar="CHECKOUT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file, too")
    parser.add_argument("options", nargs="*", help="after --, further options of the server")
    return parser.parse_args()


def main() -> None:
    """Print one row of the table after the other."""
    args = parse_arguments()
    default = LOADS[args.network]
    load = Load(
        default.model, default.rate, default.short, args.long or default.long,
        args.songs or default.songs,
    )  # fmt: skip
    options = ["--devices", args.device, *args.options]
    command = [args.server_python]
    if args.server_path:
        command = ["env", f"PYTHONPATH={args.server_path.absolute()}", *command]
    rows: list[Result] = []
    print(
        f"{args.network}: a song of {load.long:g} s, then {load.songs} of "
        f"{', '.join(f'{seconds:g}' for seconds in load.short)} s in turn\n\n{HEADER}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder) / "repo"
        if args.network == "tiny":
            make_repo(repo)
        else:
            repo.mkdir()
            write_repo(repo, load.model)
        songs = write_songs(load, Path(folder))
        for clients in map(int, args.clients.split(",")):
            with run_server(command, load, repo, clients, options) as server:
                rows.append(measure(args.network, load, server, songs, options))
            print(rows[-1].markdown(), flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
