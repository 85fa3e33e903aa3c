"""Causal attention of the last tokens of rows whose keys a view remembers (generation).

Row by row where the rows differ in length, so that a row of a batch gives what it gives alone, and without a mask.
Shapes: B batch, S slots at hand, T keys of the longest row, H query heads, G KV heads, d channels, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.attention.flash import causal_forward
from mka_megatron.attention.sdpa import causal_sdpa
from mka_megatron.memory.documents import Documents


def continued_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over each row's tokens, those hidden left out; without a gradient where rows differ.

    Args:
        q: [B, S, H, d]. k, v: [B, T, G, d], every row's tokens from its first on, those at hand included.
        documents: the slots at hand; their `continued` says where they stand.

    Returns:
        [B, S, H, d]; 0 on padding, on tokens that are at hand again and on those that see nothing.
    """
    out = q.new_zeros(q.shape)
    for part in documents.once(_parts):
        first = part.first(part.hidden)
        queries, keys = slice(first, part.queries.stop), slice(part.hidden, part.keys)
        if first < part.queries.stop:
            out[part.rows, queries] = causal_sdpa(
                q[part.rows, queries], k[part.rows, keys], v[part.rows, keys], scale
            )
    return out


def continued_mixture(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], bias: Tensor, documents: Documents, scale: float,
    late: bool,
) -> Tensor:  # fmt: skip
    """One softmax over the keys of all levels, as mka.score_mixture, without a gradient.

    Args:
        q: [B, S, H, d]. keys, values: L tensors [B, T, G, d], as for :func:`continued_attention`.
        bias: [B, S, H, L] fp64, -inf where a level takes no part.
        late: the last level has no keys in a row's first chunk.

    Returns:
        [B, S, H, d], 0 as for :func:`continued_attention`.
    """
    assert documents.continued is not None
    out = q.new_zeros(q.shape)
    for part in documents.once(_parts):
        some = q[part.rows, part.queries]
        # [B, S, H, L] -> [L, B, S, H]
        scores = bias[part.rows, part.queries].movedim(3, 0).clone()
        outs = []
        for level, (k, v) in enumerate(zip(keys, values, strict=True)):
            hidden = part.late if late and level == len(keys) - 1 else 0
            skipped = part.first(hidden) - part.queries.start
            of_level = torch.zeros_like(some)
            if skipped < some.shape[1]:
                seen = slice(hidden, part.keys)
                found, lse, _ = causal_forward(
                    some[:, skipped:], k[part.rows, seen], v[part.rows, seen], scale
                )
                of_level[:, skipped:] = found
                # [B, H, S] -> [B, S, H]
                scores[level, :, skipped:] += lse.transpose(1, 2)
            outs.append(of_level)
        shares = scores.softmax(dim=0).to(torch.promote_types(q.dtype, torch.float32))
        mixed = sum(share[..., None] * each.to(share.dtype) for share, each in zip(shares, outs, strict=True))
        out[part.rows, part.queries] = mixed.to(out.dtype)
    return out


@dataclass(frozen=True)
class _Part:
    """Rows that are attended at once."""

    rows: slice
    queries: slice
    """Slots at hand whose outputs are wanted."""
    keys: int
    """Tokens of each row."""
    hidden: int
    """The first ones of them that nobody sees."""
    late: int
    """Tokens of the row's first chunk."""

    def first(self, hidden: int) -> int:
        """The first of the queries that sees a key when the first `hidden` are not seen."""
        last = self.queries.stop
        return min(last, max(self.queries.start, hidden - (self.keys - last)))


def _parts(documents: Documents) -> list[_Part]:
    rows = documents.continued
    assert rows is not None
    hidden = rows.hidden or (0,) * len(rows.tokens)
    plans = list(zip(rows.tokens, rows.earlier, rows.again, hidden, rows.first, strict=True))
    if len(set(plans)) == 1:
        return _part(slice(None), *plans[0])
    return [each for row, plan in enumerate(plans) for each in _part(slice(row, row + 1), *plan)]


def _part(rows: slice, tokens: int, earlier: int, again: int, hidden: int, late: int) -> list[_Part]:
    if again >= tokens:
        return []
    return [_Part(rows, slice(again, tokens), earlier + tokens, hidden, late)]
