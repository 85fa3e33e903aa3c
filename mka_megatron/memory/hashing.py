"""L3's selection: which earlier chunks a chunk recalls, by hashed keys or (the yardstick) exact products.

A chunk is recalled by the last 16 queries of its document before it, averaged over a KV head's query heads, so that
training, prefill and decoding select alike. Keys and queries are those after q/k-norm, before RoPE.

Shapes: B batch, S slots at hand, N chunks of the row, n chunks at hand, H query heads, G KV heads, d head channels,
T tables, W words (or channels) of a signature, R recalled chunks, Q = 16 queries that select.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.ops import recall
from mka_megatron.ops.recall import cuda

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
        return recall.sign_codes(sums, self.hyperplanes)

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
        codes = recall.sign_codes(recent, self.hyperplanes)
        return recall.nearest_codes(codes, signatures, among, self.hyperplanes.shape[0], self.recalled)

    @property
    def hyperplanes(self) -> Tensor:
        """`planes`; raises ValueError where there are none."""
        if self.planes is None:
            raise ValueError("memory_hierarchy.l3.selection hash needs planes: pass hashing.planes(...).")
        return self.planes


@torch.no_grad()
def last_queries(q: Tensor, documents: Documents) -> Tensor:
    """[B, S, ...] queries at hand -> [B, Q, ...] those of the last 16 tokens, whatever their document, oldest first;
    zeros in front where there are fewer."""
    slots = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    if documents.padding is not None:
        slots = slots.masked_fill(documents.padding, -1)
    slots = F.pad(slots, (SELECTING_QUERIES, 0), value=-1)
    last = slots.topk(SELECTING_QUERIES, dim=1).values.flip(1)
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    return q[row, last.clamp_min(0)].masked_fill((last < 0)[..., None, None], 0)


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
    """ops.recall.chunk_means over the chunks at hand: [B, S, ...] -> [B, n, ...]."""
    return recall.chunk_means(x, chunks.at_hand(chunks.lengths), chunks.size)


def pooled(
    k: Tensor, v: Tensor, chunks: Chunks, selector: Selector | None, keys: Tensor | None = None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is kept of the chunks at hand.

    Args:
        k, v: [B, S, G, d] of the slots at hand.
        selector: None without recall.
        keys: [B, S, G, d] that select, where these are not `k`.
        backend: "reference" or "cuda", as ops.library.choose gives it.

    Returns:
        (mean keys, mean values [B, n, G, d], differentiable; :meth:`Selector.signature`, None without a selector).
    """
    if backend == "reference":
        signature = None if selector is None else selector.signature(k if keys is None else keys, chunks)
        return chunk_means(k, chunks), chunk_means(v, chunks), signature
    lengths = chunks.at_hand(chunks.lengths)
    if selector is None:
        return *cuda.means(k, v, lengths, chunks.size), None
    planes, centre = selector.hyperplanes, selector.key_bias
    if keys is None:
        return cuda.pool(k, v, lengths, chunks.size, planes, centre)
    return *cuda.means(k, v, lengths, chunks.size), cuda.codes(keys, lengths, chunks.size, planes, centre)


@torch.no_grad()
def select(
    q: Tensor,
    signatures: Tensor,
    documents: Documents,
    chunks: Chunks,
    selector: Selector,
    before: Callable[[Tensor], Tensor | None],
    window_chunks: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The chunks that those at hand recall.

    Args:
        q: [B, S, H, d] of the slots at hand.
        signatures: [B, N', G, W], of the row's chunks up to at least the last at hand.
        before: the last queries at hand -> those before slot 0, as memory.view.View.queries.
        window_chunks: chunks that are attended anyway, the own one included.
        backend: "reference" or "cuda", as ops.library.choose gives it.

    Returns:
        ([B, n, G, R] as :meth:`Selector.select` gives them, [B, Q, G, d] the last queries at hand).
    """
    groups = signatures.shape[2]
    last = selector.queries(last_queries(q, documents), groups)
    earlier = before(last)
    if backend == "reference":
        wanted = recent(selector.queries(q, groups), earlier, documents, chunks)
        return selector.select(wanted, signatures, chunks, window_chunks), last
    planes = selector.hyperplanes
    lengths, counts = chunks.at_hand(chunks.lengths), chunks.at_hand(chunks.first_positions)
    _, codes = cuda.recent_codes(q, earlier, lengths, counts, chunks.size, groups, planes)
    among = recall.Candidates(chunks.documents, chunks.first, chunks.count, window_chunks)
    return cuda.nearest_codes(codes, signatures, among, planes.shape[0], selector.recalled), last


@torch.no_grad()
def select_once(
    queries: Tensor, signatures: Tensor, chunks: Chunks, selector: Selector, window_chunks: int, *, backend: str
) -> Tensor:
    """The chunks that open chunks recall: none of their own queries has a part in it.

    Args:
        queries: [B, Q, G, d] those before the open chunks, as memory.view.View.queries gives them.
        signatures: [B, N, G, W] of the chunks before.
        chunks: of which the open ones are at hand.
        window_chunks, backend: as for :func:`select`.

    Returns:
        [B, 1, G, R] as :meth:`Selector.select` gives them.
    """
    lengths, counts = chunks.at_hand(chunks.lengths), chunks.at_hand(chunks.first_positions)
    wanted = recall.recent_sums(queries, queries, lengths, counts, chunks.size, SELECTING_QUERIES)
    if backend == "reference":
        return selector.select(wanted, signatures, chunks, window_chunks)
    planes = selector.hyperplanes
    among = recall.Candidates(chunks.documents, chunks.first, chunks.count, window_chunks)
    codes = recall.sign_codes(wanted, planes)
    return cuda.nearest_codes(codes, signatures, among, planes.shape[0], selector.recalled)


def recall_at(found: Tensor, wanted: Tensor) -> float:
    """Share of the chunks in `wanted` [..., R] that `found` [..., R'] has too (-1: none); 1 if none is wanted."""
    hits = (wanted[..., :, None] == found[..., None, :]).any(dim=-1) & (wanted >= 0)
    total = int((wanted >= 0).sum())
    return int(hits.sum()) / total if total else 1.0
