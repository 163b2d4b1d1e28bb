"""A stem file has five tracks of one length, and names where DJ software expects them."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from demucs_infer.audio.formats import Encoding
from demucs_infer.audio.stem_mp4 import MIX, StemMp4
from demucs_infer.errors import AudioWriteError
from demucs_infer.options import Clip
from tests.audio.test_gain import write_stems
from tests.audio.test_writer import decode_with_ffmpeg, limit_file_size, make_png, measure_lag
from tests.helpers.audio_signals import make_noise
from tests.helpers.oracles import require_tool

RATE = 44100
STEMS = ("drums", "bass", "other", "vocals")
LENGTH = 100_003


def tracks(level: float = 0.1) -> dict[str, Tensor]:
    """Return four stems and their sum."""
    stems = {name: 10 * level * make_noise(2, LENGTH, seed) for seed, name in enumerate(STEMS)}
    return {MIX: sum(stems.values(), torch.zeros(2, LENGTH)), **stems}


def write(
    path: Path,
    blocks: dict[str, Tensor],
    step: int = 9_999,
    *,
    clip: Clip = "track",
    encoding: Encoding | None = None,
    **options: Any,
) -> float:
    """Write the stems as one file, on the road that the package takes; return their gain."""
    encoding = encoding or Encoding("m4a")
    pieces = (
        {name: wav[:, start : start + step] for name, wav in blocks.items()}
        for start in range(0, LENGTH, step)
    )
    levels = write_stems(
        dict.fromkeys(STEMS, path),
        pieces,
        encoding,
        clip=clip,
        exact_sum=False,
        open_sink=lambda: StemMp4(path, RATE, 2, STEMS, encoding=encoding, **options),
        mix_name=MIX,
    )
    return levels.gains["drums"]


def boxes(data: bytes) -> dict[str, bytes]:
    """Return the content of every box by name, the last one if a name is repeated."""
    contents, position = {}, 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        assert 8 <= size <= len(data) - position
        contents[kind.decode("latin-1")] = data[position + 8 : position + size]
        position += size
    return contents


@pytest.mark.parametrize("tags", [None, {"title": "Größe", "artist": "X"}])
@pytest.mark.parametrize("format", ["m4a", "alac"])
def test_names_and_colors_are_in_the_stem_box(
    format: str, tags: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.stem.mp4"
    cover = make_png() if tags else None
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
def test_five_tracks_have_one_length_and_the_mix_is_default(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x.stem.mp4"
    write(path, tracks(), encoding=Encoding(format), cover=make_png())
    command = [require_tool("ffprobe"), "-v", "error", "-of", "json", "-select_streams", "a"]
    command += ["-show_entries", "stream=codec_name,duration_ts,time_base:disposition:stream_tags"]
    answer = subprocess.run([*command, str(path)], check=True, capture_output=True).stdout
    streams = json.loads(answer)["streams"]
    assert [stream["duration_ts"] for stream in streams] == [LENGTH] * 5
    assert {stream["time_base"] for stream in streams} == {f"1/{RATE}"}
    assert {stream["codec_name"] for stream in streams} == {"aac" if format == "m4a" else "alac"}
    assert [stream["disposition"]["default"] for stream in streams] == [1, 0, 0, 0, 0]
    names = [stream["tags"]["handler_name"] for stream in streams]
    assert names == ["Master", "Drums", "Bass", "Other", "Vocals"]


@pytest.mark.parametrize("level", [0.1, 1.0])
def test_alac_stems_sum_to_the_mix(level: float, tmp_path: Path) -> None:
    original = tracks(level)
    path = tmp_path / "x.stem.mp4"
    gain = write(path, original, encoding=Encoding("alac"))
    decoded = [decode_with_ffmpeg(path, 2, stream).double() for stream in range(5)]
    assert (gain == 1) == (level < 1)
    for wav, name in zip(decoded, original):
        assert (wav - gain * original[name].double()).abs().max() <= 2**-15
    # Half a step in the sum of the stems, and half a step in the mix.
    assert (sum(decoded[1:]) - decoded[0]).abs().max() <= 2**-15


def test_aac_tracks_keep_position_and_order(tmp_path: Path) -> None:
    original = tracks()
    path = tmp_path / "x.stem.mp4"
    write(path, original)
    for stream, name in enumerate(original):
        decoded = decode_with_ffmpeg(path, 2, stream)
        assert measure_lag(decoded, original[name]) == 0
        error = (decoded[:, :LENGTH] - original[name]).square().mean()
        # White noise is the worst case for a codec; another stem in its place gives 2.
        assert error < 0.5 * original[name].square().mean()


def test_colors_and_stem_names_can_be_chosen(tmp_path: Path) -> None:
    names = ["vocals", "piano", "bass", "rest"]
    with StemMp4(tmp_path / "x.stem.mp4", RATE, 2, names, colors={"rest": "#123456"}) as file:
        file.write({name: torch.zeros(2, 5000) for name in [MIX, *names]})
    content = boxes(boxes(boxes((tmp_path / "x.stem.mp4").read_bytes())["moov"])["udta"])["stem"]
    stems = json.loads(content)["stems"]
    assert [stem["name"] for stem in stems] == ["Vocals", "Piano", "Bass", "Rest"]
    assert stems[0]["color"] == "#56B4E9"
    assert stems[3]["color"] == "#123456"
    assert len({stem["color"] for stem in stems}) == 4


def test_error_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.stem.mp4"
    blocks = tracks()
    with pytest.raises(AudioWriteError, match="not a finite"):
        write(path, {**blocks, "bass": torch.full((2, LENGTH), float("nan"))})
    for clip in ("track", "none"):
        with limit_file_size(50_000), pytest.raises(AudioWriteError, match="cannot write"):
            write(path, blocks, clip=clip)
    with pytest.raises(ValueError, match="has 4 stems, not 2"):
        StemMp4(path, RATE, 2, ["drums", "bass"])
    with pytest.raises(ValueError, match="format flac"):
        StemMp4(path, RATE, 2, STEMS, encoding=Encoding("flac"))
    with pytest.raises(AudioWriteError, match="resample"):
        StemMp4(path, 44099, 2, STEMS)
    assert list(tmp_path.iterdir()) == []
