"""Audio that is encoded into bytes which are sent before the rest is known."""

import io

import pytest
import soundfile
import torch

from demucs_infer.audio.encoders.lame import has_lame
from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.stream_encoder import STREAM_FORMATS, StreamEncoder
from demucs_infer.audio.writer import AudioWriter
from demucs_infer.errors import AudioWriteError
from tests.helpers.audio_signals import make_noise

BLOCK = 20_000


def encode(encoding: Encoding, wav: torch.Tensor, rate: int) -> list[bytes]:
    """Return the bytes that each block gives, then the last ones."""
    encoder = StreamEncoder(encoding, rate, len(wav), wav.shape[-1])
    return [*(encoder.encode(block) for block in wav.split(BLOCK, -1)), encoder.finish()]


def decode(data: bytes) -> torch.Tensor:
    return torch.cat(list(AudioReader(io.BytesIO(data)).blocks()), -1)


def write(encoding: Encoding, wav: torch.Tensor, rate: int) -> bytes:
    """Return the bytes of a file."""
    file = io.BytesIO()
    with AudioWriter(file, rate, len(wav), format=encoding.format) as writer:
        writer.write(wav)
    return file.getvalue()


@pytest.mark.parametrize("format", STREAM_FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 16000, 8000])
@pytest.mark.parametrize("length", [5000, 11_520, 11_521])
def test_stream_decodes_to_samples_of_file(
    format: str, channels: int, rate: int, length: int
) -> None:
    encoding = Encoding(format)
    wav = 0.5 * make_noise(channels, length, 3)
    stream = b"".join(encode(encoding, wav, rate))
    expected = decode(write(encoding, wav, rate))
    decoded = decode(stream)
    assert decoded.shape == expected.shape
    assert torch.equal(decoded, expected)
    assert soundfile.info(io.BytesIO(stream)).frames == expected.shape[-1]


@pytest.mark.parametrize("format", STREAM_FORMATS)
def test_bytes_come_with_each_block_and_are_never_rewritten(format: str) -> None:
    wav = 0.5 * make_noise(2, 5 * BLOCK, 3)
    pieces = encode(Encoding(format), wav, 44100)
    assert all(len(piece) > BLOCK // 4 for piece in pieces[:-1])
    so_far = decode(b"".join(pieces[:3]))
    assert so_far.shape[-1] > 2 * BLOCK


@pytest.mark.parametrize(
    ("format", "rate", "message"),
    [
        ("opus", 48000, "cannot stream opus: expected one of wav, flac, mp3"),
        ("mp3", 96000, "unsupported sample rate for mp3: 96000 Hz"),
    ],
)
def test_format_that_cannot_be_streamed_is_refused(format: str, rate: int, message: str) -> None:
    with pytest.raises(AudioWriteError, match=message):
        StreamEncoder(Encoding(format), rate, 2, 1000)


@pytest.mark.skipif(not has_lame(), reason="needs lameenc")
def test_mp3_without_lameenc_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demucs_infer.audio.stream_encoder.has_lame", lambda: False)
    wav = 0.5 * make_noise(2, 50_000, 3)
    decoded = decode(b"".join(encode(Encoding("mp3"), wav, 44100)))
    assert 50_000 <= decoded.shape[-1] < 50_000 + 3 * 1152
