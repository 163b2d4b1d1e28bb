"""Test that files of Music-Source-Separation-Training are read as they are, and safely.

The texts follow the convention in which the community publishes networks.
"""

from pathlib import Path
from typing import Any

import pytest

from demucs_infer import Config, ConfigError
from demucs_infer.custom.msst import read_yaml
from tests.helpers.oracles import require_module

BS_ROFORMER = """\
audio:
  chunk_size: 352800
  dim_f: 1024
  dim_t: 801 # don't work (use in model)
  hop_length: 441 # don't work (use in model)
  n_fft: 2048
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 0.000
model:
  dim: 512
  depth: 12
  stereo: true
  num_stems: 1
  time_transformer_depth: 1
  freq_transformer_depth: 1
  linear_transformer_depth: 0
  freqs_per_bands: !!python/tuple
    - 2
    - 2
    - 4
  dim_head: 64
  heads: 8
  attn_dropout: 0.1
  ff_dropout: 1e-1
  flash_attn: true
  stft_n_fft: 2048
  stft_hop_length: 441
  multi_stft_resolutions_window_sizes: !!python/tuple [4096, 2048, 1024]
training:
  batch_size: 10
  gradient_accumulation_steps: 1
  grad_clip: 0
  instruments: [vocals, other]
  lr: 5.0e-05
  target_instrument: vocals
  use_amp: true
augmentations:
  enable: true
inference:
  batch_size: 1
  dim_t: 1101
  num_overlap: 2
"""
MEL = """\
audio: {chunk_size: 485100, num_channels: 2, sample_rate: 44100}
model: {dim: 384, depth: 6, stereo: true, num_stems: 4, num_bands: 60, sample_rate: 44100}
training: {instruments: ['drums', 'bass', 'other', 'vocals'], target_instrument: null}
inference: {batch_size: 1, num_overlap: 4, normalize: true}
"""
SCNET = """\
audio: {chunk_size: 485100, num_channels: 2, sample_rate: 44100, min_mean_abs: 0.000}
model:
  sources: [drums, bass, other, vocals]
  audio_channels: 2
  dims: [4, 32, 64, 128]
  band_SR: [0.175, 0.392, 0.433]
  band_stride: [1, 4, 16]
  band_kernel: [3, 4, 16]
  num_dplayer: 6
training: {instruments: [drums, bass, other, vocals], target_instrument: null, samplerate: 44100}
inference: {batch_size: 8, dim_t: 256, num_overlap: 4, normalize: true}
"""
MDX23C = """\
audio: {chunk_size: 261120, dim_f: 4096, dim_t: 256, hop_length: 1024, n_fft: 8192}
model: {act: gelu, bottleneck_factor: 4, growth: 128, norm: InstanceNorm, num_blocks_per_scale: 2,
  num_channels: 128, num_scales: 5, num_subbands: 4, scale: [2, 2], name: TFC_TDF_v3}
training: {instruments: [Vocals, Instrumental], target_instrument: null}
inference: {batch_size: 1, dim_t: 256, num_overlap: 8}
"""
OLD_MDX23C = """\
audio: {dim_f: 1024, dim_t: 256, hop_length: 441, n_fft: 2048}
model: {num_subbands: 4, num_scales: 5, num_blocks_per_scale: 2, bottleneck_factor: 4}
training: {instruments: [drums, no drums], target_instrument: drums}
inference: {dim_t: 512, num_overlap: 2}
"""
HTDEMUCS = """\
audio: {chunk_size: 485100, min_mean_abs: 0.001, hop_length: 1024}
training: {instruments: [vocals, other], target_instrument: null, segment: 11, samplerate: 44100,
  channels: 2, normalize: true}
inference: {num_overlap: 4, batch_size: 8}
model: htdemucs
htdemucs: {channels: 48, growth: 2, nfft: 4096, t_layers: 5}
"""
BANDIT = """\
kwargs: {in_channels: 2, stems: [speech, music, sfx], n_bands: 64}
model: null
audio: {chunk_size: 384000, num_channels: 2, sample_rate: 48000}
training: {instruments: [speech, music, effects], target_instrument: null}
inference: {num_overlap: 4}
"""
DUET = """\
model_type: mel_band_roformer
audio: {chunk_size: 352800}
model: {dim: 384, depth: 6, stereo: false, num_bands: 60}
training: {instruments: [lead, backing, other], target_instrument: lead}
inference: {overlap_size: 100000, chunk_size: 441000}
"""

