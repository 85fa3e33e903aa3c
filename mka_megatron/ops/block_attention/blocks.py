"""The blocks of a row: which keys a block's queries see, its outputs, its gradients.

Shapes: S slots at hand, C chunk size, N chunks of the row, n chunks at hand, m chunks of a block, H query heads, G KV
heads, F = H/G query heads of a KV head, d channels, P places (chunks that can be gathered: halo, at hand, pages,
one of zeros), J chunks of a tile, U summaries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.ops.block_attention.layout import Run
from mka_megatron.ops.block_attention.rows import Gradients, Row

BLOCK_SCORES = 1 << 21
"""Scores of a block, about: 8 MiB in fp32, so that the passes over them stay in a CPU's cache."""

_INFINITY = float("inf")


@dataclass(frozen=True)
class Block:
    at: slice
    """Its chunks among the n at hand."""
    window: int
    """The first slots of a tile are the window, its own chunk last; the rest is recalled."""
    places: Tensor
    """[G*m*J] where its tiles' chunks lie in [G*P]."""
    hidden: Tensor | None
    """[G, m, 1, 1, J*C] to add to the scores: -inf on slots without a token; None: there are none."""
    summaries: slice
    """Those that its last chunk sees, among the N of the row."""
    later: Tensor
    """[m, 1, 1, U] to add to the scores: -inf on the summaries that a chunk does not see."""


