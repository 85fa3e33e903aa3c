"""The block core as its contract says it, token by token and dense, in the dtype given; autograd does the rest.

Independent of the package on purpose. Everything a query may see is one list of keys, [tokens of the row (halo and
slots at hand), summaries, page slots], with a level for each pair, -1 where it sees nothing.
Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Chunks of rows, written down chunk by chunk."""

    size: int
    lengths: Tensor
    documents: Tensor
    first: int
    count: int

    @staticmethod
    def of(size: int, rows: Sequence[Sequence[tuple[int, int]]], first: int = 0, count: int | None = None) -> Table:
        """rows: (tokens, document) of every chunk; a chunk without tokens may name any document."""
        lengths = torch.tensor([[tokens for tokens, _ in row] for row in rows])
        documents = torch.tensor([[document if tokens else -1 for tokens, document in row] for row in rows])
        return Table(size, lengths, documents, first, lengths.shape[1] - first if count is None else count)


@dataclass(frozen=True)
class Pages:
    """Recalled chunks."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    index: Tensor


def levels(
    table: Table, slots: int, window: int, row: int, head: int, summaries: int, pages: Pages | None
) -> Tensor:
    """[S, keys] the level through which each query sees each key of KV head `head`; -1: it does not."""
    size, w = table.size, window // table.size
    halo = min(w - 1, table.first)
    lengths, documents = table.lengths[row].tolist(), table.documents[row].tolist()
    tokens = (halo + table.count) * size
    stored = 0 if pages is None else pages.k.shape[2]
    seen = torch.full((slots, tokens + summaries + stored * size), -1)
    for slot in range(slots):
        here, offset = divmod(slot, size)
        number = table.first + here
        if offset >= lengths[number]:
            continue
        for key in range(tokens):
            chunk, place = divmod(key, size)
            chunk += table.first - halo
            if place >= lengths[chunk] or documents[chunk] != documents[number]:
                continue
            if (chunk == number and place <= offset) or number - w < chunk < number:
                seen[slot, key] = 0
        for chunk in range(min(summaries, number - w + 1)):
            if lengths[chunk] and documents[chunk] == documents[number]:
                seen[slot, tokens + chunk] = 1
        for place in [] if pages is None else pages.index[row, here, head].tolist():
            if place >= halo + table.count:
                page = place - halo - table.count
                begin = tokens + summaries + page * size
                seen[slot, begin : begin + int(pages.lengths[row, head, page])] = 2
            elif place >= 0:
                seen[slot, place * size : place * size + lengths[table.first - halo + place]] = 2
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    pages: Pages | None,
    bias: Tensor | None,
    table: Table,
    window: int,
    scale: float,
) -> Tensor:
    """[B, S, H, d]; queries that see nothing get 0."""
    return attend(q, k, v, summaries, pages, bias, table, window, scale)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    pages: Pages | None,
    bias: Tensor | None,
    table: Table,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """[B, S, H, d] and the logarithms of the sums [B, H, S], +inf for queries that see nothing."""
    batch, slots, heads, channels = q.shape
    groups = k.shape[2]
    count = 0 if summaries is None else summaries[0].shape[1]
    rows, sums = [], []
    for row in range(batch):
        columns = []
        for group in range(groups):
            blank = k.new_zeros((-k.shape[1]) % table.size, channels)
            keys, values = [k[row, :, group], blank], [v[row, :, group], blank]
            if summaries is not None:
                keys.append(summaries[0][row, :, group])
                values.append(summaries[1][row, :, group])
            if pages is not None and pages.k.shape[2]:
                keys.append(pages.k[row, group].flatten(0, 1))
                values.append(pages.v[row, group].flatten(0, 1))
            level = levels(table, slots, window, row, group, count, pages)
            added = torch.zeros(level.shape, dtype=q.dtype)
            if bias is not None:
                added = bias[row, :, group if bias.shape[2] > 1 else 0].gather(1, level.clamp_min(0))
            fan = heads // groups
            for head in range(group * fan, (group + 1) * fan):
                scores = q[row, :, head] @ torch.cat(keys).T * scale + added
                scores = scores.masked_fill(level < 0, float("-inf"))
                # a row that sees nothing: any finite maximum
                largest = scores.detach().amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
                weights = (scores - largest).exp()
                total = weights.sum(dim=1, keepdim=True)
                columns.append(weights / torch.where(total > 0, total, 1) @ torch.cat(values))
                sums.append(torch.where(total > 0, largest + total.log(), float("inf")).flatten())
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows), torch.stack(sums).unflatten(0, (batch, heads))
