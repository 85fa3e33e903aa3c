"""One row of a batch as the reference computes with it.

Shapes: S slots at hand, C chunk size, N chunks of the row, n chunks at hand, m chunks of a block, H query heads, G KV
heads, F = H/G query heads of a KV head, d channels, P places (chunks that can be gathered: halo, at hand, pages,
one of zeros), J chunks of a tile, U summaries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.ops.block_attention.layout import Layout


@dataclass(frozen=True)
class Row:
    """One row's operands in the dtype of the arithmetic, with zeros for padding."""

    layout: Layout
    tokens: Tensor
    """[n, C] bool: a token at hand."""
    q: Tensor
    """[G, n, F, C, d], scaled."""
    keys: Tensor
    """[G, P, C, d]."""
    values: Tensor
    """[G, P, C, d]."""
    lengths: Tensor
    """[G, P] tokens of each."""
    index: Tensor | None
    """[G, n, R] recalled, as places in P."""
    summary_k: Tensor | None
    """[G, N', d]."""
    summary_v: Tensor | None
    empty: Tensor
    """[N] bool: chunks without a token, whose summaries nobody sees."""
    bias: Tensor | None
    """[3, G or 1, n, C]."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of the fields of a row of the same name; the bias's for every KV head."""

    q: Tensor
    keys: Tensor
    values: Tensor
    summary_k: Tensor | None
    summary_v: Tensor | None
    bias: Tensor

    @staticmethod
    def zeros(row: Row) -> Gradients:
        """To add to."""
        q, keys, values = (torch.zeros_like(x) for x in (row.q, row.keys, row.values))
        summary_k, summary_v = (
            None if x is None else torch.zeros_like(x) for x in (row.summary_k, row.summary_v)
        )
        groups, chunks, _, size, _ = q.shape
        return Gradients(q, keys, values, summary_k, summary_v, q.new_zeros(3, groups, chunks, size))


def operands(layout: Layout, tensors: Sequence[Any], row: int) -> Row:
    """Row `row` of (q, k, v, summaries' k and v, pages' k and v, bias, lengths, page lengths, index)."""
    arguments: list[Any] = [None if x is None else x[row] for x in tensors]
    q, k, v, summary_k, summary_v, page_k, page_v, bias, table, page_lengths, index = arguments
    size, groups, wide = layout.size, k.shape[1], wide_dtype(q)
    slots = torch.arange(size, device=q.device)
    lengths = table[layout.first - layout.halo : layout.first + layout.count].expand(groups, -1)
    held = lengths.shape[1]
    if page_lengths is not None:
        lengths = torch.cat([lengths, page_lengths], dim=1)
    lengths = F.pad(lengths, (0, 1))
    tokens = slots < lengths[..., None]

    def bank(x: Tensor, pages: Tensor | None) -> Tensor:
        filled = x.new_empty(*tokens.shape, x.shape[-1], dtype=wide)
        # [h*C + S, G, d] -> [G, h + n, C, d]
        filled[:, :held] = keep(_chunked(x, size).permute(2, 0, 1, 3), tokens[:, :held])
        if pages is not None and pages.shape[1]:
            filled[:, held:-1] = keep(pages, tokens[:, held:-1])
        filled[:, -1] = 0
        return filled

    own = tokens[0, held - layout.count : held]
    return Row(
        layout=layout,
        tokens=own,
        q=keep(to_heads(q, layout, groups), own[:, None]) * layout.scale,
        keys=bank(k, page_k),
        values=bank(v, page_v),
        lengths=lengths,
        # [n, G, R] -> [G, n, R]
        index=None if index is None else torch.where(index < 0, lengths.shape[1] - 1, index).transpose(0, 1),
        summary_k=None if summary_k is None else _summaries(summary_k, table, wide),
        summary_v=None if summary_v is None else _summaries(summary_v, table, wide),
        empty=table == 0,
        # [S, G or 1, 3] -> [n, C, G or 1, 3] -> [3, G or 1, n, C]
        bias=None
        if bias is None
        else keep(_chunked(bias, size).to(wide), own[..., None]).permute(3, 2, 0, 1),
    )


def of_arguments(row: Row, found: Gradients, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, the summaries' k and v, the pages' k and v and the bias from those of the row.

    q, k: [S, H, d], [h*C + S, G, d]: the row's arguments, for their shapes.
    """
    held = row.layout.halo + row.layout.count
    tokens = torch.arange(row.layout.size, device=q.device) < row.lengths[..., None]

    def slots(x: Tensor) -> Tensor:
        # [G, h + n, C, d] -> [h*C + S, G, d]
        return keep(x[:, :held], tokens[:, :held]).flatten(1, 2)[:, : len(k)].transpose(0, 1)

    def pages(x: Tensor) -> Tensor | None:
        return keep(x[:, held:-1], tokens[:, held:-1]) if x.shape[1] > held + 1 else None

    bias = None
    if row.bias is not None:
        bias = found.bias if row.bias.shape[1] != 1 else found.bias.sum(dim=1, keepdim=True)
        # [3, G or 1, n, C] -> [S, G or 1, 3]
        bias = bias.flatten(2).permute(2, 1, 0)[: len(q)]
    return (
        to_slots(keep(found.q, row.tokens[:, None]) * row.layout.scale, len(q)),
        slots(found.keys),
        slots(found.values),
        None if found.summary_k is None else found.summary_k.transpose(0, 1),
        None if found.summary_v is None else found.summary_v.transpose(0, 1),
        pages(found.keys),
        pages(found.values),
        bias,
    )


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keep(x: Tensor, tokens: Tensor) -> Tensor:
    """x [..., d] with zeros, not products with zero, where `tokens` [...] is False."""
    return x if bool(tokens.all()) else torch.where(tokens[..., None], x, 0)


def _chunked(x: Tensor, size: int) -> Tensor:
    """[S, Y, Z] -> [n, C, Y, Z], zeros behind a ragged end."""
    return F.pad(x, (0, 0, 0, 0, 0, -len(x) % size)).unflatten(0, (-1, size))


def to_heads(x: Tensor, layout: Layout, groups: int) -> Tensor:
    """[S, H, d] -> [G, n, F, C, d] in the dtype of the arithmetic."""
    return _chunked(x, layout.size).to(wide_dtype(x)).unflatten(2, (groups, -1)).permute(2, 0, 3, 1, 4)


def to_slots(x: Tensor, slots: int) -> Tensor:
    """[G, n, F, C, d] -> [S, H, d]."""
    return x.permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)[:slots]


def _summaries(x: Tensor, lengths: Tensor, wide: torch.dtype) -> Tensor:
    """[N', G, d] -> [G, N', d] with zeros for chunks without a token."""
    return keep(x.to(wide).transpose(0, 1), lengths[: len(x)] > 0).contiguous()