def blocks(row: Row, runs: list[Run]) -> Iterator[Block]:
    layout, device = row.layout, row.q.device
    size = layout.size
    groups, places = row.lengths.shape
    queries = row.q.shape[0] * row.q.shape[2] * size
    recalled = 0 if row.index is None else row.index.shape[2]
    for run in runs:
        window = min(layout.window, run.end - run.origin)
        begin = run.begin
        while begin < run.end:
            keys = (window + recalled) * size + max(begin - layout.window - run.origin, 0)
            end = min(run.end, begin + max(1, BLOCK_SCORES // (queries * keys)))
            numbers = torch.arange(begin, end, device=device)
            at = slice(begin - layout.first, end - layout.first)
            # there is nothing to summarise or recall before the first window
            outside = max(run.origin, end - layout.window)

            # [m, w]: the window by number in the row, then by place; none before the document's first chunk
            near = numbers[:, None] + torch.arange(1 - window, 1, device=device)
            near = torch.where(near < run.origin, places - 1, near - layout.first + layout.halo)
            tile = near.expand(groups, -1, -1)
            if row.index is not None and outside > run.origin:
                tile = torch.cat([tile, row.index[:, at]], dim=2)
            # [G, m, J] -> [G*m*J]
            tile = (tile + torch.arange(groups, device=device)[:, None, None] * places).flatten()
            blank = torch.arange(size, device=device) >= row.lengths.flatten()[tile, None]
            hidden = _minus_infinity(blank, row.q).view(groups, len(numbers), 1, 1, -1)

            seen = slice(run.origin, run.origin if row.summary_k is None else outside)
            summarised = torch.arange(seen.start, seen.stop, device=device)
            later = (summarised > numbers[:, None] - layout.window) | row.empty[seen]
            yield Block(
                at=at,
                window=window * size,
                places=tile,
                hidden=hidden if bool(blank.any()) else None,
                summaries=seen,
                later=_minus_infinity(later, row.q)[:, None, None],
            )
            begin = end


@dataclass(frozen=True)
class _Part:
    """Keys that are multiplied at once, their scores, and which of their columns belong to which level."""

    keys: Tensor
    """[X, Y, d]: X = G*m and Y = J*C, or X = G and Y = U."""
    values: Tensor
    scores: Tensor
    """[G, m, F, C, Y]."""
    levels: list[tuple[int, slice]]


def _parts(row: Row, block: Block, q: Tensor) -> list[_Part]:
    """The scores of q [G, m, F, C, d], without the bias."""
    groups, chunks, fan, size, channels = q.shape
    # [G, P, C, d] -> [G*m, J*C, d]
    keys, values = (
        x.flatten(0, 1).index_select(0, block.places).view(groups * chunks, -1, channels)
        for x in (row.keys, row.values)
    )
    scores = torch.bmm(q.view(groups * chunks, -1, channels), keys.mT).view(groups, chunks, fan, size, -1)
    if block.hidden is not None:
        scores += block.hidden
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores[..., block.window - size : block.window].masked_fill_(future, -_INFINITY)
    levels = [(0, slice(0, block.window)), (2, slice(block.window, None))]
    parts = [_Part(keys, values, scores, levels if scores.shape[-1] > block.window else levels[:1])]
    if (
        row.summary_k is not None
        and row.summary_v is not None
        and block.summaries.stop > block.summaries.start
    ):
        keys, values = row.summary_k[:, block.summaries], row.summary_v[:, block.summaries]
        # [G, m*F*C, U] -> [G, m, F, C, U]
        scores = torch.bmm(q.view(groups, -1, channels), keys.mT).view(groups, chunks, fan, size, -1)
        scores += block.later
        parts.append(_Part(keys, values, scores, [(1, slice(None))]))
    return parts


def _exponentiate(row: Row, block: Block, parts: list[_Part], base: Tensor) -> None:
    """scores -> exp(scores + bias - base) in place; base: [G, m, F, C]."""
    for part in parts:
        for level, columns in part.levels:
            constant = base if row.bias is None else base - row.bias[level, :, block.at, None]
            part.scores[..., columns].sub_(constant[..., None])
        part.scores.exp_()


def block_forward(row: Row, block: Block) -> tuple[Tensor, Tensor]:
    """A block's outputs [G, m, F, C, d] and their logsumexp [G, m, F, C]."""
    q = row.q[:, block.at].contiguous()
    parts = _parts(row, block, q)
    largest = q.new_full(q.shape[:-1], -_INFINITY)
    for part in parts:
        for level, columns in part.levels:
            highest = part.scores[..., columns].amax(dim=-1)
            if row.bias is not None:
                highest += row.bias[level, :, block.at, None]
            largest = torch.maximum(largest, highest)
    largest.masked_fill_(largest == -_INFINITY, 0)
    _exponentiate(row, block, parts, largest)
    total = torch.zeros_like(largest)
    out = torch.zeros_like(q)
    for part in parts:
        total += part.scores.sum(dim=-1)
        out.view(len(part.keys), -1, q.shape[-1]).baddbmm_(_rows(part.scores, part.keys), part.values)
    nothing = total == 0
    lse = (largest + total.log()).masked_fill_(nothing, _INFINITY)
    return out.div_(total.masked_fill_(nothing, 1)[..., None]), lse


def block_backward(row: Row, block: Block, grad: Tensor, lse: Tensor, found: Gradients) -> None:
    """Adds to `found` a block's part, given the gradients of its outputs [G, m, F, C, d]."""
    grad = grad.contiguous()
    q = row.q[:, block.at].contiguous()
    parts = _parts(row, block, q)
    _exponentiate(row, block, parts, lse)
    weighted, grad_values = [], []
    total = torch.zeros_like(lse)
    for part in parts:
        probabilities, outer = _rows(part.scores, part.keys), grad.view(len(part.keys), -1, grad.shape[-1])
        grad_values.append(torch.bmm(probabilities.mT, outer))
        product = torch.bmm(outer, part.values.mT).mul_(probabilities)
        weighted.append(product.view_as(part.scores))
        total += weighted[-1].sum(dim=-1)
    grad_q = torch.zeros_like(q)
    for part, change, grad_v in zip(parts, weighted, grad_values, strict=True):
        # P * (dP - sum(P * dP)): of the scores
        change -= part.scores.mul_(total[..., None])
        for level, columns in part.levels:
            found.bias[level, :, block.at] += change[..., columns].sum(dim=-1).sum(dim=2)
        flat = _rows(change, part.keys)
        grad_q.view(len(part.keys), -1, q.shape[-1]).baddbmm_(flat, part.keys)
        grad_k = torch.bmm(flat.mT, q.view(len(part.keys), -1, q.shape[-1]))
        if part is parts[0]:
            # [G*m, J*C, d] -> [G*m*J, C, d]
            found.keys.flatten(0, 1).index_add_(0, block.places, grad_k.view(-1, *row.keys.shape[2:]))
            found.values.flatten(0, 1).index_add_(0, block.places, grad_v.view(-1, *row.keys.shape[2:]))
        elif found.summary_k is not None and found.summary_v is not None:
            found.summary_k[:, block.summaries] += grad_k
            found.summary_v[:, block.summaries] += grad_v
    found.q[:, block.at] = grad_q


def _minus_infinity(where: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(where.shape).masked_fill_(where, -_INFINITY)


def _rows(x: Tensor, keys: Tensor) -> Tensor:
    """[G, m, F, C, Y] -> [X, rows, Y], as many X as `keys` has."""
    return x.view(keys.shape[0], -1, x.shape[-1])
