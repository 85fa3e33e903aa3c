"""Document layouts that the memory and attention tests go through."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.memory.documents import Documents


def layout(name: str, batch: int, sequence: int) -> Documents:
    """whole: one document a row. packed: random boundaries. single: every token a document. padded: packed, with
    padded document tails and a last row of nothing but padding. gaps: packed, padding anywhere but on starts."""
    generator = torch.Generator().manual_seed(sequence)
    starts = torch.zeros(batch, sequence, dtype=torch.bool)
    padding: Tensor | None = None
    if name == "single":
        starts[:] = True
    elif name in ("packed", "padded", "gaps"):
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
    if name == "gaps":
        padding = ~starts & (torch.rand(batch, sequence, generator=generator) < 0.3)
    return Documents.from_starts(starts, padding)


NAMES = ("whole", "packed", "single", "padded", "gaps")


def chunked(batch: int, sequence: int, size: int, seed: int = 0, padded: bool = True) -> Documents:
    """Documents that begin on multiples of `size`. `padded`: half of the chunks hold fewer tokens than that, a
    document's first one at least one, others perhaps none; the last row ends with two empty chunks."""
    generator = torch.Generator().manual_seed(seed)
    chunks = -(-sequence // size)
    begun = torch.rand(batch, chunks, generator=generator) < 0.2
    begun[:, 0] = True
    tokens = torch.full((batch, chunks), size)
    if padded:
        fewer = torch.randint(0, size, (batch, chunks), generator=generator)
        closed = torch.rand(batch, chunks, generator=generator) < 0.5
        tokens = torch.where(closed, torch.where(begun, fewer.clamp_min(1), fewer), tokens)
        tokens[-1, -2:], begun[-1, -2:] = 0, False
        tokens[-1, 0] = max(1, int(tokens[-1, 0]))
        begun[-1, 0] = True
    slots = torch.arange(sequence)
    starts = begun[:, slots // size] & (slots % size == 0)
    return Documents.from_starts(starts, slots % size >= tokens[:, slots // size])
