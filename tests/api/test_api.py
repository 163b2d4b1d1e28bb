"""What people hold: any input, any thread, any stem, events in order, files in flat memory."""

import dataclasses
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import demucs_infer
from demucs_infer import (
    Audio,
    AudioReadError,
    AudioWriteError,
    BagOfModels,
    ChunkProcessed,
    ConfigError,
    DemucsError,
    InferenceOutput,
    OutputOptions,
    SeparatedFiles,
    Separator,
    Stage,
)
from demucs_infer.htdemucs import HTDemucs
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, DictModel, RecordingModel, ScaleModel, randomize

RATE = 8000  # of the tiny models
MIX = make_noise(2, 4 * RATE)

# The level is taken away and given back: a few roundings of float32, and upstream adds the mean,
# here below 1e-3, to every stem.
CLOSE = {"rtol": 0.0, "atol": 1e-3}


def tiny(**parameters: Any) -> Separator:
    return Separator.from_model(ScaleModel(), **{"shifts": 0, **parameters})


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "song.wav"
    soundfile.write(path, MIX.T.numpy(), RATE, subtype="FLOAT")
    return path


INPUTS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": Path.read_bytes,
    "file object": lambda path: io.BytesIO(path.read_bytes()),
    "tensor": lambda path: MIX,
    "float64": lambda path: MIX.double(),
    "array (C, T)": lambda path: MIX.numpy(),
    "array (T, C)": lambda path: MIX.numpy().T,
    "audio": lambda path: Audio(MIX, RATE),
    "int32": lambda path: (MIX.double() * 2**31).round().to(torch.int32),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_input_gives_the_same_stems(kind: str, wav: Path) -> None:
    expected = tiny().run(MIX)
    output = tiny().run(INPUTS[kind](wav))
    assert output.sample_rate == RATE
    assert list(output) == ["drums", "bass"]
    for stem, sound in expected.outputs.items():
        assert output[stem].shape == MIX.shape
        # An int32 has 31 bits, a float32 24: half a step of the latter, at most.
        torch.testing.assert_close(output[stem], sound, rtol=0, atol=2.0**-24)


def test_int16_is_the_same_within_half_a_step() -> None:
    output = tiny().run((MIX * 2**15).round().to(torch.int16).numpy())
    torch.testing.assert_close(output["drums"], tiny().run(MIX)["drums"], rtol=0, atol=2.0**-16)


def test_a_network_that_scales_gives_the_scaled_track() -> None:
    output = tiny().run(MIX)
    assert output.mixture is not None
    assert torch.equal(output.mixture, MIX)
    torch.testing.assert_close(output["drums"], 0.25 * MIX, **CLOSE)
    torch.testing.assert_close(output["bass"], 0.75 * MIX, **CLOSE)


@pytest.mark.parametrize("data", [MIX[0], MIX[:1]])
def test_mono_becomes_the_channels_of_the_model(data: torch.Tensor) -> None:
    output = tiny().run(data)
    assert output["bass"].shape == MIX.shape
    assert torch.equal(output["bass"][0], output["bass"][1])


def test_a_model_of_one_channel_hears_the_mean_and_says_so(wav: Path) -> None:
    separator = Separator.from_model(ScaleModel(audio_channels=1), shifts=0)
    for audio in (MIX, wav):
        *events, output = separator.stream(audio)
        assert isinstance(output, InferenceOutput)
        assert Stage.Started("downmix_to_mono") in events
        assert torch.equal(output.mixture, MIX.mean(0, keepdim=True))
        torch.testing.assert_close(output["bass"], 0.75 * output.mixture, **CLOSE)


def test_more_channels_than_the_model_has_are_left_out_with_a_warning() -> None:
    *events, output = tiny().stream(make_noise(6, RATE))
    assert "the first 2 are used" in "".join(map(repr, events))
    assert isinstance(output, InferenceOutput)
    assert torch.equal(output.mixture, make_noise(6, RATE)[:2])