VALID: dict[str, tuple[str, dict[str, Any]]] = {
    "bs_roformer": (
        BS_ROFORMER,
        {
            "type": "bs_roformer",
            "stems": ("vocals",),
            "derived": {"other": "mixture - vocals"},
            "sizes": (352800, 176400),
        },
    ),
    "mel_band": (
        MEL,
        {
            "type": "mel_band_roformer",
            "stems": ("drums", "bass", "other", "vocals"),
            "sizes": (485100, 121275),
            "normalize": True,
        },
    ),
    "scnet": (
        SCNET,
        {
            "type": "scnet",
            "stems": ("drums", "bass", "other", "vocals"),
            "sizes": (485100, 121275),
            "normalize": True,
        },
    ),
    "mdx23c": (
        MDX23C,
        {"type": "mdx23c", "stems": ("Vocals", "Instrumental"), "sizes": (261120, 32640)},
    ),
    "mdx23c, size by frames": (
        OLD_MDX23C,
        {
            "type": "mdx23c",
            "stems": ("drums",),
            "derived": {"no drums": "mixture - drums"},
            "sizes": (441 * 511, 441 * 511 // 2),
        },
    ),
    "htdemucs": (
        HTDEMUCS,
        {
            "type": "htdemucs",
            "stems": ("vocals", "other"),
            "sizes": (485100, 121275),
            "window": ("ones", "constant"),
        },
    ),
    "bandit_v2": (
        BANDIT,
        {
            "type": "bandit_v2",
            "stems": ("speech", "music", "effects"),
            "sizes": (384000, 96000),
            "rate": 48000,
        },
    ),
    "declared type, size of the overlap": (
        DUET,
        {
            "type": "mel_band_roformer",
            "stems": ("lead",),
            "derived": {"minus_lead": "mixture - lead"},
            "sizes": (441000, 341000),
            "channels": 1,
        },
    ),
}


@pytest.fixture(autouse=True)
def library() -> None:
    require_module("pymss_core")


def read(text: str, tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "network.yaml"
    path.write_text(text, "utf-8")
    return Config.from_file(path, overrides)


@pytest.mark.parametrize("kind", VALID)
def test_published_form_is_read(kind: str, tmp_path: Path) -> None:
    text, expected = VALID[kind]
    config = read(text, tmp_path)
    assert config.identifier == "network"
    assert config.model_type == f"msst.{expected['type']}"
    assert config.model.output_stem_names == expected["stems"]
    assert config.derived_stems == expected.get("derived", {})
    chunk, hop = expected["sizes"]
    assert (config.chunk_size, int((1 - config.overlap) * chunk)) == (chunk, hop)
    assert config.audio.sample_rate == expected.get("rate", 44100)
    assert config.audio.channels == expected.get("channels", 2)
    window, padding = expected.get("window", ("edge_fade", "reflect"))
    assert config.preferences == {
        "profile": "msst",
        "window": window,
        "padding": padding,
        "normalize": expected.get("normalize", False),
    }
    assert Config.from_dict(config.to_dict()) == config


def test_tuples_and_small_numbers_are_read(tmp_path: Path) -> None:
    config = read(BS_ROFORMER, tmp_path)
    data: Any = read_yaml(tmp_path / "network.yaml")
    assert data["model"]["freqs_per_bands"] == (2, 2, 4)
    assert data["model"]["multi_stft_resolutions_window_sizes"] == (4096, 2048, 1024)
    sections: Any = config.model.rest["sections"]
    assert sections["model"]["ff_dropout"] == 0.1
    assert "lr" not in sections["training"]  # only what the network is built from


def test_type_and_values_can_be_set(tmp_path: Path) -> None:
    config = read(BS_ROFORMER, tmp_path, "model_type=bs_conformer", "inference.num_overlap=4")
    assert config.model_type == "msst.bs_conformer"
    assert int((1 - config.overlap) * config.chunk_size) == 352800 // 4


def nest(levels: int) -> str:
    return "training: " + "[" * levels + "]" * levels


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"training: {{instruments: *a{levels - 1}}}"])


