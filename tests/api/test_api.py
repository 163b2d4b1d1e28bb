"""Test `Separator`: inputs, threads, stems, the order of events, and files."""

import dataclasses
import io
import os
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
    AudioInputError,
    AudioReadError,
    AudioWriteError,
    BagOfModels,
    ChunkProcessed,
    ConfigError,
    DemucsError,
    InferenceOutput,
    OutputOptions,
    SeparatedFiles,
    SeparationOptions,
    Separator,
    Stage,
)
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.system.cores import count_cores
from tests.helpers.audio_signals import make_noise
from tests.helpers.networks import TINY, DictModel, OomModel, RecordingModel, ScaleModel, randomize

RATE = 8000  # of the tiny models
MIX = make_noise(2, 4 * RATE)

# Removing and restoring the level rounds a few times, and upstream adds the mean, here below 1e-3,
# to every stem.
CLOSE = {"rtol": 0.0, "atol": 1e-3}


def make_separator(**settings: Any) -> Separator:
    return Separator.from_model(ScaleModel(), **{"shifts": 0, **settings})


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
def test_all_kinds_of_input_give_the_same_stems(kind: str, wav: Path) -> None:
    expected = make_separator().run(MIX)
    output = make_separator().run(INPUTS[kind](wav))
    assert output.sample_rate == RATE
    assert list(output) == ["drums", "bass"]
    for stem, samples in expected.outputs.items():
        assert output[stem].shape == MIX.shape
        # An int32 has 31 bits, a float32 24: half a step of the latter, at most.
        torch.testing.assert_close(output[stem], samples, rtol=0, atol=2.0**-24)


def test_int16_input_differs_by_half_a_step_at_most() -> None:
    output = make_separator().run((MIX * 2**15).round().to(torch.int16).numpy())
    torch.testing.assert_close(
        output["drums"], make_separator().run(MIX)["drums"], rtol=0, atol=2.0**-16
    )


def test_stems_are_on_the_scale_of_the_mixture() -> None:
    output = make_separator().run(MIX)
    assert output.mixture is not None
    assert torch.equal(output.mixture, MIX)
    torch.testing.assert_close(output["drums"], 0.25 * MIX, **CLOSE)
    torch.testing.assert_close(output["bass"], 0.75 * MIX, **CLOSE)


@pytest.mark.parametrize("data", [MIX[0], MIX[:1]])
def test_mono_input_is_expanded_to_the_channels_of_the_model(data: torch.Tensor) -> None:
    output = make_separator().run(data)
    assert output["bass"].shape == MIX.shape
    assert torch.equal(output["bass"][0], output["bass"][1])


def test_mono_model_gets_the_mean_of_the_channels(wav: Path) -> None:
    separator = Separator.from_model(ScaleModel(audio_channels=1), shifts=0)
    for audio in (MIX, wav):
        *events, output = separator.stream(audio)
        assert isinstance(output, InferenceOutput)
        assert Stage.Started("downmix_to_mono") in events
        assert torch.equal(output.mixture, MIX.mean(0, keepdim=True))
        torch.testing.assert_close(output["bass"], 0.75 * output.mixture, **CLOSE)


def test_additional_channels_are_dropped_with_a_warning() -> None:
    *events, output = make_separator().stream(make_noise(6, RATE))
    assert "the first 2 are used" in "".join(map(repr, events))
    assert isinstance(output, InferenceOutput)
    assert torch.equal(output.mixture, make_noise(6, RATE)[:2])


@pytest.mark.parametrize("rate", [4000, 16_000, 44_100])
def test_other_sample_rates_are_converted(rate: int) -> None:
    time = torch.arange(rate) / rate
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * time).expand(2, -1)
    outputs = [make_separator().run(tone, rate), make_separator().run(Audio(tone, rate))]
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(RATE) / RATE)
    for output in outputs:
        assert output["bass"].shape == (2, RATE)
        # The ripple of the filter, away from the ends, where it reads silence.
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
def test_invalid_arrays_are_errors(audio: Any, rate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_separator().run(audio, rate)


def test_invalid_files_are_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, np.array([0.0, np.nan, 0.0]), RATE, subtype="FLOAT")
    strict = make_separator().open_audio(bad, strict=True)
    for audio in (tmp_path / "absent.wav", b"", b"text", io.BytesIO(b"RIFF"), strict, tmp_path):
        with pytest.raises(DemucsError):
            make_separator().run(audio)
    *events, output = make_separator().stream(bad)
    assert "not finite" in "".join(map(repr, events))
    assert torch.isfinite(output["bass"]).all()