@pytest.mark.parametrize("rate", [4000, 16_000, 44_100])
def test_another_rate_is_converted(rate: int) -> None:
    time = torch.arange(rate) / rate
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * time).expand(2, -1)
    outputs = [tiny().run(tone, rate), tiny().run(Audio(tone, rate))]
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)
    for output in outputs:
        assert output["bass"].shape == (2, RATE)
        # Away from the ends, where the filter hears silence beyond: its ripple.
        inner = slice(200, -200)
        torch.testing.assert_close(
            output["bass"][0, inner], 0.75 * expected[inner], rtol=0, atol=5e-3
        )


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.zeros((2, 0)), None, "empty"),
        (np.full((2, 99), np.nan), None, "NaN"),
        (np.zeros((100, 100)), None, "channels"),
        (np.zeros((1, 2, 100)), None, "one by one"),
        (MIX, 0, "100 to 768000"),
        (Audio(MIX, RATE), 2 * RATE, "audio is at 8000"),
        ("song.wav", RATE, "a file has its own"),
        (MIX[:, :3], 44_100, "less than one"),
        (3, None, "pass a path"),
    ],
)
def test_what_is_no_track_is_refused(audio: Any, rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().run(audio, rate)


def test_files_that_are_no_tracks_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, np.array([0.0, np.nan, 0.0]), RATE, subtype="FLOAT")
    strict = tiny().open_audio(bad, strict=True)
    for audio in (tmp_path / "absent.wav", b"", b"text", io.BytesIO(b"RIFF"), strict, tmp_path):
        with pytest.raises(DemucsError):
            tiny().run(audio)
    *events, output = tiny().stream(bad)
    assert "not finite" in "".join(map(repr, events))
    assert torch.isfinite(output["bass"]).all()


@pytest.mark.parametrize("length", [1, 2, 99])
def test_silence_and_tiny_tracks_have_stems(length: int) -> None:
    output = tiny().run(torch.zeros(2, length))
    assert torch.equal(output["drums"], torch.zeros(2, length))
    assert torch.isfinite(tiny().run(torch.ones(2, length))["drums"]).all()


def test_nothing_of_the_callers_is_touched() -> None:
    model = RecordingModel()
    model.train()
    data, array = MIX.clone(), MIX.numpy().copy()
    separator = Separator.from_model(model)
    for audio in (data, array):
        output = separator.run(audio)
        assert output.mixture is not None
        output.mixture.zero_()  # their memory is theirs, and ours ours
        output["drums"].zero_()
    assert torch.equal(data, MIX)
    assert np.array_equal(array, MIX.numpy())
    assert model.training
    assert model.gains.device.type == "cpu"
    assert all(model.modes)
    assert not torch.is_inference_mode_enabled()


def test_stems_are_ordinary_tensors_of_their_own() -> None:
    output = tiny().run(MIX)
    for sound in output.outputs.values():
        assert not sound.is_inference()
        assert sound.untyped_storage().nbytes() == 4 * sound.numel()


ORDER = [
    *("normalize", "/normalize"),
    "ChunkProcessed",
    *("stitch", "/stitch"),
    *("collect_outputs", "/collect_outputs"),
    *("derive_stems", "/derive_stems"),
    "InferenceOutput",
]


def names(items: list[Any]) -> list[str]:
    said = []
    for item in items:
        stage = getattr(item, "stage", type(item).__name__)
        said.append(f"/{stage}" if isinstance(item, Stage.Completed) else stage)
    return said


