"""Parts read from the middle of a file equal those of a complete decoding."""

from pathlib import Path

import pytest
import torch

from demucs_infer.audio.formats import FORMATS
from demucs_infer.audio.parts import read_part
from demucs_infer.audio.reader import AudioReader
from demucs_infer.audio.writer import AudioWriter
from tests.helpers.audio_signals import make_noise

RATE = 8000


KINDS = {name: {} for name in FORMATS if name != "stem.mp4"} | {
    "mp3 vbr": {"quality": 2},
    "mp3 64": {"bitrate": 64},
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    format, options = request.param.split()[0], KINDS[request.param]
    path = tmp_path_factory.mktemp("parts") / f"noise.{format}"
    rate = FORMATS[format].rate_for(RATE)
    with AudioWriter(path, rate, 2, format=format, **options) as writer:
        writer.write(make_noise(2, 6 * rate, 1) * 0.3)
    return path


@pytest.mark.parametrize("seconds", [0, 0.3, 2.123, 5.5])
def test_part_equals_that_of_complete_decoding(path: Path, seconds: float) -> None:
    reader = AudioReader(path)
    complete = torch.cat(list(reader.blocks()), -1)
    rate = reader.info.sample_rate
    start, stop = round(seconds * rate), round((seconds + 0.4) * rate)
    part = read_part(path, start, stop)
    assert part.shape == complete[:, start:stop].shape
    # Opus predicts from earlier frames; after half a second the difference is inaudible.
    atol = 1e-3 if path.suffix == ".opus" else 0
    assert torch.allclose(part, complete[:, start:stop], rtol=0, atol=atol)


def test_part_beyond_the_end_is_short_or_empty(path: Path) -> None:
    rate = AudioReader(path).info.sample_rate
    assert 0 < read_part(path, round(5.9 * rate), 7 * rate).shape[-1] <= 0.2 * rate
    assert read_part(path, 60 * rate, 61 * rate).shape == (2, 0)
