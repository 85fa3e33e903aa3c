"""L3's selection: which earlier chunks a chunk recalls, by hashed keys or (the yardstick) exact products.

A chunk is recalled by the last 16 queries of its document before it, averaged over a KV head's query heads, so that
training, prefill and decoding select alike. Keys and queries are those after q/k-norm, before RoPE.

Shapes: B batch, S slots at hand, N chunks of the row, n chunks at hand, H query heads, G KV heads, d head channels,
T tables, W words (or channels) of a signature, R recalled chunks, Q = 16 queries that select.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.ops import recall

SELECTING_QUERIES = 16
"""Tokens before a chunk whose mean query selects its recalled chunks."""


def planes(seed: int, tables: int, bits: int, channels: int) -> Tensor:
    """Random hyperplanes [T, bits, d] int8 of +-1, the same on every machine.

    Raises ValueError when bits is no positive multiple of 64, or tables or channels is not positive.
    """
    if bits < 1 or bits % 64:
        raise ValueError(f"memory_hierarchy.l3.hash_bits is {bits}: give a multiple of 64.")
    if tables < 1 or channels < 1:
        raise ValueError(f"{tables} hash tables over {channels} channels: both must be positive.")
    count = tables * bits * channels
    stream = hashlib.shake_256(f"mka planes {seed}".encode()).digest(-(-count // 8))
    sides = np.unpackbits(np.frombuffer(stream, np.uint8), count=count).astype(np.int8)
    return torch.from_numpy(2 * sides - 1).view(tables, bits, channels)


@dataclass(frozen=True, eq=False)
class Selector:
    """How the chunks to recall are chosen; equal inputs give equal choices on every rank and device."""

    kind: Literal["hash", "exact"]
    """Nearest codes by Hamming distance, or largest products with the mean keys."""
    recalled: int
    """R."""
    planes: Tensor | None = None
    """hash: [T, bits, d] of +-1; exact selection does not read them."""
    key_bias: Tensor | None = None
    """[G, d] that all keys share, removed from them: without that a large one collapses the codes."""

    @torch.no_grad()
    def signature(self, k: Tensor, chunks: Chunks) -> Tensor:
        """What is kept of a chunk to find it: [B, n, G, W] of the chunks at hand.

        Args:
            k: [B, S, G, d] keys of the slots at hand.

        Returns:
            hash: int64 codes of the summed keys, W = T * bits / 64. exact: fp64 mean keys, W = d.
        """
        lengths = chunks.at_hand(chunks.lengths)
        sums = recall.chunk_sums(k, lengths, chunks.size, self.key_bias)
        if self.kind == "exact":
            return recall.centred_means(sums, lengths)
        return recall.sign_codes(sums, self._planes)

    @torch.no_grad()
    def queries(self, q: Tensor, groups: int) -> Tensor:
        """[B, S, H, d] queries -> [B, S, G, d] fp64 integers: fixed point, summed over a KV head's query heads."""
        # [B, S, H, d] -> [B, S, G, H/G, d]
        heads = q.unflatten(2, (groups, -1)).unbind(3)
        total = recall.fixed_point(heads[0])
        for head in heads[1:]:
            total += recall.fixed_point(head)
        return total

    @torch.no_grad()
    def select(self, recent: Tensor, signatures: Tensor, chunks: Chunks, window_chunks: int) -> Tensor:
        """The R chunks that each chunk at hand recalls, of its document, at least `window_chunks` back.

        Args:
            recent: [B, n, G, d] fp64 integers, from :func:`recent`.
            signatures: [B, N', G, W], of the row's chunks up to at least the last at hand.
            window_chunks: chunks that are attended anyway, the own one included.

        Returns:
            [B, n, G, R] int64 chunk numbers of the row, ascending, then -1 where there are fewer. Ties go to the
            lower number.
        """
        among = recall.Candidates(chunks.documents, chunks.first, chunks.count, window_chunks)
        if self.kind == "exact":
            return recall.largest_products(recent, signatures, among, self.recalled)
        codes = recall.sign_codes(recent, self._planes)
        return recall.nearest_codes(codes, signatures, among, self._planes.shape[0], self.recalled)

    @property
    def _planes(self) -> Tensor:
        if self.planes is None:
            raise ValueError("memory_hierarchy.l3.selection hash needs planes: pass hashing.planes(...).")
        return self.planes