def test_events_come_in_order_and_the_output_last(wav: Path) -> None:
    separator = tiny(derive=["rest=mixture-drums"])
    items = list(separator.stream(MIX))
    chunks = [item for item in items if isinstance(item, ChunkProcessed)]
    assert list(dict.fromkeys(names(items))) == ORDER
    assert [chunk.batch_index for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert {chunk.total_batches for chunk in chunks} == {len(chunks)}
    assert chunks[-1].fraction == 1.0
    from_file = list(separator.stream(wav))
    assert names(from_file) == ["load", "/load", *names(items)]
    assert "derive_stems" not in names(list(tiny().stream(MIX)))
    calls: list[dict[str, object]] = []
    separator.update_parameter(callback=calls.append)  # who listens changes nothing
    assert names(list(separator.stream(MIX))) == names(items)
    assert len(calls) == 2 * len(chunks)
    last, run = items[-1], separator.run(MIX)
    assert isinstance(last, InferenceOutput)
    assert all(torch.equal(last[stem], run[stem]) for stem in run)


def test_no_inference_mode_leaks_and_closing_ends_the_work() -> None:
    model = RecordingModel()
    stream = Separator.from_model(model).stream(make_noise(2, 60 * RATE))
    before = threading.active_count()
    seen = 0
    for item in stream:
        assert not torch.is_inference_mode_enabled()
        seen += isinstance(item, ChunkProcessed)
        if seen == 2:
            break
    stream.close()
    assert len(model.seen) <= 3
    assert threading.active_count() == before


class Counting(ScaleModel):
    """Counts its calls, and answers something else than its neighbour."""

    def __init__(self, factor: float) -> None:
        super().__init__(gains=(0.25 * factor, 0.5 * factor))
        self.calls = 0

    def forward(self, mix: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(mix)


def test_only_the_members_that_are_heard_are_run() -> None:
    members = [Counting(1), Counting(2)]
    bag = BagOfModels(members, [[1.0, 0.0], [0.0, 1.0]])
    everything = Separator.from_model(bag, shifts=2).run(MIX)
    calls = members[0].calls
    assert members[1].calls == calls > 0
    bass = Separator.from_model(bag, shifts=2, stems=["bass"]).run(MIX)
    assert list(bass) == ["bass"]
    assert torch.equal(bass["bass"], everything["bass"])
    assert [member.calls for member in members] == [calls, 2 * calls]


def test_derived_stems_come_after_those_of_the_model() -> None:
    output = tiny(derive=["rest=mixture-drums", "both=drums+bass"]).run(MIX)
    assert list(output) == ["drums", "bass", "rest", "both"]
    assert output.mixture is not None
    assert torch.equal(output["rest"], output.mixture - output["drums"])
    assert torch.equal(output["both"], output["drums"] + output["bass"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"overlap": 1.0}, "overlap"),
        ({"shifts": -1}, "shifts"),
        ({"segment": 0}, "segment"),
        ({"stems": ["vocal"]}, "drums, bass"),
        ({"derive": ["x=y"]}, "drums, bass"),
        ({"precision": "int8"}, "fp32"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        ({"device": "meta"}, "computes nothing"),
        ({"jobs": 1.5}, "integer"),
    ],
)
def test_a_wrong_parameter_is_refused_before_any_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)
    separator = tiny()
    with pytest.raises(ValueError, match=message):
        separator.update_parameter(**wrong)
    assert torch.equal(separator.run(MIX)["bass"], tiny().run(MIX)["bass"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_a_device_that_is_absent_is_named() -> None:
    with pytest.raises(ConfigError, match="cuda:1"):
        tiny(device="cuda:1")


def test_a_wrong_parameter_is_found_before_a_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Separator("no such model", overlap=2)


def test_parameters_can_be_changed_between_tracks() -> None:
    model = RecordingModel()
    separator = Separator.from_model(model, shifts=0)
    first = separator.run(MIX)
    separator.update_parameter(shifts=2, overlap=0.5, stems=["bass"], segment=0.5)
    assert list(separator.run(MIX)) == ["bass"]
    assert {shape[-1] for shape in model.seen} >= {RATE, RATE // 2}
    separator.update_parameter(shifts=0, overlap=0.25, segment=None, stems=None)
    assert torch.equal(separator.run(MIX)["drums"], first["drums"])


@pytest.mark.parametrize("kind", ["ScaleModel", "HTDemucs"])
def test_the_same_track_gives_the_same_stems_whatever_else_runs(kind: str) -> None:
    network = ScaleModel() if kind == "ScaleModel" else randomize(HTDemucs(**TINY[kind]))
    separator = Separator.from_model(network, shifts=2)
    tracks = [make_noise(2, RATE + 997 * index, seed=index) for index in range(8)]
    serial = [separator.run(track) for track in tracks]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(separator.run, reversed(tracks)))[::-1]
    for one, other in zip(serial, parallel, strict=True):
        assert all(torch.equal(one[stem], other[stem]) for stem in one)


def test_keyword_arguments_and_queries_reach_the_network() -> None:
    model = DictModel()
    separator = Separator.from_model(model, shifts=0)
    plain = separator.run(MIX, model_kwargs={"query": 5})
    assert set(model.queries) == {5}
    asked = separator.run(MIX, queries={"loud": {"query": 1}, "soft": {"query": 2}})
    assert list(asked) == ["loud_drums", "loud_bass", "soft_drums", "soft_bass"]
    assert torch.equal(asked["soft_bass"], plain["bass"])


def test_a_network_of_the_callers_may_change_between_tracks() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    separator = Separator.from_model(network)
    before = separator.run(MIX)
    for parameter in network.parameters():
        parameter.data.mul_(0.9)
    after, fresh = separator.run(MIX), Separator.from_model(network).run(MIX)
    assert all(torch.equal(after[stem], fresh[stem]) for stem in fresh)
    assert not torch.equal(after["bass"], before["bass"])


def test_a_closed_separator_says_so() -> None:
    with tiny() as separator:
        separator.run(MIX)
    with pytest.raises(ValueError, match="closed"):
        separator.run(MIX)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="sources"):
        Separator.from_model(nn.Identity())
    with pytest.raises(TypeError, match="shift"):
        Separator.from_model(ScaleModel(), shift=1)  # type: ignore[call-arg]  # what is tested


def test_an_output_is_a_frozen_value_that_reads_like_a_dictionary() -> None:
    output = tiny().run(MIX)
    assert len(output) == 2
    assert output.stems is output.outputs
    with pytest.raises(KeyError, match="vocals.*drums, bass"):
        output["vocals"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.sample_rate = 1  # type: ignore[misc]  # what is tested
    moved = output.to("meta")
    assert moved["drums"].device.type == moved.mixture.device.type == "meta"
    assert InferenceOutput({"a": MIX}, RATE) != InferenceOutput({"a": MIX}, RATE)


def test_saved_stems_share_one_gain_and_sum_to_the_mix(tmp_path: Path) -> None:
    loud = 12 * MIX
    output = tiny().run(loud)
    assert 0 < output.gain < 1
    paths = output.save(tmp_path / "new" / "folder", template="{track}-{stem}.{ext}", track="a.b")
    assert [path.name for path in paths.values()] == ["a-drums.wav", "a-bass.wav"]
    total = sum(soundfile.read(path, dtype="float64")[0].T for path in paths.values())
    exact = sum(stem.double() for stem in output.outputs.values()) * output.gain
    # Rounded together: the sum is within half a step of 16 bits, and float32 adds a little.
    assert abs(total - exact.numpy()).max() <= 0.51 / 2**15
    flac = output.save(tmp_path, format="flac", bits=24)
    assert soundfile.info(flac["drums"]).subtype == "PCM_24"
    whole = output.save(tmp_path, bits=32, clip="none")
    assert np.array_equal(soundfile.read(whole["bass"], dtype="float32")[0].T, output["bass"])


def test_a_stem_with_a_hostile_name_stays_in_the_folder(tmp_path: Path) -> None:
    output = InferenceOutput({"../../evil": MIX, "/etc/passwd": MIX}, RATE)
    for path in output.save(tmp_path / "out").values():
        assert path.resolve().parent == tmp_path / "out"


@pytest.mark.parametrize("audio", ["path", "bytes", "tensor"])
def test_files_hold_what_run_gives(audio: str, wav: Path, tmp_path: Path) -> None:
    separator = tiny(derive=["rest=mixture-drums"], shifts=1)
    expected = separator.run(MIX)
    *events, result = separator.stream_to(
        INPUTS[audio](wav), tmp_path, options=OutputOptions(format="wav", bits=32)
    )
    assert isinstance(result, SeparatedFiles)
    assert names(events)[-2:] == ["save", "/save"]
    assert list(result.paths) == ["drums", "bass", "rest"]
    assert result.gain == 1.0
    for stem, path in result.paths.items():
        assert path is not None
        found, rate = soundfile.read(path, dtype="float32")
        assert (rate, len(found), result.frames) == (RATE, MIX.shape[-1], MIX.shape[-1])
        assert np.array_equal(found.T, expected[stem])


def test_loud_files_share_one_gain_and_sum_to_the_mix(tmp_path: Path) -> None:
    loud = 12 * MIX
    result = tiny().separate_to(loud, tmp_path / "shared")
    output = tiny().run(loud)
    assert result.gain == output.gain < 1
    assert set(result.gains.values()) == {result.gain}
    total = sum(soundfile.read(path, dtype="float64")[0].T for path in result.paths.values())
    exact = sum(stem.double() for stem in output.outputs.values()) * result.gain
    # Rounded together: the sum is within half a step of 16 bits, and float32 adds a little.
    assert abs(total - exact.numpy()).max() <= 0.51 / 2**15
    alone = tiny().separate_to(loud, tmp_path / "alone", clip="rescale")
    assert alone.gains["drums"] > alone.gains["bass"] == alone.gain


def test_files_can_be_named_one_by_one_or_be_open(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    result = tiny().separate_to(MIX, {"drums": buffer, "bass": tmp_path / "b" / "x.flac"}, "flac")
    assert result.paths == {"drums": None, "bass": tmp_path / "b" / "x.flac"}
    buffer.seek(0)
    assert soundfile.info(buffer).format == "FLAC"
    with pytest.raises(ValueError, match="the stems are drums, bass"):
        tiny().separate_to(MIX, {"drums": tmp_path / "d.wav"})


@pytest.mark.parametrize(("rate", "frames"), [(11_025, 20_001), (44_100, 33_333)])
def test_files_can_have_the_rate_and_the_channels_of_the_source(
    rate: int, frames: int, tmp_path: Path
) -> None:
    source = tmp_path / "mono.wav"
    soundfile.write(source, make_noise(1, frames)[0].numpy(), rate, subtype="PCM_16")
    saving = OutputOptions(rate="source", channels="source")
    for audio in (source, Audio(make_noise(1, frames), rate)):
        *_, result = tiny().stream_to(audio, tmp_path / "out", options=saving)
        assert isinstance(result, SeparatedFiles)
        info = soundfile.info(result.paths["bass"])
        assert (info.samplerate, info.channels, info.frames) == (rate, 1, frames)


def test_closing_leaves_no_file(wav: Path, tmp_path: Path) -> None:
    stream = tiny().stream_to(wav, tmp_path / "new" / "out")
    for item in stream:
        if isinstance(item, ChunkProcessed):
            assert (tmp_path / "new" / "out").is_dir()
            break
    stream.close()
    assert not (tmp_path / "new").exists()


def test_a_failure_takes_only_the_folders_that_it_made(wav: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    wav.with_suffix(".txt").write_text("no sound")
    for out in ("old", "old/new", "new"):
        with pytest.raises(AudioReadError):
            tiny().separate_to(wav.with_suffix(".txt"), tmp_path / out)
    bad = InferenceOutput({"bass": torch.full((2, 10), float("nan"))}, RATE)
    with pytest.raises(AudioWriteError):
        bad.save(tmp_path / "old" / "new")
    stream = tiny().stream_to(wav, tmp_path / "shared" / "out")
    next(stream)
    while not (tmp_path / "shared").exists():
        next(stream)
    (tmp_path / "shared" / "note").touch()  # by somebody else, meanwhile
    stream.close()
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["old", "shared", "note"]


def test_files_that_may_not_be_replaced_are_an_error(wav: Path, tmp_path: Path) -> None:
    (tmp_path / "bass.wav").write_text("precious")
    with pytest.raises(AudioWriteError, match="exists"):
        list(tiny().stream_to(wav, tmp_path, options=OutputOptions(overwrite=False)))
    assert (tmp_path / "bass.wav").read_text() == "precious"
    assert not (tmp_path / "drums.wav").exists()


def test_a_file_where_a_folder_should_be_is_said(wav: Path, tmp_path: Path) -> None:
    before = wav.read_bytes()
    for out in (wav, wav / "below"):
        with pytest.raises(AudioWriteError, match="choose another folder"):
            tiny().separate_to(MIX, out)
    with pytest.raises(AudioWriteError, match="choose a shorter name"):
        tiny().separate_to(MIX, tmp_path / ("n" * 300))
    assert wav.read_bytes() == before


def test_a_stem_never_replaces_the_track(tmp_path: Path) -> None:
    track = tmp_path / "bass.wav"
    soundfile.write(track, MIX.T.numpy(), RATE)
    before = track.read_bytes()
    with pytest.raises(ValueError, match="is the input"):
        tiny().separate_to(track, tmp_path / "x" / "..")
    assert track.read_bytes() == before


def test_a_recording_is_for_the_model_that_it_was_made_for(wav: Path) -> None:
    part = tiny().open_audio(wav)
    other = Separator.from_model(ScaleModel(samplerate=RATE * 2))
    with pytest.raises(ValueError, match="8000 Hz.*16000 Hz"):
        other.run(part)


def test_a_part_of_a_track_can_be_asked_for(wav: Path) -> None:
    separator = tiny()
    for audio in (wav, MIX):
        part = separator.open_audio(audio, start=1.0, duration=0.5)
        output = separator.run(part)
        assert output.mixture is not None
        assert torch.equal(output.mixture, MIX[:, RATE : RATE + RATE // 2])
    with pytest.raises(AudioReadError):
        separator.run(separator.open_audio(wav, start=99))
    with pytest.raises(ValueError, match="behind the end"):
        separator.open_audio(MIX, start=99)


LONG = """
import resource, sys
import numpy as np, soundfile, torch
sys.path.insert(0, ".")
from demucs_infer import Separator
from tests.helpers.networks import ScaleModel

RATE = 4000
torch.set_num_threads(1)
separator = Separator.from_model(ScaleModel(segment=10.0, samplerate=RATE))
block = np.random.default_rng(0).uniform(-0.9, 0.9, (60 * RATE, 2)).astype("float32")
for minutes in (5, 30):
    path = f"{sys.argv[1]}/{minutes}.wav"
    with soundfile.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
        for _ in range(minutes):
            file.write(block)
    result = separator.separate_to(path, f"{sys.argv[1]}/{minutes}")
    assert result.frames == minutes * 60 * RATE
    print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in kilobytes")
def test_memory_does_not_grow_with_the_track(tmp_path: Path) -> None:
    root = Path(demucs_infer.__file__).parent.parent
    command = [sys.executable, "-c", LONG, str(tmp_path)]
    output = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    short, long = map(int, output.split())
    # 30 minutes are 58 MB a stem as floats; what may differ is the allocator's mood.
    assert long < 1.05 * short, (short, long)


def test_the_public_names_are_there_and_cost_nothing_before() -> None:
    for name in demucs_infer.__all__:
        assert getattr(demucs_infer, name) is not None
    assert set(demucs_infer.__all__) - {"__version__"} == set(demucs_infer._HOME)
    with pytest.raises(AttributeError, match="Separatr"):
        demucs_infer.Separatr  # noqa: B018 (the look-up is the test)


def test_a_light_separator_says_the_same_and_only_ours_can_be_one() -> None:
    plain, light = (Separator("tiny", shifts=0, device="cpu") for _ in range(2))
    light.free_original_weights()
    expected, told = plain.run(MIX), light.run(MIX)
    for name in plain.stems:
        assert torch.equal(told[name], expected[name])
    kept, left = (
        sum(parameter.numel() for parameter in one.model.parameters()) for one in (plain, light)
    )
    assert left < kept
    with pytest.raises(ValueError, match="caller owns"):
        Separator.from_model(plain.model).free_original_weights()
