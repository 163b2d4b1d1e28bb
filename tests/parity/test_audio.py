"""The names of upstream's `demucs.audio` have its signatures and give its numbers.

Upstream's `AudioFile` calls the programs ffmpeg and ffprobe.
"""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import demucs.audio as upstream
import pytest
import soundfile
import torch
from torch import Tensor

from demucs_infer import audio
from demucs_infer.errors import AudioReadError, AudioWriteError
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_tool

ROOT = Path(__file__).parents[2]
RATE = 44100
FRAMES = 30_011
PUBLIC = (
    "AudioFile",
    "as_dtype_pcm",
    "convert_audio",
    "convert_audio_channels",
    "encode_ffmpeg",
    "encode_mp3",
    "encode_wav",
    "f32_pcm",
    "i16_pcm",
    "prevent_clip",
    "save_audio",
)


def test_package_publishes_upstreams_names() -> None:
    assert sorted(audio.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(audio))
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        audio.missing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_pyav() -> None:
    code = "import sys, demucs_infer.audio; sys.exit(bool({'torch', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Return name, default and kind of every parameter."""
    return [
        (parameter.name, parameter.default, parameter.kind)
        for parameter in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "AudioFile"])
def test_functions_have_upstreams_parameters(name: str) -> None:
    assert parameters(getattr(audio, name)) == parameters(getattr(upstream, name))


@pytest.mark.parametrize("name", ["__init__", "__len__", "read", "channels", "samplerate"])
def test_audio_file_has_upstreams_parameters(name: str) -> None:
    assert parameters(getattr(audio.AudioFile, name)) == parameters(
        getattr(upstream.AudioFile, name)
    )


WAVES = {
    "quiet floats": make_noise(2, 500) * 0.3,
    "floats beyond full scale": make_noise(2, 500) * 4,
    "float64": make_noise(2, 500).double(),
    "int16": (make_noise(2, 500) * 9000).short(),
    "no samples": torch.zeros(2, 0),
}


@pytest.mark.parametrize("wav", WAVES.values(), ids=WAVES)
@pytest.mark.parametrize("name", ["i16_pcm", "f32_pcm"])
def test_pcm_conversion_equals_upstreams(name: str, wav: Tensor) -> None:
    before = wav.clone()
    converted = getattr(audio, name)(wav)
    expected = getattr(upstream, name)(wav.clone())
    assert converted.dtype == expected.dtype
    assert torch.equal(converted, expected)
    assert torch.equal(wav, before), "upstream clamps in place"


@pytest.mark.parametrize("wav", WAVES.values(), ids=WAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_as_dtype_pcm_equals_upstreams(dtype: torch.dtype, wav: Tensor) -> None:
    converted, expected = audio.as_dtype_pcm(wav, dtype), upstream.as_dtype_pcm(wav.clone(), dtype)
    assert converted.dtype == expected.dtype
    assert torch.equal(converted, expected)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("to_channels", [1, 2, 6])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["track", "batch"])
def test_convert_audio_channels_equals_upstreams(
    channels: int, to_channels: int, shape: tuple[int, ...]
) -> None:
    wav = make_noise(channels * (3 if shape else 1), 500).reshape(*shape, channels, 500)
    if 1 < channels < to_channels:
        for convert in (audio.convert_audio_channels, upstream.convert_audio_channels):
            with pytest.raises(ValueError, match="channels"):
                convert(wav, to_channels)
        return
    expected = upstream.convert_audio_channels(wav, to_channels)
    assert torch.equal(audio.convert_audio_channels(wav, to_channels), expected)


