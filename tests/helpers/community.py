"""Small configurations and random checkpoints of the community's networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from demucs_infer import Config
from demucs_infer.custom.build import build_network

_ROFORMER: dict[str, Any] = {
    "dim": 16,
    "depth": 1,
    "stereo": True,
    "num_stems": 1,
    "time_transformer_depth": 1,
    "freq_transformer_depth": 1,
    "dim_head": 8,
    "heads": 2,
    "attn_dropout": 0,
    "ff_dropout": 0,
    "flash_attn": True,
    "stft_n_fft": 512,
    "stft_hop_length": 128,
    "stft_win_length": 512,
    "stft_normalized": False,
    "mask_estimator_depth": 1,
    "multi_stft_resolution_loss_weight": 1.0,
    "multi_stft_resolutions_window_sizes": (4096, 2048, 1024, 512, 256),
    "multi_stft_hop_size": 147,
    "multi_stft_normalized": False,
}


def make_config(chunk: int, overlap: int, **sections: Any) -> dict[str, Any]:
    """Return a configuration with the given windows; `sections` are merged into it."""
    config: dict[str, Any] = {
        "audio": {
            "chunk_size": chunk,
            "dim_f": 256,
            "dim_t": 64,
            "hop_length": 128,
            "n_fft": 512,
            "num_channels": 2,
            "sample_rate": 44100,
            "min_mean_abs": 0.0,
        },
        "training": {
            "batch_size": 1,
            "instruments": ["vocals", "other"],
            "lr": 5.0e-05,
            "target_instrument": None,
            "use_amp": True,
        },
        "augmentations": {"enable": True, "loudness_min": 0.5},
        "inference": {"batch_size": 2, "num_overlap": overlap},
    }
    for name, values in sections.items():
        is_table = isinstance(values, dict)
        config[name] = {**config.get(name, {}), **values} if is_table else values
    return config


BANDS = (8,) * 16 + (43,) * 3
CONFIGS: dict[str, dict[str, Any]] = {
    "bs_roformer, one target": make_config(
        8820,
        2,
        model={**_ROFORMER, "freqs_per_bands": BANDS},
        training={"target_instrument": "vocals"},
    ),
    "bs_roformer, four stems": make_config(
        7000,
        4,
        model={
            **_ROFORMER,
            "dim": 24,
            "depth": 2,
            "num_stems": 4,
            "mask_estimator_depth": 2,
            "freqs_per_bands": BANDS,
            "stft_hop_length": 100,
        },
        training={"instruments": ["drums", "bass", "other", "vocals"]},
    ),
    "mel_band_roformer, one target": make_config(
        8820,
        2,
        model={**_ROFORMER, "num_bands": 12, "sample_rate": 44100},
        training={"instruments": ["Vocals", "Instrumental"], "target_instrument": "Vocals"},
        inference={"dim_t": 1101},
    ),
    "mel_band_roformer, two stems": make_config(
        11025,
        3,
        model={
            **_ROFORMER,
            "dim": 24,
            "num_bands": 16,
            "num_stems": 2,
            "mask_estimator_depth": 2,
            "match_input_audio_length": True,
        },
        inference={"normalize": True},
    ),
    "scnet, four stems": make_config(
        8820,
        4,
        model={
            "sources": ["drums", "bass", "other", "vocals"],
            "audio_channels": 2,
            "dims": [4, 8, 12, 16],
            "nfft": 512,
            "hop_size": 128,
            "win_size": 512,
            "normalized": True,
            "band_SR": [0.175, 0.392, 0.433],
            "band_stride": [1, 4, 16],
            "band_kernel": [3, 4, 16],
            "conv_depths": [1, 1, 1],
            "compress": 4,
            "conv_kernel": 3,
            "num_dplayer": 2,
            "expand": 1,
        },
        training={"instruments": ["drums", "bass", "other", "vocals"]},
        inference={"normalize": True},
    ),
    "scnet, two stems": make_config(
        10000,
        2,
        model={
            "sources": ["vocals", "other"],
            "dims": [4, 8, 16],
            "nfft": 1024,
            "hop_size": 256,
            "win_size": 1024,
            "conv_depths": [2, 1, 1],
            "num_dplayer": 2,
        },
    ),
    "mdx23c, two stems": make_config(
        128 * 63,
        4,
        model={
            "act": "gelu",
            "bottleneck_factor": 4,
            "growth": 4,
            "norm": "InstanceNorm",
            "num_blocks_per_scale": 1,
            "num_channels": 8,
            "num_scales": 2,
            "num_subbands": 4,
            "scale": [2, 2],
        },
    ),
    "mdx23c, one target": make_config(
        128 * 127,
        2,
        audio={"dim_f": 192},
        model={
            "act": "relu",
            "bottleneck_factor": 2,
            "growth": 8,
            "norm": "BatchNorm",
            "num_blocks_per_scale": 2,
            "num_channels": 12,
            "num_scales": 3,
            "num_subbands": 2,
            "scale": [2, 2],
        },
        training={"instruments": ["drums", "no drums"], "target_instrument": "drums"},
    ),
    "htdemucs, four stems": make_config(
        44100,
        4,
        model="htdemucs",
        training={
            "instruments": ["drums", "bass", "other", "vocals"],
            "samplerate": 44100,
            "segment": 1,
            "channels": 2,
        },
        htdemucs={
            "channels": 8,
            "growth": 2,
            "nfft": 1024,
            "depth": 3,
            "cac": True,
            "rewrite": True,
            "dconv_mode": 3,
            "dconv_depth": 1,
            "bottom_channels": 0,
            "t_layers": 1,
            "t_heads": 2,
            "t_hidden_scale": 2.0,
        },
    ),
}
"""By type and kind; two of each type that is common."""

_CONFORMER = {
    "time_conformer_depth": 1,
    "freq_conformer_depth": 1,
    **{key: value for key, value in _ROFORMER.items() if "transformer" not in key},
}
_BANDIT: dict[str, Any] = {
    "stems": ["speech", "music", "effects"],
    "n_bands": 16,
    "fs": 44100,
    "n_sqm_modules": 1,
    "emb_dim": 16,
    "rnn_dim": 16,
    "rnn_type": "GRU",
    "mlp_dim": 16,
    "n_fft": 512,
    "win_length": 512,
    "hop_length": 128,
}
RARE_CONFIGS: dict[str, dict[str, Any]] = {
    "bs_conformer": make_config(
        8820,
        2,
        model={**_CONFORMER, "freqs_per_bands": BANDS},
        training={"target_instrument": "vocals"},
    ),
    "mel_band_conformer": make_config(
        8820,
        2,
        model={**_CONFORMER, "num_bands": 12, "sample_rate": 44100},
        training={"target_instrument": "vocals"},
    ),
    "bandit": make_config(
        8820,
        4,
        model={"in_channel": 1, "band_specs": "musical", **_BANDIT},
        training={"instruments": ["speech", "music", "effects"]},
    ),
    "bandit_v2": make_config(
        8820,
        4,
        model=None,
        kwargs={"in_channels": 1, "band_type": "musical", **_BANDIT},
        training={"instruments": ["speech", "music", "effects"]},
    ),
    "apollo": make_config(
        8820,
        2,
        model={"sr": 44100, "win": 20, "feature_dim": 32, "layer": 1},
        training={"instruments": ["restored", "rest"], "target_instrument": "restored"},
    ),
}
"""By type; one of each type that is rare."""


def write_files(config: dict[str, Any], folder: Path, name: str = "model") -> tuple[Path, Path]:
    """Write a configuration as YAML and random weights as `.ckpt`; return both paths."""
    torch.manual_seed(0)
    config_path, checkpoint = folder / f"{name}.yaml", folder / f"{name}.ckpt"
    config_path.write_text(yaml.dump(copy.deepcopy(config), sort_keys=False), "utf-8")
    network = build_network(Config.from_file(config_path)).model
    with torch.no_grad():  # initial values are too regular: whole layers would have no effect
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    # Copied, as Bandit networks share tables, and files from a GPU have each table on its own.
    state = {name: weight.clone() for name, weight in network.state_dict().items()}
    torch.save(state, checkpoint)
    return config_path, checkpoint


def decibels(reference: Tensor, other: Tensor) -> float:
    """Return the level of `reference` over that of the difference."""
    error = (reference.double() - other.double()).square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / (error + 1e-30)))
