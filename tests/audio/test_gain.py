"""Files of one track stay true to each other: one gain, one sum, all or none."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import demucs.audio
import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer.audio.file_set import StemFileSet
from demucs_infer.audio.formats import FORMATS, Encoding
from demucs_infer.audio.gain import (
    CLIP_MODES,
    Clip,
    Levels,
    prevent_clip,
    round_together,
    track_gain,
)
from demucs_infer.errors import AudioWriteError
from tests.audio.test_writer import largest_file
from tests.helpers import networks as kit

RATE = 44100
STEMS = ("drums", "bass", "other", "vocals")


def stems(level: float, length: int = 30_011) -> dict[str, Tensor]:
    """Four noises, each as loud as `level` at its peak times 1, 0.8, 0.6, 0.4."""
    found = {}
    for seed, name in enumerate(STEMS):
        noise = kit.noise(2, length, seed)
        found[name] = noise / noise.abs().max() * level * (1 - 0.2 * seed)
    return found


def write(
    folder: Path,
    blocks: Mapping[str, Tensor],
    encoding: Encoding,
    *,
    clip: Clip = "track",
    exact_sum: bool = True,
    step: int = 7_001,
) -> tuple[Levels, dict[str, Tensor]]:
    """The levels and what libsndfile reads back."""
    suffix = FORMATS[encoding.format].suffixes[0]
    paths = {name: folder / f"{name}{suffix}" for name in blocks}
    length = next(iter(blocks.values())).shape[-1]
    with StemFileSet(paths, RATE, 2, encoding, clip=clip, exact_sum=exact_sum) as files:
        for start in range(0, length, step):
            files.write({name: wav[:, start : start + step] for name, wav in blocks.items()})
        levels = files.close()
    assert sorted(folder.iterdir()) == sorted(paths.values())
    heard = {
        name: torch.from_numpy(soundfile.read(path, dtype="float64", always_2d=True)[0]).T
        for name, path in paths.items()
    }
    return levels, heard


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("level", [0.3, 0.9, 2.7])
def test_stems_sum_to_the_mix_times_the_gain(bits: int, level: float, tmp_path: Path) -> None:
    told = stems(level)
    levels, heard = write(tmp_path, told, Encoding("wav", bits=bits))
    gain = levels.gains["drums"]
    assert set(levels.gains.values()) == {gain}
    assert (gain == 1) == (level < 1)
    mix = sum(wav.double() for wav in told.values()) * gain
    step = 2.0 ** (1 - bits)
    # Half a step by rounding; doubles carry everything else.
    assert (sum(heard.values()) - mix).abs().max() <= 0.5 * step * 1.000001
    for name, wav in told.items():
        assert (heard[name] - gain * wav.double()).abs().max() <= step
        assert levels.peaks[name] == wav.abs().max()
    loudest = max(float(wav.abs().max()) for wav in heard.values())
    if level > 1:
        assert 1 - 2 * step <= loudest <= 1  # what fits, no quieter


def test_rounding_each_alone_would_not_sum_that_well(tmp_path: Path) -> None:
    told = stems(0.5)
    _, heard = write(tmp_path, told, Encoding("wav"), exact_sum=False)
    mix = sum(wav.double() for wav in told.values())
    error = (sum(heard.values()) - mix).abs().max() * 2**15
    assert 1 < error <= 2  # four times half a step
    for name, wav in told.items():
        assert (heard[name] - wav).abs().max() * 2**15 <= 0.5


@pytest.mark.parametrize("clip", ["track", "none"])
def test_what_fits_is_not_touched(clip: Clip, tmp_path: Path) -> None:
    scale = 2.0**15
    told = {name: (wav * scale).round() / scale for name, wav in stems(0.99).items()}
    told["drums"][0, :2] = torch.tensor([-1.0, 1 - 1 / scale])  # both ends of 16 bits
    levels, heard = write(tmp_path, told, Encoding("flac"), clip=clip)
    assert set(levels.gains.values()) == {1.0}
    for name, wav in told.items():
        assert torch.equal(heard[name].float(), wav)


@pytest.mark.parametrize("clip", ["track", "none"])
def test_floats_keep_everything(clip: Clip, tmp_path: Path) -> None:
    told = stems(3.0)
    levels, heard = write(tmp_path, told, Encoding("wav", bits=32), clip=clip)
    assert set(levels.gains.values()) == {1.0}
    for name, wav in told.items():
        assert torch.equal(heard[name].float(), wav)


@pytest.mark.parametrize("clip", ["rescale", "clamp", "tanh"])
@pytest.mark.parametrize("bits", [24, 32])
def test_upstreams_ways_are_upstreams(clip: Clip, bits: int, tmp_path: Path) -> None:
    told = stems(1.5)
    levels, heard = write(tmp_path, told, Encoding("wav", bits=bits), clip=clip)
    for name, wav in told.items():
        expected = demucs.audio.prevent_clip(wav.clone(), mode=clip)
        # A step of 24 bits for rounding, one of float32 for dividing or multiplying.
        assert (heard[name] - expected).abs().max() <= 2**-23
        if clip == "rescale":
            assert levels.gains[name] == pytest.approx(1 / max(1.01 * levels.peaks[name], 1))


@pytest.mark.parametrize("mode", ["rescale", "clamp", "tanh", "none", None])
@pytest.mark.parametrize("level", [0.5, 0.995, 2.0])
def test_prevent_clip_is_upstreams(mode: str | None, level: float) -> None:
    wav = stems(level)["drums"]
    before = wav.clone()
    ours = prevent_clip(wav, mode=mode)
    torch.testing.assert_close(ours, demucs.audio.prevent_clip(wav.clone(), mode=mode))
    assert torch.equal(wav, before)


def test_prevent_clip_in_figures() -> None:
    found = prevent_clip(torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, -1.0]]) / 2.02)
    with pytest.raises(ValueError, match="must be rescale"):
        prevent_clip(torch.zeros(1, 1), mode="limit")
    with pytest.raises(ValueError, match="pass floats"):
        prevent_clip(torch.zeros(1, 1, dtype=torch.int16))
    assert prevent_clip(torch.zeros(2, 0)).shape == (2, 0)


def test_the_gain_lets_the_loudest_just_fit() -> None:
    top = 1 - 2**-15
    assert track_gain({"a": 1.0, "b": 0.1}, Encoding("wav")) == 1
    assert track_gain({"a": 0.1, "b": 2.0}, Encoding("wav")) == top / 2
    assert track_gain({"a": 2.0}, Encoding("mp3")) == top / 2
    assert track_gain({"a": 9.0}, Encoding("wav", bits=32)) == 1
    assert track_gain({}, Encoding("wav")) == 1


def test_rounding_together_keeps_silence_and_what_lies_on_the_grid() -> None:
    blocks = stems(0.5, 5000)
    silent = torch.zeros(2, 5000)
    whole = (blocks["bass"] * 2**15).round() / 2**15
    found = round_together({"a": blocks["drums"], "silent": silent, "whole": whole}, 16)
    assert torch.equal(found["silent"], silent)
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["a"], (blocks["drums"] * 2**15).round() / 2**15)


@pytest.mark.parametrize("step", [1_000, 30_011])
def test_the_size_of_blocks_changes_no_byte(step: int, tmp_path: Path) -> None:
    def files(folder: Path, step: int) -> list[bytes]:
        folder.mkdir()
        write(folder, stems(1.4), Encoding("flac", bits=24), step=step)
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    assert files(tmp_path / "a", step) == files(tmp_path / "b", 7_001)


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("limit", [1_000, 300_000])
def test_a_full_disk_leaves_none_of_the_files(clip: Clip, limit: int, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.wav" for name in STEMS}
    paths["bass"].write_bytes(b"precious")
    with (
        largest_file(limit),
        pytest.raises(AudioWriteError, match="cannot write .*drums"),
        StemFileSet(paths, RATE, 2, Encoding("wav"), clip=clip) as files,
    ):
        for _ in range(5):
            files.write(stems(1.5, 50_000))
    assert [path.name for path in tmp_path.iterdir()] == ["bass.wav"]
    assert paths["bass"].read_bytes() == b"precious"


@pytest.mark.parametrize("clip", ["track", "clamp"])
def test_an_error_leaves_none_of_the_files(clip: Clip, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.flac" for name in STEMS}
    for bad in (float("nan"), float("inf")):
        with (
            pytest.raises(AudioWriteError, match="not a finite number"),
            StemFileSet(paths, RATE, 2, Encoding("flac"), clip=clip) as files,
        ):
            files.write(stems(0.5))
            files.write({**stems(0.5, 3), "vocals": torch.full((2, 3), bad)})
        with pytest.raises(ValueError, match="closed"):
            files.write(stems(0.5))
    with pytest.raises(KeyError), StemFileSet(paths, RATE, 2, Encoding("flac"), clip=clip) as files:
        files.write(stems(0.5))
        raise KeyError
    with pytest.raises(AudioWriteError, match="create the folder"):
        StemFileSet({**paths, "x": tmp_path / "a" / "b.flac"}, RATE, 2, Encoding("flac"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_blocks_are_named(tmp_path: Path) -> None:
    path = {"a": tmp_path / "a.wav", "b": tmp_path / "b.wav"}
    block = torch.zeros(2, 10)
    for blocks, words in (
        ({"a": block}, "expected"),
        ({"a": block, "b": block[:, :5]}, "equally long"),
        ({"a": block, "b": block[:1]}, "2 channels"),
    ):
        with (
            pytest.raises(ValueError, match=words),
            StemFileSet(path, RATE, 2, Encoding()) as files,
        ):
            files.write(blocks)
    with pytest.raises(ValueError, match="track, rescale"):
        StemFileSet(path, RATE, 2, Encoding(), clip="limit")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_callers_blocks_are_copied_and_kept(tmp_path: Path) -> None:
    block = stems(0.5, 300_000)
    before = {name: wav.clone() for name, wav in block.items()}
    paths = {name: tmp_path / f"{name}.wav" for name in STEMS}
    with StemFileSet(paths, RATE, 2, Encoding("wav", bits=32), clip="none") as files:
        files.write(block)
        assert all(torch.equal(block[name], before[name]) for name in STEMS)
        for wav in block.values():
            wav.zero_()  # the caller's memory is free again
    heard = soundfile.read(paths["vocals"], dtype="float32")[0].T
    assert torch.equal(torch.from_numpy(heard), before["vocals"])


def test_memory_does_not_grow_with_the_track(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch\n"
        "from demucs_infer.audio.file_set import StemFileSet\n"
        "from demucs_infer.audio.formats import Encoding\n"
        "from tests.helpers.networks import peak_kilobytes\n"
        "peak = lambda: peak_kilobytes() // 1024\n"
        "block = torch.rand(2, 44100) * 1.5\n"
        "def write(seconds):\n"
        "    names = {n: f'{sys.argv[1]}/{n}.wav' for n in 'ab'}\n"
        "    with StemFileSet(names, 44100, 2, Encoding('wav')) as files:\n"
        "        for _ in range(seconds):\n"
        "            files.write({'a': block, 'b': block})\n"
        "write(3); before = peak(); write(90); print(peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True
    )
    # They are 64 MB of floats, twice; what may wait in queues is a few MB.
    assert int(run.stdout) < 32