@pytest.mark.parametrize("mode", ["rescale", "clamp", "tanh", "none", None])
@pytest.mark.parametrize("level", [0.3, 1.0, 4.0])
def test_prevent_clip_equals_upstreams(mode: str | None, level: float) -> None:
    wav = make_noise(2, 500)
    wav = wav / wav.abs().max() * level
    # One division by a float32 or a float64 number: a step of float32.
    torch.testing.assert_close(
        audio.prevent_clip(wav, mode), upstream.prevent_clip(wav, mode), rtol=2e-7, atol=0
    )


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of three stereo streams."""
    require_tool("ffprobe")
    folder = tmp_path_factory.mktemp("upstream")
    command = [require_tool("ffmpeg"), "-nostdin", "-v", "error"]
    for index in range(3):
        # A moving average: FFmpeg's resampler and this package's agree below the cut-off only.
        smooth = torch.nn.functional.avg_pool1d(make_noise(2, FRAMES, index), 41, 1, 20) / 2
        part = folder / f"{index}.wav"
        soundfile.write(part, smooth.T.numpy(), RATE, subtype="PCM_16")
        command += ["-i", str(part)]
    path = folder / "song.m4a"  # its time stamps count samples, so that ffmpeg's seek is exact
    maps = [word for index in range(3) for word in ("-map", str(index))]
    subprocess.run([*command, *maps, "-c:a", "alac", str(path)], check=True)
    return path


def test_audio_file_describes_the_file_as_upstream(song: Path) -> None:
    file, upstream_file = audio.AudioFile(song), upstream.AudioFile(song)
    assert len(file) == len(upstream_file) == 3
    assert repr(file) == repr(upstream_file)
    assert file.duration == pytest.approx(upstream_file.duration, abs=1e-3)
    for stream in range(3):
        assert file.channels(stream) == upstream_file.channels(stream) == 2
        assert file.samplerate(stream) == upstream_file.samplerate(stream) == RATE
    for stream_info, expected in zip(file.info["streams"], upstream_file.info["streams"]):
        assert stream_info.items() <= expected.items()
    for key in ("filename", "nb_streams"):
        assert file.info["format"][key] == upstream_file.info["format"][key]
    assert float(file.info["format"]["duration"]) == file.duration


READS: dict[str, dict[str, Any]] = {
    "everything": {},
    "one stream": {"streams": 1},
    "last stream": {"streams": -1},
    "slice of streams": {"streams": slice(1, 3)},
    "list of streams": {"streams": [2, 0]},
    "mono": {"streams": 0, "channels": 1},
    "stereo": {"streams": 0, "channels": 2},
    "part": {"seek_time": 0.25, "duration": 0.1},
    "duration between samples": {"duration": 0.100_001},
    "duration beyond the end": {"duration": 60.0},
}


@pytest.mark.parametrize("arguments", READS.values(), ids=READS)
def test_audio_file_reads_upstreams_samples(song: Path, arguments: dict[str, Any]) -> None:
    expected = upstream.AudioFile(song).read(**arguments)
    read = audio.AudioFile(song).read(**arguments)
    assert read.dtype == torch.float32
    assert torch.equal(read, expected)


@pytest.mark.parametrize("rate", [22050, 32000, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_file_resamples_a_part_as_upstream(song: Path, rate: int, channels: int) -> None:
    arguments: dict[str, Any] = {"seek_time": 0.2, "duration": 0.25, "samplerate": rate}
    expected = upstream.AudioFile(song).read(channels=channels, **arguments)
    read = audio.AudioFile(song).read(channels=channels, **arguments)
    assert read.shape == expected.shape == (3, channels, int(0.25 * rate))
    # Away from the beginning, which both resamplers extrapolate; another place would be 0 dB.
    middle = slice(rate // 50, None)
    error = (read - expected)[..., middle].square().mean() / expected[..., middle].square().mean()
    assert error < 1e-3


def test_audio_file_resamples_to_upstreams_length(song: Path) -> None:
    for rate in (22050, 48000):
        expected = upstream.AudioFile(song).read(samplerate=rate).shape[-1]
        # The end is rounded up or down.
        assert abs(audio.AudioFile(song).read(samplerate=rate).shape[-1] - expected) <= 1


@pytest.mark.parametrize(
    "options",
    [{}, {"bits_per_sample": 24}, {"as_float": True}],
    ids=["16 bits", "24 bits", "float"],
)
def test_encode_wav_writes_upstreams_samples(options: dict[str, Any], tmp_path: Path) -> None:
    wav = make_noise(2, 5000) * 2
    before = wav.clone()
    audio.encode_wav(wav, tmp_path / "x.wav", RATE, **options)
    upstream.encode_wav(wav.clone(), tmp_path / "upstream.wav", RATE, **options)
    assert torch.equal(wav, before)
    file, upstream_file = (
        soundfile.SoundFile(tmp_path / name) for name in ("x.wav", "upstream.wav")
    )
    with file, upstream_file:
        assert (file.subtype, file.samplerate) == (upstream_file.subtype, upstream_file.samplerate)
        difference = abs(file.read() - upstream_file.read()).max()
    # Upstream rounds to zero, and its full scale is a step lower: two steps.
    steps = {"PCM_16": 2**-15, "PCM_24": 2**-23, "FLOAT": 0.0}
    assert difference <= 2 * steps[file.subtype]


def test_encode_wav_refuses_other_depths(tmp_path: Path) -> None:
    for encode in (audio.encode_wav, upstream.encode_wav):
        with pytest.raises(ValueError, match="bits_per_sample"):
            encode(torch.zeros(2, 10), tmp_path / "x.wav", RATE, bits_per_sample=32)


@pytest.mark.parametrize("is_float", [True, False], ids=["floats", "int16"])
def test_encode_mp3_writes_upstreams_samples(is_float: bool, tmp_path: Path) -> None:
    smooth = torch.nn.functional.avg_pool1d(make_noise(2, FRAMES), 41, 1, 20) / 2
    wav = smooth if is_float else (smooth * 32767).short()
    audio.encode_mp3(wav, tmp_path / "x.mp3", RATE, bitrate=128, quality=5)
    upstream.encode_mp3(wav.clone(), tmp_path / "upstream.mp3", RATE, bitrate=128, quality=5)
    file, upstream_file = (audio.AudioFile(tmp_path / name) for name in ("x.mp3", "upstream.mp3"))
    read, expected = file.read(streams=0), upstream_file.read(streams=0)
    assert read.shape == (2, FRAMES)
    # Upstream's file does not declare the encoder's delay: 576 samples, and 529 of the decoder.
    expected = expected[:, 1105 : 1105 + FRAMES]
    # Floats are rounded to other integers, which changes some decisions of the encoder.
    assert (read - expected).square().mean() < 1e-2 * expected.square().mean()


def test_save_audio_raises_upstreams_kinds_of_errors_too(tmp_path: Path) -> None:
    wav = make_noise(2, 1000)
    for save in (upstream.save_audio, audio.save_audio):
        with pytest.raises(FileNotFoundError):
            save(wav, tmp_path / "absent" / "a.wav", RATE)
        with pytest.raises(ValueError, match="suffix"):
            save(wav, tmp_path / "a.xyz", RATE)
    with pytest.raises(AudioWriteError, match="create the folder first$"):
        audio.save_audio(wav, tmp_path / "absent" / "a.wav", RATE)
    with pytest.raises(AudioWriteError, match="^unsupported suffix of 'a.xyz'"):
        audio.save_audio(wav, tmp_path / "a.xyz", RATE)


def test_unreadable_file_is_upstreams_kind_of_error_too(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    for name in ("none.wav", "text.wav"):
        for use in (len, repr, audio.AudioFile.read, audio.AudioFile.samplerate):
            with pytest.raises(AudioReadError, match="^cannot read ") as caught:
                use(audio.AudioFile(tmp_path / name))  # type: ignore[operator]
            error = pickle.loads(pickle.dumps(caught.value))
            assert isinstance(error, subprocess.CalledProcessError)
            assert str(error) == str(caught.value)
            assert (error.returncode, error.stderr) == (1, None)
            assert str(tmp_path / name) in error.cmd


def test_nothing_is_read_beyond_the_end(tmp_path: Path) -> None:
    require_tool("ffmpeg")
    path = tmp_path / "a.wav"
    soundfile.write(path, make_noise(2, FRAMES).T.numpy(), RATE)
    for kind in (upstream.AudioFile, audio.AudioFile):
        assert kind(path)._audio_streams == [0]
        for arguments in ({}, {"duration": 1.0}, {"samplerate": 22050}):
            assert kind(path).read(seek_time=5, streams=0, **arguments).shape == (2, 0)
        assert kind(path).read(seek_time=5).shape == (1, 2, 0)