HOSTILE: dict[str, tuple[str, str]] = {
    "call": (
        BS_ROFORMER + "x: !!python/object/apply:os.system ['touch RAN']\n",
        "line 44: unsupported tag '!!python/object/apply:os.system'",
    ),
    "new object": (
        "training: !!python/object/new:subprocess.Popen [['touch', 'RAN']]",
        "unsupported tag '!!python/object/new:subprocess.Popen'",
    ),
    "name": ("training: !!python/name:os.system", "unsupported tag '!!python/name:os.system'"),
    "module": ("training: !!python/module:os", "unsupported tag"),
    "tag of its own": ("training: !exec ls", "unsupported tag '!exec'"),
    "object in a tuple": (
        "training: !!python/tuple [!!python/object/apply:os.getcwd []]",
        "unsupported tag",
    ),
    "exploding anchors": (bomb(9), "YAML aliases"),
    "anchor of itself": ("training: &a [*a]", "YAML aliases"),
    "nested deeply": (nest(1000), "nested too deeply"),
    "many values": ("training: [" + "1," * 30_000 + "]", "too many values"),
    "large": ("#" * 300_000, "too large"),
    "not YAML": ("training: [", "not valid YAML"),
    "binary": ("training: \x00\x01", "not valid YAML"),
    "list": ("- training", "expected a table"),
    "other file": ("name: someone", "with a section `training`"),
    "no stems": (MEL.replace("instruments", "instrument"), "training.instruments: required"),
    "stems of a wrong type": (
        MEL.replace("['drums', 'bass', 'other', 'vocals']", "{a: 1}"),
        'training.instruments: expected a list, got {"a": 1}',
    ),
    "stem twice": (MEL.replace("'bass'", "'drums'"), "duplicate entry 'drums'"),
    "stem without an output": (
        MEL.replace("num_stems: 4", "num_stems: 3"),
        "must be 4, as follows",
    ),
    "no window": (MEL.replace("chunk_size: 485100, ", ""), "audio.chunk_size: required"),
    "window of a wrong type": (
        MEL.replace("485100", "'large'"),
        'audio.chunk_size: expected an integer, got "large"',
    ),
    "negative overlap": (MEL.replace("num_overlap: 4", "num_overlap: -4"), "at least 1, got -4"),
    "no hop": (MEL.replace("num_overlap: 4", "num_overlap: 9999999"), "must be less than"),
    "unknown network": (
        MEL.replace("num_bands: 60", "bands: 60"),
        "model_type: cannot detect the type",
    ),
    "unsupported network": ("model_type: swin_upernet\n" + MEL, "expected one of bs_roformer"),
    "section of a wrong type": (MEL.replace("inference: {", "inference: [{") + "]", "inference:"),
    "huge number": (MEL.replace("dim: 384", "dim: 38400000000"), "model.dim: must be at most"),
    "huge depth": (MEL.replace("depth: 6", "depth: 9000"), "model.depth: must be at most 1024"),
    "date": (MEL.replace("depth: 6", "depth: 2024-01-01"), "model.depth: expected a number"),
    "stem is the track": (MEL.replace("'bass'", "mixture"), "'mixture'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_one_clear_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read(text, tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "network.yaml") in str(caught.value)
    assert len(str(caught.value)) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.yaml"]
