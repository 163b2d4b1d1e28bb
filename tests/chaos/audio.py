"""Decode mutated audio files of every format, in a process of its own.

Every file may end with samples or with an `AudioReadError`; nothing may crash the process, take
more than 10 s or 2 GB, print anything, or open another file.
"""

import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av.subtitles.codeccontext  # noqa: F401 (PyAV would import it for the first such stream)
import torch

from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.writer import save_audio
from demucs_infer.errors import AudioReadError
from tests.chaos.fork_runner import run_cases
from tests.chaos.mutation import choose, mutate_bytes, mutate_chunks, splice
from tests.chaos.report import Limits, Report
from tests.helpers.audio_corpus import KINDS, signal
from tests.helpers.audio_signals import make_noise

MAX_SAMPLES = 20_000_000  # of all channels; a header may declare hours of silence
FORBIDDEN = ("exec", "compile", "import", "open", "os.", "subprocess.", "socket.", "ctypes.")

Seed = tuple[str, str, bytes]
"""Name, suffix and bytes of a valid file."""


def make_seeds(folder: Path) -> list[Seed]:
    """Return short files of every format that can be written, and of those that FFmpeg writes."""
    seeds: list[Seed] = []
    wav = make_noise(2, 3000, 0) * 0.5
    for suffix in ("wav", "flac", "mp3", "m4a", "ogg", "opus", "aiff"):
        path = folder / f"own.{suffix}"
        rate = 48000 if suffix == "opus" else 44100
        save_audio(wav, path, rate)
        seeds.append(("own", f".{suffix}", path.read_bytes()))
    if shutil.which("ffmpeg"):
        seeds += _make_foreign_seeds(folder)
    return seeds


def _make_foreign_seeds(folder: Path) -> Iterator[Seed]:
    import shlex
    import subprocess

    import soundfile

    commands = {name: (kind.suffix, kind.command) for name, kind in KINDS.items()}
    ffmpeg = "ffmpeg -nostdin -v error -y -i {src} "
    for name, suffix, words in (
        ("flv", "flv", "-c:a adpcm_swf -ar 44100"),
        ("ts", "ts", "-c:a mp2"),
        ("tta", "tta", "-c:a tta"),
        ("wavpack", "wv", "-c:a wavpack"),
        ("wav-adpcm", "wav", "-c:a adpcm_ima_wav"),
        ("wav-alaw", "wav", "-c:a pcm_alaw"),
        ("avi", "avi", "-c:a pcm_s16le"),
        ("dts", "dts", "-c:a dca -strict -2 -ar 48000"),
        ("mp2", "mp2", "-c:a mp2"),
        ("amr", "wav", "-c:a g722 -ac 1 -ar 16000"),
    ):
        commands[name] = (suffix, f"{ffmpeg}{words} {{out}}")
    for name, (suffix, command) in commands.items():
        rate = 48000 if name.startswith(("opus", "webm")) else 44100
        source, out = folder / "source.wav", folder / f"foreign.{suffix}"
        soundfile.write(source, signal(2, rate, 16, 0.08), rate, subtype="PCM_16")
        arguments = shlex.split(command.format(src=source, out=out))
        arguments = ["duration=0.08" if word == "duration=0.5" else word for word in arguments]
        if shutil.which(arguments[0]):
            done = subprocess.run(arguments, capture_output=True, check=False)
            if done.returncode == 0:
                yield (name, f".{suffix}", out.read_bytes())


class Fuzzer:
    """Makes the case of a number, and decodes it."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.seed = limits.seed
        self.seeds = [seed for seed in make_seeds(folder) if len(seed[2]) < 200_000]
        self._events: list[str] = []
        self._is_armed = False
        self._is_hooked = False

    def make(self, number: int) -> tuple[Seed, bytes]:
        """Return the seed and the mutated file of a case."""
        rng = random.Random(f"{self.seed}:{number}")
        seed: Seed = choose(rng, self.seeds)
        roll = rng.random()
        if roll < 0.45:
            return seed, mutate_chunks(seed[2], rng)
        if roll < 0.5:
            return seed, splice(seed[2], choose(rng, self.seeds)[2], rng)
        return seed, mutate_bytes(seed[2], rng)

    def describe(self, number: int) -> str:
        """Return how to make a case again."""
        (name, suffix, _), data = self.make(number)
        return f"--seed {self.seed} --first {number} --count 1 ({name}{suffix}, {len(data)} bytes)"

    def warm_up(self) -> None:
        """Decode every seed, so that nothing is left to import."""
        for name, suffix, data in self.seeds:
            path = self.folder / f"case{suffix}"
            path.write_bytes(data)
            if not _decode(path, name):
                raise AssertionError(f"no samples in {name}{suffix}")
        for number in range(200):
            self.run(number, is_armed=False)

    def run(self, number: int, *, is_armed: bool = True) -> str:
        """Decode the file of a case, and return the outcome."""
        (name, suffix, _), data = self.make(number)
        path = self.folder / f"case{suffix}"
        path.write_bytes(data)
        if is_armed and not self._is_hooked:
            sys.addaudithook(self._audit)
            self._is_hooked = True
        self._events.clear()
        with _captured_output(self.folder / "output") as output:
            self._is_armed = is_armed
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    count = _decode(path if number % 4 else data, name)
                outcome = "decoded" if count < MAX_SAMPLES else "decoded the first samples"
            except AudioReadError:
                outcome = "refused: AudioReadError"
            except BaseException as error:
                self._is_armed = False
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name} line {frame.lineno}"
                outcome = f"!exception {type(error).__name__} in {place}: {error}"
            finally:
                self._is_armed = False
        if self._events:
            outcome = f"!audit {self._events[0]}: {name}{suffix}"
        if text := output():
            outcome = f"!printed {name}{suffix}: {text[:500]}"
        return outcome

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_armed or not event.startswith(FORBIDDEN):
            return
        if event == "open" and str(arguments[0]).startswith(f"{self.folder}/case"):
            return
        if str(arguments[0]) == "b'_getframe()'":
            return  # how PyAV's compiled code makes the traceback of an error
        self._events.append(f"{event} {str(arguments)[:200]}")


def _decode(source: Path | bytes, name: str) -> int:
    """Return the number of samples of all channels, of which only the first are read."""
    count = 0
    for block in AudioReader(source).blocks():
        if not torch.isfinite(block).all():
            raise AssertionError(f"samples of {name} that are not finite")
        count += block.numel()
        if count >= MAX_SAMPLES:
            break
    return count


@contextmanager
def _captured_output(path: Path) -> Iterator[Any]:
    """Yield a function that returns what was written to standard output and error."""
    with path.open("w+b") as file:
        before = [os.dup(1), os.dup(2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        text = ""
        try:
            yield lambda: text
        finally:
            for number, old in zip((1, 2), before):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            text = file.read().decode(errors="replace")


def run(limits: Limits) -> Report:
    """Decode mutated files until the limits are reached."""
    report = Report("audio", limits.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-audio-"))
    torch.set_num_threads(1)
    try:
        fuzzer = Fuzzer(folder, limits)
        report.figures["formats"] = len(fuzzer.seeds)
        fuzzer.warm_up()
        run_cases(report, limits, fuzzer.run, fuzzer.describe)
    finally:
        shutil.rmtree(folder)
    return report
