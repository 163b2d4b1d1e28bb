"""The files of one track share a gain, sum to the mix, and appear together or not at all."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import demucs.audio
import pytest
import soundfile
import torch
from torch import Tensor

import demucs_infer
from demucs_infer.audio.formats import FORMATS, Encoding
from demucs_infer.audio.gain import (
    CLIP_MODES,
    Clip,
    Levels,
    Shaper,
    prevent_clip,
    round_together,
    track_gain,
    translate_os_errors,
)
from demucs_infer.audio.spool import Spool
from demucs_infer.audio.stem_files import Sink, StemFiles
from demucs_infer.audio.stem_writer import Layout, StemWriter
from demucs_infer.errors import AudioWriteError
from demucs_infer.options import OutputOptions
from tests.audio.test_writer import limit_file_size
from tests.helpers.audio_signals import make_noise

RATE = 44100
STEMS = ("drums", "bass", "other", "vocals")


def stems(level: float, length: int = 30_011) -> dict[str, Tensor]:
    """Return four noises whose peaks are `level` times 1, 0.8, 0.6 and 0.4."""
    waves = {}
    for seed, name in enumerate(STEMS):
        noise = make_noise(2, length, seed)
        waves[name] = noise / noise.abs().max() * level * (1 - 0.2 * seed)
    return waves


@contextmanager
def closing_spool(spool: Spool) -> Iterator[None]:
    """Close the files of the spool, whatever happens."""
    try:
        yield
    finally:
        spool.abandon_unless_finished()


def write_stems(
    paths: Mapping[str, Path],
    blocks: Iterable[Mapping[str, Tensor]],
    encoding: Encoding,
    *,
    clip: Clip = "track",
    exact_sum: bool = True,
    open_sink: Callable[[], Sink] | None = None,
    mix_name: str | None = None,
) -> Levels:
    """Write files on the road that the package takes: spool, gains, encoders, names."""
    shaper = Shaper(encoding=encoding, clip=clip, exact_sum=exact_sum)
    layout = Layout(spool_rate=RATE, rate=RATE, channels=2)
    with TemporaryDirectory() as folder:
        spool = Spool(Path(folder), len(paths), 2)

        def open_files() -> StemFiles:
            return StemFiles(paths, RATE, 2, encoding)

        with (
            closing_spool(spool),
            StemWriter(
                spool, tuple(paths), open_sink or open_files, layout, shaper, mix_name=mix_name
            ) as writer,
        ):
            for block in blocks:
                with translate_os_errors(writer.sink.name):
                    spool.append(torch.stack([block[name] for name in paths]))
            spool.finish()
            levels = writer.encode()
            writer.commit()
    return levels


def write(
    folder: Path,
    blocks: Mapping[str, Tensor],
    encoding: Encoding,
    *,
    clip: Clip = "track",
    exact_sum: bool = True,
    step: int = 7_001,
) -> tuple[Levels, dict[str, Tensor]]:
    """Write blocks of `step` samples; return the levels, and the files as libsndfile reads them."""
    suffix = FORMATS[encoding.format].suffixes[0]
    paths = {name: folder / f"{name}{suffix}" for name in blocks}
    length = next(iter(blocks.values())).shape[-1]
    pieces = (
        {name: wav[:, start : start + step] for name, wav in blocks.items()}
        for start in range(0, length, step)
    )
    levels = write_stems(paths, pieces, encoding, clip=clip, exact_sum=exact_sum)
    assert sorted(folder.iterdir()) == sorted(paths.values())
    decoded = {
        name: torch.from_numpy(soundfile.read(path, dtype="float64", always_2d=True)[0]).T
        for name, path in paths.items()
    }
    return levels, decoded


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("level", [0.3, 0.9, 2.7])
def test_stems_sum_to_the_mix_times_the_gain(bits: int, level: float, tmp_path: Path) -> None:
    original = stems(level)
    levels, decoded = write(tmp_path, original, Encoding("wav", bits=bits))
    gain = levels.gains["drums"]
    assert set(levels.gains.values()) == {gain}
    assert (gain == 1) == (level < 1)
    mix = sum(wav.double() for wav in original.values()) * gain
    step = 2.0 ** (1 - bits)
    # Half a step by rounding; the rest is computed in double precision.
    assert (sum(decoded.values()) - mix).abs().max() <= 0.5 * step * 1.000001
    for name, wav in original.items():
        assert (decoded[name] - gain * wav.double()).abs().max() <= step
        assert levels.peaks[name] == wav.abs().max()
    loudest = max(float(wav.abs().max()) for wav in decoded.values())
    if level > 1:
        assert 1 - 2 * step <= loudest <= 1  # as loud as possible


def test_independent_rounding_has_a_larger_error_in_the_sum(tmp_path: Path) -> None:
    original = stems(0.5)
    _, decoded = write(tmp_path, original, Encoding("wav"), exact_sum=False)
    mix = sum(wav.double() for wav in original.values())
    error = (sum(decoded.values()) - mix).abs().max() * 2**15
    assert 1 < error <= 2  # four times half a step
    for name, wav in original.items():
        assert (decoded[name] - wav).abs().max() * 2**15 <= 0.5


@pytest.mark.parametrize("clip", ["track", "none"])
def test_stems_within_full_scale_are_unchanged(clip: Clip, tmp_path: Path) -> None:
    scale = 2.0**15
    original = {name: (wav * scale).round() / scale for name, wav in stems(0.99).items()}
    original["drums"][0, :2] = torch.tensor([-1.0, 1 - 1 / scale])  # both ends of 16 bits
    levels, decoded = write(tmp_path, original, Encoding("flac"), clip=clip)
    assert set(levels.gains.values()) == {1.0}
    for name, wav in original.items():
        assert torch.equal(decoded[name].float(), wav)


@pytest.mark.parametrize("clip", ["track", "none"])
def test_float_files_are_not_clipped(clip: Clip, tmp_path: Path) -> None:
    original = stems(3.0)
    levels, decoded = write(tmp_path, original, Encoding("wav", bits=32), clip=clip)
    assert set(levels.gains.values()) == {1.0}
    for name, wav in original.items():
        assert torch.equal(decoded[name].float(), wav)


@pytest.mark.parametrize("clip", ["rescale", "clamp", "tanh"])
@pytest.mark.parametrize("bits", [24, 32])
def test_clip_modes_equal_upstreams_prevent_clip(clip: Clip, bits: int, tmp_path: Path) -> None:
    original = stems(1.5)
    levels, decoded = write(tmp_path, original, Encoding("wav", bits=bits), clip=clip)
    for name, wav in original.items():
        expected = demucs.audio.prevent_clip(wav.clone(), mode=clip)
        # A step of 24 bits for rounding, one of float32 for dividing or multiplying.
        assert (decoded[name] - expected).abs().max() <= 2**-23
        if clip == "rescale":
            assert levels.gains[name] == pytest.approx(1 / max(1.01 * levels.peaks[name], 1))


@pytest.mark.parametrize("mode", ["rescale", "clamp", "tanh", "none", None])
@pytest.mark.parametrize("level", [0.5, 0.995, 2.0])
def test_prevent_clip_equals_upstreams(mode: str | None, level: float) -> None:
    wav = stems(level)["drums"]
    before = wav.clone()
    ours = prevent_clip(wav, mode=mode)
    torch.testing.assert_close(ours, demucs.audio.prevent_clip(wav.clone(), mode=mode))
    assert torch.equal(wav, before)


def test_prevent_clip_scales_by_the_peak_and_checks_arguments() -> None:
    scaled = prevent_clip(torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[2.0, -1.0]]) / 2.02)
    with pytest.raises(ValueError, match="must be rescale"):
        prevent_clip(torch.zeros(1, 1), mode="limit")
    with pytest.raises(ValueError, match="pass floats"):
        prevent_clip(torch.zeros(1, 1, dtype=torch.int16))
    assert prevent_clip(torch.zeros(2, 0)).shape == (2, 0)


def test_track_gain_makes_the_loudest_file_just_fit() -> None:
    top = 1 - 2**-15
    assert track_gain({"a": 1.0, "b": 0.1}, Encoding("wav")) == 1
    assert track_gain({"a": 0.1, "b": 2.0}, Encoding("wav")) == top / 2
    assert track_gain({"a": 2.0}, Encoding("mp3")) == top / 2
    assert track_gain({"a": 9.0}, Encoding("wav", bits=32)) == 1
    assert track_gain({}, Encoding("wav")) == 1


def test_round_together_keeps_silence_and_integers() -> None:
    blocks = stems(0.5, 5000)
    silent = torch.zeros(2, 5000)
    whole = (blocks["bass"] * 2**15).round() / 2**15
    rounded = round_together({"a": blocks["drums"], "silent": silent, "whole": whole}, 16)
    assert torch.equal(rounded["silent"], silent)
    assert torch.equal(rounded["whole"], whole)
    assert torch.equal(rounded["a"], (blocks["drums"] * 2**15).round() / 2**15)


@pytest.mark.parametrize("step", [1_000, 30_011])
def test_block_size_changes_no_byte(step: int, tmp_path: Path) -> None:
    def files(folder: Path, step: int) -> list[bytes]:
        folder.mkdir()
        write(folder, stems(1.4), Encoding("flac", bits=24), step=step)
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    assert files(tmp_path / "a", step) == files(tmp_path / "b", 7_001)


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("limit", [1_000, 300_000])
def test_full_disk_leaves_none_of_the_files(clip: Clip, limit: int, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.wav" for name in STEMS}
    paths["bass"].write_bytes(b"precious")
    with limit_file_size(limit), pytest.raises(AudioWriteError, match="cannot write .*drums"):
        write_stems(paths, [stems(1.5, 50_000)] * 5, Encoding("wav"), clip=clip)
    assert [path.name for path in tmp_path.iterdir()] == ["bass.wav"]
    assert paths["bass"].read_bytes() == b"precious"


@pytest.mark.parametrize("clip", ["track", "clamp"])
def test_error_leaves_none_of_the_files(clip: Clip, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.flac" for name in STEMS}
    for bad in (float("nan"), float("inf")):
        broken = [stems(0.5), {**stems(0.5, 3), "vocals": torch.full((2, 3), bad)}]
        with pytest.raises(AudioWriteError, match="not a finite number"):
            write_stems(paths, broken, Encoding("flac"), clip=clip)

    def fail() -> Iterator[Mapping[str, Tensor]]:
        yield stems(0.5)
        raise KeyError

    with pytest.raises(KeyError):
        write_stems(paths, fail(), Encoding("flac"), clip=clip)
    with pytest.raises(AudioWriteError, match="create the folder"):
        StemFiles({**paths, "x": tmp_path / "a" / "b.flac"}, RATE, 2, Encoding("flac"))
    assert list(tmp_path.iterdir()) == []


def test_invalid_blocks_are_reported(tmp_path: Path) -> None:
    path = {"a": tmp_path / "a.wav", "b": tmp_path / "b.wav"}
    block = torch.zeros(2, 10)
    for blocks, words in (
        ({"a": block}, "expected"),
        ({"a": block, "b": block[:1]}, "2 channels"),
    ):
        with (
            pytest.raises(ValueError, match=words),
            StemFiles(path, RATE, 2, Encoding()) as files,
        ):
            files.write(blocks)
    with pytest.raises(ValueError, match="track, rescale"):
        Shaper(encoding=Encoding(), clip="limit")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_the_caller_are_copied_and_unchanged(tmp_path: Path) -> None:
    block = stems(0.5, 300_000)
    before = {name: wav.clone() for name, wav in block.items()}
    paths = {name: tmp_path / f"{name}.wav" for name in STEMS}
    with StemFiles(paths, RATE, 2, Encoding("wav", bits=32)) as files:
        files.write(block)
        assert all(torch.equal(block[name], before[name]) for name in STEMS)
        for wav in block.values():
            wav.zero_()  # the caller's memory is free again
    decoded = soundfile.read(paths["vocals"], dtype="float32")[0].T
    assert torch.equal(torch.from_numpy(decoded), before["vocals"])


def test_memory_does_not_grow_with_the_track(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from demucs_infer.audio.formats import Encoding\n"
        "from tests.audio.test_gain import write_stems\n"
        "from tests.helpers.processes import peak_kilobytes\n"
        "peak = lambda: peak_kilobytes() // 1024\n"
        "block = torch.rand(2, 44100) * 1.5\n"
        "def write(seconds):\n"
        "    names = {n: Path(f'{sys.argv[1]}/{n}.wav') for n in 'ab'}\n"
        "    blocks = ({'a': block, 'b': block} for _ in range(seconds))\n"
        "    write_stems(names, blocks, Encoding('wav'))\n"
        "write(3); before = peak(); write(90); print(peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True
    )
    # The floats are twice 64 MB; the queues may hold a few MB.
    assert int(run.stdout) < 32


@pytest.mark.parametrize("clip", get_args(Clip))
def test_every_clip_mode_is_computed(clip: Clip) -> None:
    block = torch.tensor([[0.25, -0.5]])
    shaped = Shaper(encoding=Encoding(), clip=clip).shape({"a": block}, {"a": 1.0})
    assert shaped["a"].shape == block.shape and shaped["a"].dtype == torch.float32


def test_clip_mode_that_is_not_computed_is_an_error() -> None:
    shaper = Shaper(encoding=Encoding())
    object.__setattr__(shaper, "clip", "limit")
    with pytest.raises(KeyError, match="limit"):
        shaper.shape({"a": torch.zeros(1, 2)}, {"a": 1.0})


def test_all_that_write_stems_have_the_shaper_of_their_settings() -> None:
    changes: dict[str, Any] = {"clip": "tanh", "exact_sum": False}
    options = OutputOptions(**changes)
    names = {field.name for field in fields(Shaper)} - {"encoding"}
    assert names == changes.keys(), "add a value other than the default"
    shaper = Shaper.from_options(options, Encoding())
    default = Shaper(encoding=Encoding())
    for name in names:
        assert getattr(shaper, name) == getattr(options, name) != getattr(default, name)
    package = Path(demucs_infer.__file__).parent
    direct = [path.name for path in package.rglob("*.py") if "Shaper(" in path.read_text("utf-8")]
    assert direct == [], "use Shaper.from_options"
