"""Map torchaudio's names for the weights of HDemucs to those of this package.

torchaudio released `hdemucs_high_trained.pt` and `hdemucs_high_musdbhq_only.pt` for its own copy of
the network, as weights alone: the network's arguments are inferred from their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

from demucs_infer.checkpoints.lazy_tensor import LazyTensor
from demucs_infer.checkpoints.reader import Architecture
from demucs_infer.errors import CheckpointError

MUSDB_SOURCES = ("drums", "bass", "other", "vocals")

_PARTS = {
    "freq_encoder": "encoder",
    "freq_decoder": "decoder",
    "time_encoder": "tencoder",
    "time_decoder": "tdecoder",
}


def is_torchaudio_state(state: Mapping[str, LazyTensor]) -> bool:
    """Return whether a state dict belongs to torchaudio's HDemucs."""
    return "freq_encoder.0.conv.weight" in state and "time_encoder.0.conv.weight" in state


def rename_weights(state: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the weights under the names that upstream's checkpoints use.

    In torchaudio, a layer without `rewrite` has a `norm1` that is never used; it is omitted.
    """
    renamed = {}
    for name, weight in state.items():
        part, *rest = name.split(".")
        is_bare = rest[:1] and f"{part}.{rest[0]}.rewrite.weight" not in state
        if not (part == "time_encoder" and is_bare and rest[1:2] == ["norm1"]):
            renamed[".".join((_PARTS.get(part, part), *rest))] = weight
    return renamed


def infer_architecture(state: Mapping[str, LazyTensor]) -> Architecture:
    """Return the architecture for torchaudio's weights.

    Raises `CheckpointError` if weights are missing, or the stems are not the four of MUSDB.
    """
    try:
        depth = len({name.split(".")[1] for name in state if name.startswith("freq_encoder.")})
        channels, audio_channels = state["time_encoder.0.conv.weight"].shape[:2]
        rows = state["freq_emb.embedding.weight"].shape[0]
        outputs = state[f"freq_decoder.{depth - 1}.conv_tr.weight"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"incomplete state of torchaudio's HDemucs: {error}") from error
    if not audio_channels or outputs != 2 * audio_channels * len(MUSDB_SOURCES):
        raise CheckpointError(
            "this HDemucs of torchaudio does not separate the four stems of MUSDB: "
            "pass its architecture, including sources"
        )
    return Architecture(
        "HDemucs",
        kwargs={
            "sources": list(MUSDB_SOURCES),
            "audio_channels": audio_channels,
            "channels": channels,
            "depth": depth,
            "nfft": 8 * rows,  # one row per bin after the first stride of 4
        },
    )
