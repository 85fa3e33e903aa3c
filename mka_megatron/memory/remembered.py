"""What one layer remembers of the rows of a generation, and the view that it gives of them.

Shapes: B rows, S slots at hand, G KV heads of this rank, d head channels, C chunk size, N chunks known, n chunks at
hand, R recalled chunks, Q = 16 selecting queries, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import SELECTING_QUERIES
from mka_megatron.memory.paged import read_pages
from mka_megatron.memory.rows import Joining, Piece, padded
from mka_megatron.memory.tiers.pages import PageKey
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Carry, Pages, Summaries, Update


@dataclass
class Remembered:
    """One layer's memory. Chunk tables are right-aligned like those of :class:`memory.rows.Rows`."""

    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Dense core: per level of the mixture finished keys and values [B, >= T, G, d] of each row from its first token
    on, with room behind."""
    halo: tuple[Tensor, Tensor] | None = None
    """Block core: rotated keys and values [B, h, C, G, d] of the last h chunks known."""
    summaries: Summaries | None = None
    """Of the chunks known."""
    queries: Tensor | None = None
    """[B, Q, G, d], as View.queries gives them."""
    carry_k: Carry | None = None
    """Before the open chunks; without chunks, before the next tokens."""
    carry_v: Carry | None = None
    kept: tuple[Tensor | None, ...] | None = None
    """What the layer was given for the tokens of the open chunks, [B, S, ...] each; None: there are none."""
    opened: Update | None = None
    """Of the open chunks."""
    recalled: tuple[Tensor, Pages] | None = None
    """The chunks that were recalled last, and their pages."""

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor, all of which have rows first."""
        for each in fields(self):
            setattr(self, each.name, _mapped(getattr(self, each.name), change))

    def join(self, update: Update, joining: Joining, size: int, halo: int) -> None:
        """Make the chunks at hand that `joining` adds known."""
        if update.summaries is not None:
            old, new = self.summaries, update.summaries
            signature = None
            if new.signature is not None:
                signature = joining.joined(None if old is None else old.signature, new.signature)
            self.summaries = Summaries(
                joining.joined(None if old is None else old.k, new.k),
                joining.joined(None if old is None else old.v, new.v),
                signature,
            )
        if update.k is not None and update.v is not None:
            before = self.halo or (None, None)
            both = zip(before, (padded(update.k, size), padded(update.v, size)), strict=True)
            k, v = (joining.joined(old, new, halo) for old, new in both)
            self.halo = k, v
        if update.queries is not None:
            self.queries = _last(self.queries, update.queries, joining.tokens)
        taken = torch.tensor([bool(count) for count in joining.tokens])
        self.carry_k, self.carry_v = (
            _chosen(old, new, taken)
            for old, new in ((self.carry_k, update.carry_k), (self.carry_v, update.carry_v))
        )


@dataclass(frozen=True)
class GenerationView:
    """memory.view.View of one layer over the slots of a piece."""

    memory: Remembered
    piece: Piece
    store: TierStore | None
    key: Callable[[int, int, int], PageKey]
    """(row, KV head of this rank, chunk) -> page."""

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Carry | None:
        """See View."""
        state = self.memory.carry_k if name == "k" else self.memory.carry_v
        if state is None or isinstance(state, tuple):
            return state
        return torch.where(documents.continues[:, None, None], state, x[:, 0].to(state.dtype))

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """See View; what rows without so many chunks have there is no token's."""
        if self.memory.halo is None:
            return k[:, :0], v[:, :0]
        # [B, h, C, G, d] -> [B, h*C, G, d]
        return self.memory.halo[0].flatten(1, 2), self.memory.halo[1].flatten(1, 2)

    def queries(self, local: Tensor) -> Tensor | None:
        """See View."""
        return self.memory.queries

    def summaries(self, local: Summaries) -> Summaries:
        """See View."""
        return local if self.memory.summaries is None else self.memory.summaries.then(local)

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """See View. An open chunk recalls the same from token to token: what was read last is kept."""
        assert self.store is not None and self.piece.continued.chunks is not None
        table = self.piece.continued.chunks
        last = self.memory.recalled
        if last is not None and last[0].equal(recalled):
            return last[1]
        found = read_pages(self.store, self.key, recalled, k, known=table.first, halo=halo, size=table.size)
        # whole chunks are not asked for again
        self.memory.recalled = None if self.piece.joining is not None else (recalled, found)
        return found

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """See View: of each row its tokens from the first on, those at hand put behind the others."""
        rows, caches = self.piece.continued, self.memory.caches
        while len(caches) <= level:
            caches.append((k.new_empty(len(k), 0, *k.shape[2:]), v.new_empty(len(v), 0, *v.shape[2:])))
        ends = [before + count for before, count in zip(rows.earlier, rows.tokens, strict=True)]
        key = _roomy(caches[level][0], max(ends))
        # where the keys are the values they are kept once
        caches[level] = (key, key if v is k else _roomy(caches[level][1], max(ends)))
        for cache, x in zip(caches[level][: 1 if v is k else 2], (k, v), strict=False):
            if len(set(ends)) == 1 and self.piece.documents.padding is None:
                cache[:, rows.earlier[0] : ends[0]] = x
                continue
            for row, (begin, end, count) in enumerate(zip(rows.earlier, ends, rows.tokens, strict=True)):
                cache[row, begin:end] = x[row, :count]
        return caches[level]


def _roomy(cache: Tensor, slots: int) -> Tensor:
    """The cache with room for `slots`: a fourth more than that when it has to grow, so that growing stays rare."""
    if cache.shape[1] >= slots:
        return cache
    larger = cache.new_zeros(len(cache), slots + slots // 4 + 16, *cache.shape[2:])
    larger[:, : cache.shape[1]] = cache
    return larger


def _last(before: Tensor | None, late: Tensor, tokens: Sequence[int]) -> Tensor:
    """The last Q queries of both, [B, Q, G, d] each, where `tokens` came late."""
    if before is None or min(tokens) >= SELECTING_QUERIES:
        return late
    fresh = torch.tensor(tokens, device=late.device).clamp_max(SELECTING_QUERIES)
    # slot j of the result is slot j of the late ones, or slot j + fresh of those before
    places = torch.arange(SELECTING_QUERIES, device=late.device) + fresh[:, None]
    old = before.gather(1, places.clamp_max(SELECTING_QUERIES - 1)[:, :, None, None].expand_as(before))
    return torch.where((places < SELECTING_QUERIES)[:, :, None, None], old, late)


def _chosen(old: Carry | None, new: Carry | None, rows: Tensor) -> Carry | None:
    """The new states of `rows` [B] bool, the old ones of the others."""
    if new is None or old is None or bool(rows.all()):
        return new
    if isinstance(new, tuple) or isinstance(old, tuple):
        assert isinstance(new, tuple) and isinstance(old, tuple)
        total, count = (_chosen(a, b, rows) for a, b in zip(old, new, strict=True))
        return total, count  # type: ignore[return-value]
    return torch.where(rows.to(new.device).view(-1, *(1,) * (new.dim() - 1)), new, old)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: _mapped(getattr(value, each.name), change) for each in fields(value)}
        )
    return value
