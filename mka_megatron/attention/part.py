"""Causal attention of the slots at hand where they are a part of longer rows (context parallelism).

Shapes: B batch, S slots at hand, T slots of the rows up to the last at hand, H query heads, G KV heads, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.attention.sdpa import causal_sdpa
from mka_megatron.memory.documents import Documents


def part_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, causal within each document of the whole rows, 0 on padding.

    Args:
        q: [B, S, H, d] of the slots at hand. k, v: [B, T, G, d] from the rows' first slot to the last at hand.
        documents: the part that is at hand.
        scale: factor on the scores.

    Returns:
        [B, S, H, d]. A gradient of 0 reaches k and v even where there is no token at hand. Raises ValueError when
        the keys do not begin with the rows.
    """
    if k.shape[1] != documents.begin + q.shape[1]:
        raise ValueError(
            f"slots [{documents.begin}, {documents.begin + q.shape[1]}) of the rows come with {k.shape[1]} keys: pass "
            "a view that knows the slots before."
        )
    if documents.whole is not None and documents.whole.whole_rows:
        return causal_sdpa(q, k, v, scale)
    if not documents.spans:
        return torch.zeros_like(q) + (q[:, :0].sum() + k[:, :0].sum() + v[:, :0].sum())
    # one split per row, so that the backward is one concatenation and not a sum of zero-filled slices
    rows = []
    for row, q_row, k_row, v_row in zip(documents.once(_rows), q.unbind(0), k.unbind(0), v.unbind(0), strict=True):
        queries, keys, values = q_row.split(row.queries), k_row.split(row.keys), v_row.split(row.keys)
        outs = [torch.zeros_like(piece) for piece in queries]
        for each in row.documents:
            a, b, c = queries[each.query], keys[each.key], values[each.key]
            if each.tokens is None:
                outs[each.query] = causal_sdpa(a[None], b[None], c[None], scale)[0]
                continue
            at, seen = each.tokens
            out = causal_sdpa(a[None, at], b[None, seen], c[None, seen], scale)[0]
            outs[each.query] = outs[each.query].index_copy(0, at, out)
        rows.append(torch.cat(outs))
    return torch.stack(rows)


@dataclass(frozen=True)
class _Document:
    """A document's queries and keys among the pieces of its row."""

    query: int
    key: int
    tokens: tuple[Tensor, Tensor] | None
    """int64 of the queries and of the keys within their pieces; None: every slot is a token."""


@dataclass(frozen=True)
class _Row:
    """A row cut into documents and what lies between them."""

    queries: list[int]
    """Lengths of the pieces of the slots at hand."""
    keys: list[int]
    """Lengths of the pieces of the row up to the last of these."""
    documents: list[_Document]


def _rows(documents: Documents) -> list[_Row]:
    whole = documents.whole or documents
    batch, slots = documents.starts.shape
    begin, end = documents.begin, documents.begin + slots
    tokens: dict[tuple[int, int], list[range]] = {}
    owner = 0
    for row, first, last in whole.runs:
        while whole.spans[owner][0] < row or whole.spans[owner][2] <= first:
            owner += 1
        if first < end:
            tokens.setdefault(whole.spans[owner][:2], []).append(range(first, min(last, end)))
    rows = [_Row([], [], []) for _ in range(batch)]
    for (row, first), runs in tokens.items():
        if runs[-1].stop <= begin:
            continue
        place = rows[row]
        here = max(first, begin, runs[0].start)
        _cut(place.queries, here - begin, runs[-1].stop - begin)
        _cut(place.keys, first, runs[-1].stop)
        indices = None
        if len(runs) > 1:
            slots_of = [slot for run in runs for slot in run]
            indices = (
                torch.tensor([slot - here for slot in slots_of if slot >= here], device=documents.starts.device),
                torch.tensor([slot - first for slot in slots_of], device=documents.starts.device),
            )
        place.documents.append(_Document(len(place.queries) - 1, len(place.keys) - 1, indices))
    for place in rows:
        _cut(place.queries, slots, slots)
        _cut(place.keys, end, end)
    return rows


def _cut(lengths: list[int], begin: int, end: int) -> None:
    """Append the piece [begin, end), after one for what lies between it and the last."""
    lengths += [begin - sum(lengths), end - begin]
