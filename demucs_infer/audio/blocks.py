"""Cut a stream of blocks into blocks of one size.

Shapes: C channels, t samples of a block.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def reblock(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yield the samples of `blocks` (..., C, t) as float32 blocks of `size`, the last one shorter.

    The result shares no memory with `blocks`, whose source may reuse the memory of a block for the
    next one.
    """
    piece: Tensor | None = None
    filled = 0
    for block in blocks:
        at = 0
        while at < block.shape[-1]:
            if piece is None:
                shape = (*block.shape[:-1], size)
                piece = torch.empty(shape, dtype=torch.float32, device=block.device)
            count = min(size - filled, block.shape[-1] - at)
            piece[..., filled : filled + count] = block[..., at : at + count]
            filled, at = filled + count, at + count
            if filled == size:
                yield piece
                piece, filled = None, 0
    if piece is not None:
        yield piece[..., :filled]
