"""The chunks of a batch's rows: what the block core and the recall select, summarise and page.

Shapes: B batch, N chunks of C slots in a row, T = N*C slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.documents import Documents


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunk n of a row is its slots [n*C, (n+1)*C); its tokens lie at its head and belong to one document.

    The table is of the whole rows; the slots at hand, a segment's or a rank's, are the chunks
    [first, first + count).
    """

    size: int
    """C."""
    lengths: Tensor
    """[B, N] int64 tokens of each chunk; fewer than C where a row or document ends or a chunk was closed early."""
    documents: Tensor
    """[B, N] int64 ordinal of its document in the row; -1 for a chunk without tokens."""
    last: Tensor
    """[B, N] int64 position of its last token in its document; 0 for a chunk without tokens."""
    first: int
    """First chunk at hand."""
    count: int
    """Chunks at hand."""

    @staticmethod
    def of(documents: Documents, size: int) -> Chunks:
        """The chunks of `documents`, of which they may be a part; those of continued rows are as they say.

        Raises ValueError when a run of tokens or the part starts, or the part ends, off a chunk boundary.
        """
        if documents.continued is not None and documents.continued.chunks is not None:
            return documents.continued.chunks
        whole = documents.whole or documents
        off = next(((row, begin) for row, begin, _ in whole.runs if begin % size), None)
        if off is not None:
            raise ValueError(f"row {off[0]}: tokens start at slot {off[1]}, no multiple of the chunk size {size}.")
        sequence, slots = whole.starts.shape[1], documents.starts.shape[1]
        end = documents.begin + slots
        if documents.begin % size or (end % size and end < sequence):
            raise ValueError(f"the part has the slots [{documents.begin}, {end}), no multiples of the chunk size {size}.")
        padding = -sequence % size
        # [B, S] -> [B, N, C]
        real = torch.ones_like(whole.starts) if whole.padding is None else ~whole.padding
        real = F.pad(real, (0, padding)).unflatten(1, (-1, size))
        lengths = real.sum(dim=2)
        ordinal = F.pad(whole.starts.long().cumsum(dim=1) - 1, (0, padding)).unflatten(1, (-1, size))[:, :, 0]
        last = F.pad(whole.positions, (0, padding)).unflatten(1, (-1, size)).amax(dim=2)
        return Chunks(
            size, lengths, ordinal.masked_fill(lengths == 0, -1), last, documents.begin // size, -(-slots // size)
        )

    @property
    def first_positions(self) -> Tensor:
        """[B, N] position of each chunk's first token: tokens of its document before it; 0 for an empty chunk."""
        return (self.last - self.lengths + 1).masked_fill(self.lengths == 0, 0)

    def at_hand(self, table: Tensor) -> Tensor:
        """The columns of a [B, N, ...] table that are at hand, [B, count, ...]."""
        return table[:, self.first : self.first + self.count]