@pytest.mark.parametrize("length", [1, 2, 99])
def test_silence_and_very_short_tracks_have_stems(length: int) -> None:
    output = make_separator().run(torch.zeros(2, length))
    assert torch.equal(output["drums"], torch.zeros(2, length))
    assert torch.isfinite(make_separator().run(torch.ones(2, length))["drums"]).all()


def test_inputs_and_network_of_the_caller_are_unchanged() -> None:
    model = RecordingModel()
    model.train()
    data, array = MIX.clone(), MIX.numpy().copy()
    separator = Separator.from_model(model)
    for audio in (data, array):
        output = separator.run(audio)
        assert output.mixture is not None
        output.mixture.zero_()  # shares no memory with the input
        output["drums"].zero_()
    assert torch.equal(data, MIX)
    assert np.array_equal(array, MIX.numpy())
    assert model.training
    assert model.gains.device.type == "cpu"
    assert all(model.modes)
    assert not torch.is_inference_mode_enabled()


def test_each_stem_has_its_own_memory() -> None:
    output = make_separator().run(MIX)
    for stem in output.outputs.values():
        assert not stem.is_inference()
        assert stem.untyped_storage().nbytes() == 4 * stem.numel()


ORDER = [
    *("normalize", "/normalize"),
    "DeviceChosen",
    "ChunkProcessed",
    *("stitch", "/stitch"),
    *("collect_outputs", "/collect_outputs"),
    *("derive_stems", "/derive_stems"),
    "InferenceOutput",
]


def names(items: list[Any]) -> list[str]:
    result = []
    for item in items:
        stage = getattr(item, "stage", type(item).__name__)
        result.append(f"/{stage}" if isinstance(item, Stage.Completed) else stage)
    return result


