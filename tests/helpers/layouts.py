"""Document layouts that the memory and attention tests go through."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.memory.documents import Documents


def layout(name: str, batch: int, sequence: int) -> Documents:
    """whole: one document a row. packed: random boundaries. single: every token a document. padded: packed, with
    padded document tails and a last row of nothing but padding."""
    generator = torch.Generator().manual_seed(sequence)
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    padding: Tensor | None = None
    if name == "single":
        starts[:] = True
    elif name in ("packed", "padded"):
        starts = torch.rand(batch, sequence, generator=generator) < 0.1
        starts[0, sequence // 2] = True
    starts[:, 0] = True
    if name == "padded":
        padding = torch.zeros(batch, sequence, dtype=torch.bool)
        for row in range(batch):
            begins = starts[row].nonzero().flatten().tolist()
            for begin, end in zip(begins, [*begins[1:], sequence], strict=True):
                tokens = int(torch.randint(1, end - begin + 1, (1,), generator=generator))
                padding[row, begin + tokens : end] = True
        starts[-1] = False
        starts[-1, 0] = True
        padding[-1] = True
    return Documents.from_starts(starts, padding)


NAMES = ("whole", "packed", "single", "padded")
