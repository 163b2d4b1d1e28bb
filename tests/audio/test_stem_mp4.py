"""A stem file: five tracks of one length, and their names where DJ software looks for them."""

import json
import struct
import subprocess
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.stem_mp4 import MIX, StemMp4
from demucs_infer.errors import AudioWriteError
from tests.audio.test_writer import by_ffmpeg, lag, largest_file, png
from tests.helpers import networks as kit

RATE = 44100
STEMS = ("drums", "bass", "other", "vocals")
LENGTH = 100_003


def tracks(level: float = 0.1) -> dict[str, Tensor]:
    """Four stems and their sum."""
    stems = {name: 10 * level * kit.noise(2, LENGTH, seed) for seed, name in enumerate(STEMS)}
    return {MIX: sum(stems.values(), torch.zeros(2, LENGTH)), **stems}


def write(path: Path, blocks: dict[str, Tensor], step: int = 9_999, **options: object) -> float:
    """The gain of the track."""
    with StemMp4(path, RATE, 2, STEMS, **options) as file:  # type: ignore[arg-type]
        for start in range(0, LENGTH, step):
            file.write({name: wav[:, start : start + step] for name, wav in blocks.items()})
        return file.close().gains[MIX]


def boxes(data: bytes) -> dict[str, bytes]:
    """The content of every box; the last of a name wins."""
    found, place = {}, 0
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        assert 8 <= size <= len(data) - place
        found[kind.decode("latin-1")] = data[place + 8 : place + size]
        place += size
    return found


@pytest.mark.parametrize("tags", [None, {"title": "Größe", "artist": "X"}])
@pytest.mark.parametrize("format", ["m4a", "alac"])
def test_names_and_colours_stand_in_moov_udta_stem(
    format: str, tags: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.stem.mp4"
    cover = png() if tags else None
    write(path, tracks(), encoding=Encoding(format), tags=tags, cover=cover)
    top = boxes(path.read_bytes())
    user = boxes(boxes(top["moov"])["udta"])
    content = json.loads(user["stem"])
    assert [stem["name"] for stem in content["stems"]] == ["Drums", "Bass", "Other", "Vocals"]
    assert [stem["color"] for stem in content["stems"]] == [
        "#009E73",
        "#D55E00",
        "#CC79A7",
        "#56B4E9",
    ]
    assert content["version"] == 1
    assert not content["mastering_dsp"]["compressor"]["enabled"]
    assert not content["mastering_dsp"]["limiter"]["enabled"]
    with av.open(str(path)) as file:
        assert (tags or {}).items() <= file.metadata.items()
        assert len(file.streams.video) == bool(cover)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", ["m4a", "alac"])
def test_five_tracks_of_one_length_and_only_the_mix_plays(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x.stem.mp4"
    write(path, tracks(), encoding=Encoding(format), cover=png())
    command = [kit.need("ffprobe"), "-v", "error", "-of", "json", "-select_streams", "a"]
    command += ["-show_entries", "stream=codec_name,duration_ts,time_base:disposition:stream_tags"]
    answer = subprocess.run([*command, str(path)], check=True, capture_output=True).stdout
    found = json.loads(answer)["streams"]
    assert [stream["duration_ts"] for stream in found] == [LENGTH] * 5
    assert {stream["time_base"] for stream in found} == {f"1/{RATE}"}
    assert {stream["codec_name"] for stream in found} == {"aac" if format == "m4a" else "alac"}
    assert [stream["disposition"]["default"] for stream in found] == [1, 0, 0, 0, 0]
    names = [stream["tags"]["handler_name"] for stream in found]
    assert names == ["Master", "Drums", "Bass", "Other", "Vocals"]


@pytest.mark.parametrize("level", [0.1, 1.0])
def test_alac_stems_sum_to_the_mix(level: float, tmp_path: Path) -> None:
    told = tracks(level)
    path = tmp_path / "x.stem.mp4"
    gain = write(path, told, encoding=Encoding("alac"))
    heard = [by_ffmpeg(path, 2, stream).double() for stream in range(5)]
    assert (gain == 1) == (level < 1)
    for wav, name in zip(heard, told):
        assert (wav - gain * told[name].double()).abs().max() <= 2**-15
    # Half a step in the sum of the stems, half in the mix, and the mix was a sum of floats.
    assert (sum(heard[1:]) - heard[0]).abs().max() <= 2**-15


def test_aac_tracks_keep_their_place_and_order(tmp_path: Path) -> None:
    told = tracks()
    path = tmp_path / "x.stem.mp4"
    write(path, told)
    for stream, name in enumerate(told):
        heard = by_ffmpeg(path, 2, stream)
        assert lag(heard, told[name]) == 0
        error = (heard[:, :LENGTH] - told[name]).square().mean() / told[name].square().mean()
        # White noise is the worst there is for a coder; another stem in its place gives 2.
        assert error < 0.5


def test_colours_and_other_names(tmp_path: Path) -> None:
    names = ["vocals", "piano", "bass", "rest"]
    with StemMp4(tmp_path / "x.stem.mp4", RATE, 2, names, colors={"rest": "#123456"}) as file:
        file.write({name: torch.zeros(2, 5000) for name in [MIX, *names]})
    content = boxes(boxes(boxes((tmp_path / "x.stem.mp4").read_bytes())["moov"])["udta"])["stem"]
    stems = json.loads(content)["stems"]
    assert [stem["name"] for stem in stems] == ["Vocals", "Piano", "Bass", "Rest"]
    assert stems[0]["color"] == "#56B4E9"
    assert stems[3]["color"] == "#123456"
    assert len({stem["color"] for stem in stems}) == 4


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.stem.mp4"
    blocks = tracks()
    with pytest.raises(AudioWriteError, match="not a finite"):
        write(path, {**blocks, "bass": torch.full((2, LENGTH), float("nan"))})
    for clip in ("track", "none"):
        with largest_file(50_000), pytest.raises(AudioWriteError, match="cannot write"):
            write(path, blocks, clip=clip)
    with pytest.raises(ValueError, match="4 different stems"):
        StemMp4(path, RATE, 2, ["drums", "bass"])
    with pytest.raises(ValueError, match="flac; use m4a"):
        StemMp4(path, RATE, 2, STEMS, encoding=Encoding("flac"))
    with pytest.raises(AudioWriteError, match="resample"):
        StemMp4(path, 44099, 2, STEMS)
    assert list(tmp_path.iterdir()) == []
