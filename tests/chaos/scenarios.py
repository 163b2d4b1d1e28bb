"""Pieces of work that can be disturbed: the command, the library, a batch, a server, a download.

Each works in a folder with songs and a small model, and is repeated in forked processes, so that
nothing has to be imported twice.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from demucs_infer.api import Separator
from demucs_infer.checkpoints.download import DownloadRequest, fetch
from demucs_infer.cli.main import main
from demucs_infer.errors import DemucsError, format_error
from tests.chaos.serving import run_restart, run_server
from tests.helpers.batch_runs import MODEL, model_flags, write_list
from tests.helpers.cli_process import make_repo, write_song

CONTENT = bytes(range(256)) * 2000
_TIMEOUT = 60.0

Arm = Callable[[], None]


@dataclass(frozen=True)
class Scenario:
    """Work in `folder` whose results are below `folder / "out"`."""

    name: str
    run: Callable[[Path, Arm, Arm], int]
    """Work; call the first function before what is disturbed, and the second behind it."""


def prepare(folder: Path, seconds: float = 1.2) -> None:
    """Make songs and a model."""
    make_repo(folder / "repo")
    for seed in range(2):
        write_song(folder / f"in/{seed}.wav", seconds + 0.1 * seed, seed=seed)
    write_list(folder, "in/0.wav", "in/1.wav")
    (folder / "tmp").mkdir()


def _run_command(folder: Path, arm: Arm, disarm: Arm) -> int:
    words = [str(folder / "in/0.wav"), *model_flags(folder / "repo"), "-o", str(folder / "out")]
    return _call_main([*words, "--progress", "none"], arm, disarm)


def _run_flac(folder: Path, arm: Arm, disarm: Arm) -> int:
    words = [str(folder / "in/0.wav"), *model_flags(folder / "repo"), "-o", str(folder / "out")]
    return _call_main([*words, "--progress", "none", "--format", "flac"], arm, disarm)


def _run_batch(folder: Path, arm: Arm, disarm: Arm) -> int:
    words = ["batch", str(folder / "list.txt"), *model_flags(folder / "repo"), "-q"]
    return _call_main([*words, "-o", str(folder / "out")], arm, disarm)


def _call_main(words: list[str], arm: Arm, disarm: Arm) -> int:
    arm()
    try:
        return int(main(words))
    finally:
        disarm()


def _run_separate_to(folder: Path, arm: Arm, disarm: Arm) -> int:
    arm()
    try:
        with Separator(MODEL, folder / "repo", device="cpu") as separator:
            separator.separate_to(folder / "in/0.wav", folder / "out", "wav")
        return 0
    except (DemucsError, OSError) as error:
        print(f"error: {format_error(error)}", file=sys.stderr)
        return 1
    finally:
        disarm()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)


def _run_download(folder: Path, arm: Arm, disarm: Arm) -> int:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x.th"
    digest = hashlib.sha256(CONTENT).hexdigest()
    arm()
    try:
        fetch(DownloadRequest([url], folder / "out/x.th", digest))
        return 0
    except (DemucsError, OSError) as error:
        print(f"error: {format_error(error)}", file=sys.stderr)
        return 1
    finally:
        disarm()


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("command", _run_command),
        Scenario("command-flac", _run_flac),
        Scenario("separate_to", _run_separate_to),
        Scenario("batch", _run_batch),
        Scenario("server", run_server),
        Scenario("restart", run_restart),
        Scenario("download", _run_download),
    )
}


def fork(work: Callable[[], int], log: Path, temp: Path) -> int:
    """Begin work in a forked process that writes its output to `log`; return its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(number, 1)
        os.dup2(number, 2)
        os.close(number)
        import tempfile

        tempfile.tempdir = str(temp)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float = _TIMEOUT) -> int | None:
    """Return the exit code of a process, negative for a signal; None if it does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def results(folder: Path) -> dict[str, str]:
    """Return the digest of each final file below `out`; of a manifest, that of its stems."""
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = str(path.relative_to(folder / "out"))
        is_hidden = name.startswith(".") or "/." in name
        is_hidden = is_hidden or path.suffix in (".lock", ".part", ".partial", ".etag")
        if path.is_file() and not is_hidden:
            data = path.read_bytes()
            if path.name == "stems.json":
                manifest = json.loads(data)
                data = json.dumps([manifest["key"], manifest["stems"]], sort_keys=True).encode()
            elif path.name.startswith("results.jsonl"):
                rows = sorted(json.loads(line)["track"] for line in data.splitlines())
                data = json.dumps(rows).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Return hidden and temporary files that are left after complete work."""
    files = [
        path
        for path in (folder / "out").rglob("*")
        if path.is_file()
        and (
            any(part.startswith(".") for part in path.relative_to(folder).parts)
            or path.suffix in (".part", ".partial")
        )
    ]
    return [str(path.relative_to(folder)) for path in (*files, *(folder / "tmp").iterdir())]


def clean(folder: Path) -> None:
    """Remove the results and temporary files."""
    for name in ("out", "data", "tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "tmp").mkdir()
