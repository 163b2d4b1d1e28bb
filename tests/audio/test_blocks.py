"""Blocks of any size become blocks of one size."""

from collections.abc import Iterator

import torch
from torch import Tensor

from demucs_infer.audio.blocks import reblock
from tests.helpers.audio_signals import make_noise


def test_reblock_copies_blocks_that_share_one_buffer() -> None:
    track = make_noise(2, 1000)
    buffer = torch.empty(2, 64)

    def blocks() -> Iterator[Tensor]:
        for part in track.split(64, dim=-1):
            buffer[:, : part.shape[-1]] = part
            yield buffer[:, : part.shape[-1]]

    pieces = list(reblock(blocks(), 300))
    assert [piece.shape[-1] for piece in pieces] == [300, 300, 300, 100]
    assert torch.equal(torch.cat(pieces, dim=-1), track)