def test_events_are_in_order_and_the_output_is_last(wav: Path) -> None:
    separator = make_separator(derive=["rest=mixture-drums"])
    items = list(separator.stream(MIX))
    chunks = [item for item in items if isinstance(item, ChunkProcessed)]
    assert list(dict.fromkeys(names(items))) == ORDER
    assert [chunk.batch_index for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert {chunk.total_batches for chunk in chunks} == {len(chunks)}
    assert chunks[-1].fraction == 1.0
    from_file = list(separator.stream(wav))
    assert names(from_file) == ["load", "/load", *names(items)]
    assert "derive_stems" not in names(list(make_separator().stream(MIX)))
    calls: list[dict[str, object]] = []
    separator.update_parameter(callback=calls.append)  # must not change the events
    assert names(list(separator.stream(MIX))) == names(items)
    assert len(calls) == 2 * len(chunks)
    last, run = items[-1], separator.run(MIX)
    assert isinstance(last, InferenceOutput)
    assert all(torch.equal(last[stem], run[stem]) for stem in run)


def test_inference_mode_does_not_leak_and_closing_stops_the_work() -> None:
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
    # The two that were delivered, one in flight on each core, and one that follows.
    assert len(model.seen) <= 2 + count_cores() + 1 < 60 // 2
    assert threading.active_count() == before


class CountingModel(ScaleModel):
    """Counts its calls, and scales by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__(gains=(0.25 * factor, 0.5 * factor))
        self.calls = 0

    def forward(self, mix: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(mix)


def test_only_members_with_weight_in_the_stems_are_run() -> None:
    members = [CountingModel(1), CountingModel(2)]
    bag = BagOfModels(members, [[1.0, 0.0], [0.0, 1.0]])
    everything = Separator.from_model(bag, shifts=2).run(MIX)
    calls = members[0].calls
    assert members[1].calls == calls > 0
    bass = Separator.from_model(bag, shifts=2, stems=["bass"]).run(MIX)
    assert list(bass) == ["bass"]
    assert torch.equal(bass["bass"], everything["bass"])
    assert [member.calls for member in members] == [calls, 2 * calls]


def test_derived_stems_follow_those_of_the_model() -> None:
    output = make_separator(derive=["rest=mixture-drums", "both=drums+bass"]).run(MIX)
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
def test_invalid_setting_is_an_error_before_any_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_separator(**wrong)
    separator = make_separator()
    with pytest.raises(ValueError, match=message):
        separator.update_parameter(**wrong)
    assert torch.equal(separator.run(MIX)["bass"], make_separator().run(MIX)["bass"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_error_names_the_missing_device() -> None:
    with pytest.raises(ConfigError, match="cuda:1"):
        make_separator(device="cuda:1")


def test_invalid_setting_is_found_before_the_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Separator("no such model", overlap=2)


def test_settings_can_be_changed_between_tracks() -> None:
    model = RecordingModel()
    separator = Separator.from_model(model, shifts=0)
    first = separator.run(MIX)
    separator.update_parameter(shifts=2, overlap=0.5, stems=["bass"], segment=0.5)
    assert list(separator.run(MIX)) == ["bass"]
    assert {shape[-1] for shape in model.seen} >= {RATE, RATE // 2}
    separator.update_parameter(shifts=0, overlap=0.25, segment=None, stems=None)
    assert torch.equal(separator.run(MIX)["drums"], first["drums"])


@pytest.mark.parametrize("kind", ["ScaleModel", "HTDemucs"])
def test_stems_do_not_depend_on_concurrent_tracks(kind: str) -> None:
    network = ScaleModel() if kind == "ScaleModel" else randomize(HTDemucs(**TINY[kind]))
    separator = Separator.from_model(network, shifts=2)
    tracks = [make_noise(2, RATE + 997 * index, seed=index) for index in range(8)]
    serial = [separator.run(track) for track in tracks]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(separator.run, reversed(tracks)))[::-1]
    for expected, output in zip(serial, parallel, strict=True):
        assert all(torch.equal(expected[stem], output[stem]) for stem in expected)


def test_keyword_arguments_and_queries_reach_the_network() -> None:
    model = DictModel()
    separator = Separator.from_model(model, shifts=0)
    plain = separator.run(MIX, model_kwargs={"query": 5})
    assert set(model.queries) == {5}
    output = separator.run(MIX, queries={"loud": {"query": 1}, "soft": {"query": 2}})
    assert list(output) == ["loud_drums", "loud_bass", "soft_drums", "soft_bass"]
    assert torch.equal(output["soft_bass"], plain["bass"])


def test_weights_of_the_callers_network_may_change_between_tracks() -> None:
    network = randomize(HTDemucs(**TINY["HTDemucs"]))
    separator = Separator.from_model(network)
    before = separator.run(MIX)
    for parameter in network.parameters():
        parameter.data.mul_(0.9)
    after, fresh = separator.run(MIX), Separator.from_model(network).run(MIX)
    assert all(torch.equal(after[stem], fresh[stem]) for stem in fresh)
    assert not torch.equal(after["bass"], before["bass"])


def test_closed_separator_is_an_error() -> None:
    with make_separator() as separator:
        separator.run(MIX)
    with pytest.raises(ValueError, match="closed"):
        separator.run(MIX)


def test_invalid_network_or_setting_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="sources"):
        Separator.from_model(nn.Identity())
    with pytest.raises(TypeError, match="shift"):
        Separator.from_model(ScaleModel(), shift=1)  # type: ignore[call-arg]  # what is tested


def test_output_is_immutable_and_works_like_a_dictionary() -> None:
    output = make_separator().run(MIX)
    assert len(output) == 2
    assert output.stems is output.outputs
    with pytest.raises(KeyError, match="vocals.*drums, bass"):
        output["vocals"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.sample_rate = 1  # type: ignore[misc]  # what is tested
    moved = output.to("meta")
    assert moved["drums"].device.type == moved.mixture.device.type == "meta"
    assert InferenceOutput({"a": MIX}, RATE) != InferenceOutput({"a": MIX}, RATE)


def test_saved_stems_share_one_gain_and_sum_to_the_mixture(tmp_path: Path) -> None:
    loud = 12 * MIX
    output = make_separator().run(loud)
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


def test_stem_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    output = InferenceOutput({"../../evil": MIX, "/etc/passwd": MIX}, RATE)
    for path in output.save(tmp_path / "out").values():
        assert path.resolve().parent == tmp_path / "out"


@pytest.mark.parametrize("audio", ["path", "bytes", "tensor"])
def test_files_have_the_samples_of_run(audio: str, wav: Path, tmp_path: Path) -> None:
    separator = make_separator(derive=["rest=mixture-drums"], shifts=1)
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
        samples, rate = soundfile.read(path, dtype="float32")
        assert (rate, len(samples), result.frames) == (RATE, MIX.shape[-1], MIX.shape[-1])
        assert np.array_equal(samples.T, expected[stem])


def test_loud_files_share_one_gain_and_sum_to_the_mixture(tmp_path: Path) -> None:
    loud = 12 * MIX
    result = make_separator().separate_to(loud, tmp_path / "shared")
    output = make_separator().run(loud)
    assert result.gain == output.gain < 1
    assert set(result.gains.values()) == {result.gain}
    total = sum(soundfile.read(path, dtype="float64")[0].T for path in result.paths.values())
    exact = sum(stem.double() for stem in output.outputs.values()) * result.gain
    # Rounded together: the sum is within half a step of 16 bits, and float32 adds a little.
    assert abs(total - exact.numpy()).max() <= 0.51 / 2**15
    alone = make_separator().separate_to(loud, tmp_path / "alone", clip="rescale")
    assert alone.gains["drums"] > alone.gains["bass"] == alone.gain


def test_targets_can_be_paths_and_file_objects_by_stem(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    result = make_separator().separate_to(
        MIX, {"drums": buffer, "bass": tmp_path / "b" / "x.flac"}, "flac"
    )
    assert result.paths == {"drums": None, "bass": tmp_path / "b" / "x.flac"}
    buffer.seek(0)
    assert soundfile.info(buffer).format == "FLAC"
    with pytest.raises(ValueError, match="the stems are drums, bass"):
        make_separator().separate_to(MIX, {"drums": tmp_path / "d.wav"})


@pytest.mark.parametrize(("rate", "frames"), [(11_025, 20_001), (44_100, 33_333)])
def test_files_can_have_the_rate_and_channels_of_the_source(
    rate: int, frames: int, tmp_path: Path
) -> None:
    source = tmp_path / "mono.wav"
    soundfile.write(source, make_noise(1, frames)[0].numpy(), rate, subtype="PCM_16")
    options = OutputOptions(rate="source", channels="source")
    for audio in (source, Audio(make_noise(1, frames), rate)):
        *_, result = make_separator().stream_to(audio, tmp_path / "out", options=options)
        assert isinstance(result, SeparatedFiles)
        info = soundfile.info(result.paths["bass"])
        assert (info.samplerate, info.channels, info.frames) == (rate, 1, frames)


def test_closing_leaves_no_files(wav: Path, tmp_path: Path) -> None:
    stream = make_separator().stream_to(wav, tmp_path / "new" / "out")
    for item in stream:
        if isinstance(item, ChunkProcessed):
            assert (tmp_path / "new" / "out").is_dir()
            break
    stream.close()
    assert not (tmp_path / "new").exists()


def test_error_removes_only_new_empty_folders(wav: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    wav.with_suffix(".txt").write_text("no sound")
    for out in ("old", "old/new", "new"):
        with pytest.raises(AudioReadError):
            make_separator().separate_to(wav.with_suffix(".txt"), tmp_path / out)
    bad = InferenceOutput({"bass": torch.full((2, 10), float("nan"))}, RATE)
    with pytest.raises(AudioWriteError):
        bad.save(tmp_path / "old" / "new")
    stream = make_separator().stream_to(wav, tmp_path / "shared" / "out")
    next(stream)
    while not (tmp_path / "shared").exists():
        next(stream)
    (tmp_path / "shared" / "note").touch()  # by another program, meanwhile
    stream.close()
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["old", "shared", "note"]


def test_existing_file_is_an_error_without_overwrite(wav: Path, tmp_path: Path) -> None:
    (tmp_path / "bass.wav").write_text("precious")
    with pytest.raises(AudioWriteError, match="exists"):
        list(make_separator().stream_to(wav, tmp_path, options=OutputOptions(overwrite=False)))
    assert (tmp_path / "bass.wav").read_text() == "precious"
    assert not (tmp_path / "drums.wav").exists()


def test_error_about_an_invalid_folder_has_advice(wav: Path, tmp_path: Path) -> None:
    before = wav.read_bytes()
    for out in (wav, wav / "below"):
        with pytest.raises(AudioWriteError, match="choose another folder"):
            make_separator().separate_to(MIX, out)
    with pytest.raises(AudioWriteError, match="choose a shorter name"):
        make_separator().separate_to(MIX, tmp_path / ("n" * 300))
    assert wav.read_bytes() == before


def test_stem_does_not_replace_the_input(tmp_path: Path) -> None:
    track = tmp_path / "bass.wav"
    soundfile.write(track, MIX.T.numpy(), RATE)
    before = track.read_bytes()
    with pytest.raises(ValueError, match="is the input"):
        make_separator().separate_to(track, tmp_path / "x" / "..")
    assert track.read_bytes() == before


def test_opened_source_fits_only_models_of_its_format(wav: Path) -> None:
    part = make_separator().open_audio(wav)
    other = Separator.from_model(ScaleModel(samplerate=RATE * 2))
    with pytest.raises(ValueError, match="8000 Hz.*16000 Hz"):
        other.run(part)


def test_part_of_a_track_can_be_separated(wav: Path) -> None:
    separator = make_separator()
    for audio in (wav, MIX):
        part = separator.open_audio(audio, start=1.0, duration=0.5)
        output = separator.run(part)
        assert output.mixture is not None
        assert torch.equal(output.mixture, MIX[:, RATE : RATE + RATE // 2])
    with pytest.raises(AudioReadError):
        separator.run(separator.open_audio(wav, start=99))
    with pytest.raises(ValueError, match="after the end"):
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
    # 30 minutes of a stem are 58 MB as floats, a fifth of all. Peaks of equal tracks differ by up
    # to 6 percent, as threads allocate in another order.
    assert long < 1.1 * short, (short, long)


def test_public_names_are_imported_lazily() -> None:
    for name in demucs_infer.__all__:
        assert getattr(demucs_infer, name) is not None
    assert set(demucs_infer.__all__) - {"__version__"} == set(demucs_infer._LAZY_IMPORTS)
    with pytest.raises(AttributeError, match="Separatr"):
        demucs_infer.Separatr  # noqa: B018 (the look-up is the test)


def test_freeing_original_weights_keeps_the_stems() -> None:
    plain, freed = (Separator("tiny", shifts=0, device="cpu") for _ in range(2))
    freed.free_original_weights()
    expected, output = plain.run(MIX), freed.run(MIX)
    for name in plain.stems:
        assert torch.equal(output[name], expected[name])
    sizes = [
        sum(parameter.numel() for parameter in separator.model.parameters())
        for separator in (plain, freed)
    ]
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="caller owns"):
        Separator.from_model(plain.model).free_original_weights()


def test_reduced_batch_size_is_kept_for_the_next_track_of_the_callers_network() -> None:
    network = OomModel(limit=1, segment=1.0)
    separator = Separator.from_model(network, device="cpu", shifts=0, overlap=0, batch_size=4)
    for tried in ([4, 2, 1, 1, 1, 1], [1, 1, 1, 1]):
        network.tried.clear()
        separator.run(MIX[:, : 4 * RATE] if MIX.shape[1] >= 4 * RATE else make_noise(2, 4 * RATE))
        assert network.tried == tried
    with pytest.raises(torch.OutOfMemoryError):
        Separator.from_model(OomModel(limit=1), device="cpu", batch_size=4, oom="raise").run(
            make_noise(2, 4 * RATE)
        )


@pytest.mark.parametrize("channels", [7, 12])
def test_array_of_no_usual_layout_is_refused(channels: int) -> None:
    separator, audio = make_separator(), make_noise(channels, RATE)
    for array in (audio, audio.T, Audio(audio, RATE)):
        with pytest.raises(ValueError, match=rf"{channels} channels, expected 2 .*audio\[:2\]"):
            separator.run(array)
    with pytest.raises(ValueError, match="6 channels"):
        separator.open_audio(make_noise(6, RATE), extra_channels="error")
    pair = separator.run(separator.open_audio(audio, extra_channels="pairs", group=1))
    assert pair.mixture is not None and torch.equal(pair.mixture, audio[2:4])
    with pytest.raises(ValueError, match="group = 6 must be 0 to"):
        separator.open_audio(audio, extra_channels="pairs", group=6)


def test_bytes_of_a_path_are_a_path_where_a_path_is_expected(wav: Path) -> None:
    separator = make_separator()
    mixture, _ = separator.separate_audio_file(os.fsencode(wav))
    assert torch.equal(mixture, separator.separate_audio_file(wav)[0])
    # An upload that has the name of a file must not read that file.
    with pytest.raises(AudioInputError, match=r"is a path, but bytes are the content .*fsdecode"):
        separator.run(os.fsencode(wav))


def test_keywords_override_options_even_with_a_default() -> None:
    options = SeparationOptions(shifts=5, overlap=0.5, split=False, segment=None, device="cpu")
    made = Separator("tiny", shifts=1, split=True, options=options)
    assert made._state.options.shifts == 1 and made._state.options.split
    assert made._state.options.overlap == 0.5
    made = Separator.from_model(ScaleModel(), options=options, shifts=1, overlap=0.25)
    assert (made._state.options.shifts, made._state.options.overlap) == (1, 0.25)
    assert not made._state.options.split


class OwnReader(Separator):
    """Reads files in its own way, as one of upstream's class may."""

    def _load_audio(self, track: Path) -> torch.Tensor:
        return 0.5 * super()._load_audio(track)


def test_subclass_may_read_files_in_its_own_way(wav: Path) -> None:
    own = OwnReader.from_model(ScaleModel(), device="cpu")
    mixture, stems = own.separate_audio_file(wav)
    expected, _ = make_separator().separate_audio_file(wav)
    assert torch.equal(mixture, 0.5 * expected)
    torch.testing.assert_close(stems["bass"], 0.75 * mixture, **CLOSE)
