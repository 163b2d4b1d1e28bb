"""The stems of one song, by every road that leads to files, down to their last byte.

Last bits depend on PyTorch, on the processor and on how many threads there are, so digests are
kept by these. Where they are not known, the roads are compared with each other, and with how loud
each stem is at every tenth of a second, which is the same everywhere.

`python -m tests.snapshot.roads FOLDER` takes the roads in a process of its own: how many threads
there are is only sure from its start.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.snapshot import DATA, read_json, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from demucs_infer.api import Separator

THREADS = (1, 2)
STEMS = ("drums", "bass", "other", "vocals")
TOLERANCE = 1e-4
_SECONDS = 8.0  # two windows of the model
_LOUD_SECONDS = 2.0
_LOUD_GAIN = 1.6  # so that stems would clip
_STEP = 0.1  # seconds of one loudness
_RUN = ["-n", "tiny", "-d", "cpu", "--offline", "-q", "-o"]

Digests = dict[str, str]
Files = dict[str, Path]
Measured = dict[str, Any]


def fingerprint() -> str:
    """Name what decides about last bits, but for the number of threads."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        told = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", info.read_text(), re.MULTILINE))
        names = ("vendor_id", "cpu family", "model")
        processor = " ".join(told[name] for name in names if name in told) or processor
    parts = {
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items())


def measure(folder: Path, threads: int) -> Measured:
    """Take all roads with so many threads, in a process of its own."""
    place = folder / f"threads{threads}"
    place.mkdir()
    variables = {
        "OMP_NUM_THREADS": str(threads),
        # On a busy machine threads that wait by spinning take a hundred times longer.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "DEMUCS_INFER_CACHE": str(place / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.snapshot.roads", str(place)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: Measured = json.loads(done.stdout)
    assert found["threads"] == threads
    return found


def write_down(found: dict[int, Measured]) -> None:
    """Keep digests and loudness; where known digests change, those of other machines are old."""
    name, mine = fingerprint(), digests_of(found)
    known = read_json("digests.json") if (DATA / "digests.json").exists() else {}
    if known.get(name, mine) != mine:
        known = {}
    write_json("digests.json", dict(sorted({**known, name: mine}.items())))
    rows = (f' "{stem}": {json.dumps(row)}' for stem, row in found[1]["plain"]["loudness"].items())
    write_text("loudness.json", "{\n" + ",\n".join(rows) + "\n}\n")


def digests_of(found: dict[int, Measured]) -> dict[str, Any]:
    """Pick what is kept for a machine: one set of digests where all roads must agree."""
    kept = {"song": found[1]["plain"]["song"], "loud song": found[1]["loud"]["song"]}
    for count, one in found.items():
        kept |= {
            f"files, threads: {count}": one["plain"]["roads"]["command"],
            f"floats, threads: {count}": one["plain"]["floats"]["run"],
            f"files of a loud song by the command, threads: {count}": one["loud"]["roads"][
                "command"
            ],
            f"files of a loud song by the library, threads: {count}": one["loud"]["roads"]["run"],
        }
    return kept


# ── in a process of its own ──


def take_roads(folder: Path) -> Measured:
    """Separate a song that fits and one whose stems would clip, by every road."""
    import torch

    from demucs_infer import demo
    from demucs_infer.api import Separator
    from demucs_infer.audio.writer import save_audio

    separator = Separator("tiny", device="cpu")
    found: Measured = {"threads": torch.get_num_threads()}
    for name, seconds, gain in (("plain", _SECONDS, 1.0), ("loud", _LOUD_SECONDS, _LOUD_GAIN)):
        song, file = demo.song(seconds, seed=0), folder / name / "song.wav"
        file.parent.mkdir()
        # Rounded, it is the same song on every machine; a loud one is more than integers can hold.
        save_audio(gain * song.mix, file, song.sample_rate, as_float=gain > 1, clip="none")
        found[name] = _take_roads(separator, file)
    assert found["plain"]["gain"] == 1 > found["loud"]["gain"]
    return found


def _take_roads(separator: "Separator", file: Path) -> Measured:
    """Give the digests of the files, by road and stem, and of the samples before them."""
    folder = file.parent
    output = separator.run(file)
    streamed = separator.separate_to(file, folder / "separate_to").paths
    roads = {
        "command": by_command(file, folder / "command"),
        "server": by_server(file, folder / "server"),
        "batch": by_batch(file, folder / "batch"),
        "run": output.save(folder / "run"),
        "separate_to": {name: path for name, path in streamed.items() if path is not None},
    }
    tensors = separator.separate_audio_file(file)[1]
    whole = separator.separate_to(file, folder / "floats", bits=32, clip="none").paths
    return {
        "song": hashlib.sha256(file.read_bytes()).hexdigest(),
        "gain": output.gain,
        "roads": {name: _digests(files) for name, files in roads.items()},
        "floats": {
            "run": {name: _digest(stem) for name, stem in output.outputs.items()},
            "separate_audio_file": {name: _digest(stem) for name, stem in tensors.items()},
            "separate_to": {name: _digest_of_file(path) for name, path in whole.items()},
        },
        "loudness": {name: _loudness(stem) for name, stem in output.outputs.items()},
    }


def by_command(file: Path, out: Path) -> Files:
    """`demucs-infer song.wav`."""
    from demucs_infer.cli.main import main

    assert main([str(file), *_RUN, str(out)]) == 0
    return _files(out.glob("tiny/song/*.wav"))


def by_batch(file: Path, out: Path) -> Files:
    """`demucs-infer batch list.txt`."""
    from demucs_infer.cli.main import main

    out.mkdir()
    (out / "list.txt").write_text(f"{file}\n")
    assert main(["batch", str(out / "list.txt"), *_RUN, str(out)]) == 0
    return _files(out.rglob("*.wav"))


def by_server(file: Path, data: Path) -> Files:
    """`POST /v1/separate`, whose answer is an archive."""
    import io
    import zipfile

    from fastapi.testclient import TestClient

    from demucs_infer.server import ServerSettings, create_app

    settings = ServerSettings(data_dir=data, models=("tiny",), devices=("cpu",), access_log=False)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        answer = client.post("/v1/separate", content=file.read_bytes())
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        archive.extractall(data / "answer")
    return _files((data / "answer").rglob("*.wav"))


def _files(paths: Iterable[Path]) -> Files:
    return {path.stem: path for path in paths}


def _digests(files: Files) -> Digests:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def _digest(stem: "Tensor") -> str:
    """Give the digest of the samples (C T) as 32 bit floats."""
    return hashlib.sha256(stem.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def _digest_of_file(path: Path | None) -> str:
    import soundfile
    import torch

    assert path is not None
    wav = soundfile.read(path, dtype="float32", always_2d=True)[0]
    return _digest(torch.from_numpy(wav).T)


def _loudness(stem: "Tensor") -> list[float]:
    """Give the root of the mean square (C T) of every tenth of a second."""
    pieces = stem.double().unfold(-1, round(_STEP * 44100), round(_STEP * 44100))
    return [round(float(one), 6) for one in pieces.square().mean((0, 2)).sqrt()]


if __name__ == "__main__":
    print(json.dumps(take_roads(Path(sys.argv[1]))))
