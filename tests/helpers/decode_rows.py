"""Rows of chunks that the decode goes through token by token.

Shapes: B rows, S slots, C chunk size, n chunks, H query heads, G KV heads, d channels, R recalled chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.attention.rope import apply_rope
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.ops import decode
from mka_megatron.ops.decode import Cache, Hashing
from tests.helpers import oracle

F64 = torch.float64
SCALE = 0.3
# tokens of each chunk of size 4; the rows differ in length, and chunks with fewer tokens are closed early
ROWS = [[4] * 9 + [2], [4, 1, 4, 3, 4, 4, 2, 4, 4, 4, 1], [3, 4, 4, 4]]


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


class Rows:
    """Random tokens in chunks of C, as whole rows [B, S, ...] with gaps."""

    def __init__(self, rows: list[list[int]], size: int, heads: int, groups: int, channels: int) -> None:
        torch.manual_seed(0)
        self.rows, self.size = rows, size
        chunks = max(map(len, rows))
        table = torch.tensor([row + [0] * (chunks - len(row)) for row in rows])
        slots = torch.arange(chunks * size)
        padding = slots % size >= table[:, slots // size]
        starts = torch.zeros_like(padding)
        starts[:, 0] = True
        self.documents = Documents.from_starts(starts, padding)
        self.chunks = Chunks.of(self.documents, size)
        shape = (len(rows), chunks * size)
        # queries and keys that share a direction, so that selection has something to find
        self.q = torch.randn(*shape, heads, channels, dtype=F64) + 0.3
        self.k = torch.randn(*shape, groups, channels, dtype=F64) + 2.0
        self.v = torch.randn(*shape, groups, channels, dtype=F64)
        self.logits = torch.randn(*shape, groups, 3, dtype=F64)
        self.cos, self.sin = oracle.tables(self.documents.positions, channels, 1e4)

    def rotate(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return apply_rope(x, self.cos, self.sin)
        return apply_rope(x, *oracle.tables(positions, x.shape[-1], 1e4))

    def tokens(self) -> list[list[tuple[int, bool]]]:
        """Per row its tokens' slots, and whether the token ends its chunk."""
        return [
            [(n * self.size + t, t + 1 == count) for n, count in enumerate(row) for t in range(count)]
            for row in self.rows
        ]


def new_cache(rows: Rows, l2: bool, hashing: Hashing | None, recalled: int, dtype: torch.dtype = F64) -> Cache:
    """Pages in random order, everything that no token was written to NaN."""
    batch, chunks = rows.chunks.lengths.shape
    groups, channels = rows.k.shape[2:]
    words = 0 if hashing is None else hashing.planes[..., 0].numel() // 64
    cache = Cache.empty(
        batch, groups, channels, chunks=chunks + 1, size=rows.size, pages=batch * groups * (chunks + 1) + 3,
        dtype=dtype, summaries=l2, words=words, recalled=recalled,
    )  # fmt: skip
    order = torch.randperm(len(cache.k))[: cache.table.numel()]
    cache.table.copy_(order.view_as(cache.table))
    for x in (cache.k, cache.v, cache.summary_k, cache.summary_v):
        if x is not None:
            x.fill_(float("nan"))
    return cache


def generate(
    rows: Rows, cache: Cache, hashing: Hashing | None, window: int, bias: bool, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """(outputs [B, S, H, d], recalled [B, n, G, R]) of the rows' tokens, a token of every row at a time."""
    out = torch.zeros_like(rows.q)
    groups = rows.k.shape[2]
    width = 1 if cache.recalled is None else cache.recalled.shape[2]
    recalled = torch.full((len(rows.rows), rows.chunks.count, groups, width), -1)
    tokens = rows.tokens()
    normed_q, normed_k = norm(rows.q), norm(rows.k)
    rotated_q, rotated_k = rows.rotate(normed_q, None), rows.rotate(normed_k, None)
    batch = torch.arange(len(tokens))
    for step in range(max(map(len, tokens))):
        ended = torch.tensor([step >= len(row) for row in tokens])
        cache.chunk[ended] = -1
        at, last = (torch.tensor(x) for x in zip(*(row[min(step, len(row) - 1)] for row in tokens), strict=True))
        now = (batch, at)
        decode.append(cache, normed_q[now], normed_k[now], rotated_k[now], rows.v[now], backend=backend)
        found = decode.attend(
            cache, rotated_q[now], rows.logits[now] if bias else None, window=window, scale=SCALE, backend=backend
        )
        assert not bool(found[ended].any())
        here = ~ended
        out[batch[here], at[here]] = found[here]
        if cache.recalled is not None:
            recalled[batch[here], (at // rows.size)[here]] = cache.recalled[here].long()
        decode.close(cache, rows.cos[now], rows.sin[now], hashing, window=window, force=last, backend=backend)
    return out, recalled
