"""The scan over time that summaries are made of: z_t = u_t + rate * z_{t-1} within documents, and its adjoint.

Shapes: B batch, S sequence, C channels, N chunks of T slots (N*T >= S).

It runs chunk-wise: local scans over all chunks at once (T vector operations), the states from chunk to chunk
(N operations), then every slot's share of the state that entered its chunk: about 2*sqrt(S) operations of
elementwise arithmetic in time order. So a slot's bits depend on nothing later and on no other document.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mka_megatron.ops.scan.rows import Rows


def allocate(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer for :func:`scan_`, [B, N*T, ...] with a zeroed tail, and its [B, S, ...] part, not yet filled."""
    batch, sequence, *channels = like.shape
    chunk = _chunk(sequence)
    buffer = like.new_empty(batch, -(-sequence // chunk) * chunk, *channels, dtype=dtype)
    buffer[:, sequence:] = 0
    return buffer, buffer[:, :sequence]


def scan_(
    buffer: Tensor,
    rate: Tensor | None,
    documents: Rows,
    carry: Tensor | None = None,
    *,
    reverse: bool = False,
) -> None:
    """In place z_t += rate * z_{t-1} unless t is a document's start; reverse: z_t += rate * z_{t+1} unless t+1 is.

    Padding is scanned like tokens: what follows it is a start or nothing, for `documents` have no gaps.

    Args:
        buffer: [B, N*T, ...] contiguous, from :func:`allocate`.
        rate: of shape buffer.shape[2:]; None is 1.
        carry: [B, ...], the z before slot 0, which is then no start; not with `reverse`.
    """
    plan = documents.once(_backward_plan if reverse else _forward_plan)
    chunk = _chunk(documents.starts.shape[1])
    batch, blocks = buffer.shape[0], buffer.shape[1] // chunk
    # [B, N*T, ...] -> [B*N, T, C]
    z = buffer.view(batch * blocks, chunk, -1)
    factor = None if rate is None else rate.reshape(-1)
    places = range(chunk - 1, -1, -1) if reverse else range(chunk)
    chunks = range(blocks - 1, -1, -1) if reverse else range(blocks)

    steps = z.unbind(1)
    for before, now in pairwise(places):
        if now not in plan.sealed:
            _add(steps[now], steps[before], factor)
            continue
        sealed = plan.sealed[now]
        kept = steps[now][sealed]
        _add(steps[now], steps[before], factor)
        steps[now][sealed] = kept

    leaving = steps[places[-1]].view(batch, blocks, -1)
    entering = torch.zeros_like(leaving)
    if carry is not None:
        entering[:, chunks[0]] = carry.reshape(batch, -1)
    through = None if factor is None else factor**chunk
    for before, now in pairwise(chunks):
        passing = entering[:, before]
        if before in plan.closed:
            passing = passing.index_fill(0, plan.closed[before], 0)
        entering[:, now] = leaving[:, before]
        _add(entering[:, now], passing, through)

    share = entering.view(batch * blocks, 1, -1)
    powers = None
    if factor is not None:
        exponents = torch.arange(1, chunk + 1, device=z.device, dtype=z.dtype)
        powers = factor ** (exponents.flip(0) if reverse else exponents)[:, None]
    if plan.open is None:
        _add(z, share, powers)
        return
    part = z[plan.broken]
    _add(part, torch.where(plan.open, share[plan.broken], 0), powers)
    _add(z, share, powers)
    z[plan.broken] = part


@dataclass(frozen=True)
class _Plan:
    """Where a scan stops: sealed slots take nothing from the slot before them in scan order."""

    sealed: dict[int, Tensor]
    """Place in a chunk -> int64 indices into [B*N] of the chunks sealed there."""
    closed: dict[int, Tensor]
    """Chunk of a row -> int64 rows whose chunk holds a sealed slot, so that no state passes through."""
    broken: Tensor | None
    """[K] int64 indices into [B*N] of all such chunks; None: there are none."""
    open: Tensor | None
    """[K, T, 1] bool: slots that the state entering a broken chunk still reaches."""


def _forward_plan(documents: Rows) -> _Plan:
    return _plan(documents, reverse=False)


def _backward_plan(documents: Rows) -> _Plan:
    return _plan(documents, reverse=True)


def _plan(documents: Rows, reverse: bool) -> _Plan:
    chunk = _chunk(documents.starts.shape[1])
    blocks = -(-documents.starts.shape[1] // chunk)
    device = documents.starts.device
    sealed: dict[int, list[int]] = defaultdict(list)
    first: dict[int, int] = {}
    for row, begin, _ in documents.spans:
        if begin:
            block, place = divmod(row * blocks * chunk + begin - int(reverse), chunk)
            sealed[place].append(block)
            steps = chunk - 1 - place if reverse else place
            first[block] = min(first.get(block, chunk), steps)
    if not first:
        return _Plan({}, {}, None, None)
    closed: dict[int, list[int]] = defaultdict(list)
    for block in first:
        closed[block % blocks].append(block // blocks)
    steps_taken = torch.arange(chunk)
    if reverse:
        steps_taken = steps_taken.flip(0)
    reach = torch.tensor(list(first.values()))
    return _Plan(
        {place: torch.tensor(which, device=device) for place, which in sealed.items()},
        {block: torch.tensor(rows, device=device) for block, rows in closed.items()},
        torch.tensor(list(first), device=device),
        (steps_taken < reach[:, None])[..., None].to(device),
    )


def _chunk(sequence: int) -> int:
    """T: the power of two near sqrt(S), the lower one when in doubt (fewer, larger operations per slot)."""
    return 2 ** round(math.log2(sequence) / 2 - 0.25)


def _add(target: Tensor, source: Tensor, factor: Tensor | None) -> None:
    if factor is None:
        target.add_(source)
    else:
        target.addcmul_(source, factor)
