"""What a layer remembers of the sequences that are being generated: paged keys and values, summaries, codes, and the
open chunk's sums. Shapes as in the package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SELECTING_QUERIES = 16
"""Q, as memory.hashing has it."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Tensors that :func:`fuse`, :func:`append` and :func:`close` change in place.

    Who owns the cache allots pages: table[b, g, chunk[b]] must name one before a token is appended to that chunk.
    """

    k: Tensor
    """[P, C, d] rotated keys, one page per (sequence, KV head, chunk)."""
    v: Tensor
    """[P, C, d] values."""
    table: Tensor
    """[B, G, N] int32 page of every chunk; -1: it has none here and is not attended token by token."""
    lengths: Tensor
    """[B, N] int32 tokens of every chunk, at its head; 0 behind the open one."""
    chunk: Tensor
    """[B] int32 number of the open chunk; -1: the sequence is idle, nothing of it changes and its outputs are 0."""
    position: Tensor
    """[B] int64 tokens of the sequence so far."""
    summary_k: Tensor | None
    """[B, G, N, d] mean keys of the closed chunks, rotated at their last positions; None without L2."""
    summary_v: Tensor | None
    """[B, G, N, d] mean values."""
    sum_k: Tensor | None
    """[B, G, d] fp32 (fp64 for fp64 keys) sum over the open chunk of the keys after k-norm, before RoPE."""
    sum_v: Tensor | None
    """[B, G, d] the same of the values."""
    codes: Tensor | None
    """[B, G, N, W] int64 codes of the closed chunks; None without L3."""
    recalled: Tensor | None
    """[B, G, R] int32 chunks that the open chunk recalls, ascending, then -1."""
    code_sum: Tensor | None
    """[B, G, d] int64 fixed-point sum over the open chunk of the keys that sum_k sums."""
    queries: Tensor | None
    """[B, Q, G, d] int64 fixed-point selecting queries, summed over a KV head's query heads; position p's is in p % Q."""
    ema_k: Tensor | None
    """[B, G, d] fp32 (fp64) state of L2 after the last token, of raw keys; None where nothing is fused."""
    ema_v: Tensor | None
    """[B, G, d] the same of raw values."""
    arrived: Tensor
    """[B, G] int32 zeros, which the kernels count in."""

    @staticmethod
    def empty(
        batch: int,
        groups: int,
        channels: int,
        *,
        chunks: int,
        size: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        summaries: bool = True,
        words: int = 0,
        recalled: int = 0,
        ema: bool = False,
    ) -> Cache:
        """The cache before the first token: chunk 0 is open, no page is allotted.

        Args:
            chunks: N, most chunks of a sequence. size: C. pages: P, of all sequences and KV heads.
            words: W of a code, 0 without L3. recalled: R.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        def state(wanted: bool, *shape: int, of: torch.dtype = wide) -> Tensor | None:
            return zeros(*shape, of=of) if wanted else None

        head = (batch, groups, channels)
        return Cache(
            k=zeros(pages, size, channels, of=dtype),
            v=zeros(pages, size, channels, of=dtype),
            table=zeros(batch, groups, chunks, of=torch.int32) - 1,
            lengths=zeros(batch, chunks, of=torch.int32),
            chunk=zeros(batch, of=torch.int32),
            position=zeros(batch, of=torch.int64),
            summary_k=state(summaries, batch, groups, chunks, channels, of=dtype),
            summary_v=state(summaries, batch, groups, chunks, channels, of=dtype),
            sum_k=state(summaries, *head),
            sum_v=state(summaries, *head),
            codes=state(words > 0, batch, groups, chunks, words, of=torch.int64),
            recalled=zeros(batch, groups, recalled, of=torch.int32) - 1 if words > 0 else None,
            code_sum=state(words > 0, *head, of=torch.int64),
            queries=state(words > 0, batch, SELECTING_QUERIES, groups, channels, of=torch.int64),
            ema_k=state(ema, *head),
            ema_v=state(ema, *head),
            arrived=zeros(batch, groups, of=torch.int32),
        )


@dataclass(frozen=True, eq=False)
class Hashing:
    """How a closed chunk gets its code, and the next one its recalled chunks."""

    planes: Tensor
    """[T, bits, d] int8 of +-1."""
    key_bias: Tensor | None
    """[G, d] that all keys share, taken from the code's sums as fixed point."""
