"""The block core: one softmax over a window, chunk summaries and recalled chunks.

softmax over every key that a query sees of scale * q k^T + bias of the key's level, times the values:
the `score` mixture (MKA, eq. 5-14) over the levels of sections 5.3-5.4, with λ_ℓ·exp(s) = exp(s + log λ_ℓ).

Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, N chunks of the row, h halo chunks,
w = window / C, H query heads, G KV heads, d head channels, R recalled chunks, M pages.

Query slot t of chunk i (chunk number c = first + i of its row) sees, of its own document only,

- L1: the tokens of its own chunk up to itself and those of the w - 1 chunks before;
- L2: one summary for every chunk numbered <= c - w that has a token;
- L3: the tokens of the chunks that index[b, i, g, :] names, which lie before the window.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mka_megatron.ops.block_attention import cuda, flex, reference
from mka_megatron.ops.block_attention.dispatch import choose as choose
from mka_megatron.ops.block_attention.layout import Layout

BACKENDS = {"cuda": cuda.attention, "flex": flex.attention, "reference": reference.attention}


class ChunkTable(Protocol):
    """The chunks of the whole rows; those at hand are [first, first + count). memory.Chunks is one."""

    @property
    def size(self) -> int:
        """C."""

    @property
    def lengths(self) -> Tensor:
        """[B, N] int64 tokens of each chunk, at its head; the rest of its slots is padding."""

    @property
    def documents(self) -> Tensor:
        """[B, N] int64, not decreasing over a row's chunks with tokens; -1 for a chunk without tokens."""

    @property
    def first(self) -> int:
        """First chunk at hand."""

    @property
    def count(self) -> int:
        """n = ceil(S / C)."""


class Recalled(Protocol):
    """The recalled chunks. memory.Pages is one."""

    @property
    def k(self) -> Tensor:
        """[B, G, M, C, d] rotated keys of the pages; M may be 0."""

    @property
    def v(self) -> Tensor:
        """[B, G, M, C, d] values."""

    @property
    def lengths(self) -> Tensor:
        """[B, G, M] int64 tokens of each page."""

    @property
    def index(self) -> Tensor:
        """[B, n, G, R] int64 into (h halo chunks, n chunks at hand, M pages); -1: none."""


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    recalled: Recalled | None,
    bias: Tensor | None,
    *,
    chunks: ChunkTable,
    window: int,
    scale: float,
    backend: str = "reference",
) -> Tensor:
    """The attention of the slots at hand; differentiable in every floating point tensor that goes in.

    Padding is invisible and its outputs are 0; its contents and (reference; cuda: but for gradients) those of other
    documents, be they NaN, change nothing. A later token, if finite, changes no bit of an earlier output. The
    arithmetic is fp32, fp64 for fp64; on tensor cores (cuda, flex) probabilities are rounded to q's dtype before they
    are multiplied by values.

    Args:
        q: [B, S, H, d] rotated queries; fp32, fp64, bf16 or fp16.
        k, v: [B, h*C + S, G, d] rotated keys and values of the h = min(w - 1, first) halo chunks, then of the slots.
        summaries: (k, v), [B, N', G, d] each: the chunks from the row's first to at least the last at hand,
            keys rotated; None: no L2.
        recalled: the chunks to recall; None: no L3. A chunk may be named once, and never one of the window.
        bias: [B, S, 1 or G, 3] added to the scaled scores of each level; -inf hides L2 or L3; None: 0.
        chunks: the chunk table.
        window: w * C tokens, from the row's own chunk on back; may exceed the row.
        scale: factor on the scores, usually 1/sqrt(d).
        backend: "cuda", "flex" or "reference", as :func:`choose` gives it.

    Returns:
        [B, S, H, d], dtype of q. Raises ValueError when the shapes contradict each other.
    """
    layout = Layout.of(q, k, v, summaries, recalled, bias, chunks, window, scale)
    pages = None if recalled is None else (recalled.k, recalled.v, recalled.lengths, recalled.index)
    tensors = (q, k, v, summaries, pages, bias, chunks.lengths, chunks.documents)
    return BACKENDS[backend](layout, *tensors)