@torch.no_grad()
def last_queries(fixed: Tensor, documents: Documents) -> Tensor:
    """[B, S, G, d] selecting queries at hand -> [B, Q, G, d] those of the last 16 tokens, whatever their document,
    oldest first; zeros in front where there are fewer."""
    slots = torch.arange(fixed.shape[1], device=fixed.device).expand(fixed.shape[:2])
    if documents.padding is not None:
        slots = slots.masked_fill(documents.padding, -1)
    slots = F.pad(slots, (SELECTING_QUERIES, 0), value=-1)
    last = slots.topk(SELECTING_QUERIES, dim=1).values.flip(1)
    row = torch.arange(fixed.shape[0], device=fixed.device)[:, None]
    return fixed[row, last.clamp_min(0)].masked_fill((last < 0)[..., None, None], 0)


@torch.no_grad()
def recent(fixed: Tensor, before: Tensor | None, documents: Documents, chunks: Chunks) -> Tensor:
    """What each chunk at hand selects by: the sum over the last min(16, all) tokens of its document before it.

    Args:
        fixed: [B, S, G, d] fp64 integers, from :meth:`Selector.queries`.
        before: [B, Q, G, d], the last 16 before slot 0 as :func:`last_queries` gives them; None: there are none.

    Returns:
        [B, n, G, d] fp64 integers.
    """
    lengths, counts = chunks.at_hand(chunks.lengths), chunks.at_hand(chunks.first_positions)
    return recall.recent_sums(fixed, before, lengths, counts, chunks.size, SELECTING_QUERIES)


def chunk_means(x: Tensor, chunks: Chunks) -> Tensor:
    """Mean over the tokens of each chunk at hand, summed in fp32 (fp64 for fp64) in an order of its own.

    Args:
        x: [B, S, ...] of the slots at hand.

    Returns:
        [B, n, ...], dtype of x; 0 for a chunk without tokens. Differentiable once.
    """
    return _ChunkMeans.apply(x, chunks.at_hand(chunks.lengths), chunks.size)


def recall_at(found: Tensor, wanted: Tensor) -> float:
    """Share of the chunks in `wanted` [..., R] that `found` [..., R'] has too (-1: none); 1 if none is wanted."""
    hits = (wanted[..., :, None] == found[..., None, :]).any(dim=-1) & (wanted >= 0)
    total = int((wanted >= 0).sum())
    return int(hits.sum()) / total if total else 1.0


class _ChunkMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(lengths)
        ctx.size, ctx.slots = size, x.shape[1]
        part = _chunked(x, lengths, size)
        # halves onto halves: every chunk's sum has the same order, wherever it lies and whatever lies beside it
        while part.shape[2] > 1:
            half = (part.shape[2] + 1) // 2
            rest = part[:, :, half:]
            part = part[:, :, :half]
            part[:, :, : rest.shape[2]] += rest
        return (part[:, :, 0] / _broadcast(lengths.clamp_min(1), part[:, :, 0])).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (lengths,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        share = (grad.to(wide) / _broadcast(lengths.clamp_min(1), grad)).to(grad.dtype)
        spread = share[:, :, None].expand(-1, -1, ctx.size, *grad.shape[2:])
        # [B, n, C, ...] -> [B, S, ...]
        return _cleared(spread, lengths).flatten(1, 2)[:, : ctx.slots], None, None


def _chunked(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, n, C, ...] in fp32 or wider, 0 on padding."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = lengths.shape[1] * size - x.shape[1]
    wide = F.pad(wide, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else wide
    return _cleared(wide.unflatten(1, (-1, size)), lengths)


def _cleared(x: Tensor, lengths: Tensor) -> Tensor:
    """[B, n, C, ...] with 0 on padding, a new tensor."""
    empty = torch.arange(x.shape[2], device=x.device) >= lengths[..., None]
    return x.masked_fill(empty.view(empty.shape + (1,) * (x.dim() - 3)), 0)


def _broadcast(counts: Tensor, like: Tensor) -> Tensor:
    return counts.view(counts.shape + (1,) * (like.dim() - 2))
