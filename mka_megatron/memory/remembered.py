"""What one layer remembers of the rows of a generation.

Shapes: B rows, S slots at hand, G KV heads of this rank, d head channels, C chunk size, N chunks known, n chunks at
hand, h chunks of the halo, R recalled chunks, Q = 16 selecting queries, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mka_megatron.memory.hashing import SELECTING_QUERIES
from mka_megatron.memory.rows import Joining, Piece, padded
from mka_megatron.memory.tables import Table
from mka_megatron.memory.view import Carry, Choose, Pages, Summaries, Update


@dataclass
class Near:
    """Block core: rotated keys and values of the last chunks known, then of the open chunk, in place."""

    k: Tensor
    """[B, G, (h + 1) * C, d]: the halo's end is where the open chunk begins."""
    v: Tensor
    """The same of the values."""
    size: int
    """C."""
    count: int = 0
    """Chunks of the halo that are known."""

    def halo(self) -> tuple[Tensor, Tensor]:
        """[B, count*C, G, d] each, not copies."""
        return self._part(-self.count * self.size, 0)

    def open(self) -> tuple[Tensor, Tensor]:
        """[B, C, G, d] each, not copies, of which the chunk's tokens lie at its head."""
        return self._part(0, self.size)

    def extend(self, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Put the open chunk's next tokens [B, S, G, d] behind the others. Returns [B, count*C + S', G, d] each, the
        halo and the open chunk, not copies."""
        for x, into in zip((k, v), self.open(), strict=True):
            piece.keep(x, into)
        return self._part(-self.count * self.size, piece.held)

    def _part(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Slots counted from the open chunk's first."""
        zero = self.k.shape[2] - self.size
        # [B, G, Y, d] -> [B, Y, G, d]
        k, v = (x[:, :, zero + begin : zero + end].transpose(1, 2) for x in (self.k, self.v))
        return k, v


@dataclass
class Remembered:
    """One layer's memory. Chunk tables are right-aligned like those of :class:`memory.rows.Rows`."""

    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Dense core: per level of the mixture finished keys and values [B, >= T, G, d] of each row from its first token
    on, with room behind."""
    near: Near | None = None
    """Block core: what the window holds beside the tokens at hand."""
    summaries: tuple[Table, Table, Table | None] | None = None
    """Of the chunks known, as view.Summaries."""
    queries: Tensor | None = None
    """[B, Q, G, d], as View.queries gives them."""
    carry_k: Carry | None = None
    """Before the open chunks; without chunks, after the last token."""
    carry_v: Carry | None = None
    last_k: Carry | None = None
    """With chunks, after the last token."""
    last_v: Carry | None = None
    kept: tuple[Tensor | None, ...] | None = None
    """What the layer was given for the tokens of the open chunks, [B, C, ...] each; None: there never were any."""
    choose: Choose | None = None
    """How the layer selects; None: it never did."""
    selected: Tensor | None = None
    """[B, 1, G, R] what the open chunks recall; None: it is to be selected."""
    recalled: Pages | None = None
    """Their pages; None: they are to be read."""

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor, all of which have rows first."""
        for each in fields(self):
            setattr(self, each.name, _mapped(getattr(self, each.name), change))

    @property
    def known(self) -> Summaries | None:
        """Of the chunks known, not copies."""
        if self.summaries is None:
            return None
        k, v, signature = self.summaries
        return Summaries(k.rows, v.rows, None if signature is None else signature.rows)

    def near_of(self, like: Tensor, size: int, halo: int) -> Near:
        """The window's tokens, where there are none yet for `halo` chunks and keys like [B, S, G, d]."""
        if self.near is None:
            batch, _, groups, channels = like.shape
            k, v = (like.new_zeros(batch, groups, (halo + 1) * size, channels) for _ in range(2))
            self.near = Near(k, v, size)
        return self.near

    def keep(self, given: Sequence[Tensor | None], piece: Piece, size: int) -> None:
        """Keep what the layer was given for the next tokens of the open chunks, [B, S, ...] each."""
        if self.kept is None:
            self.kept = tuple(
                None if x is None else x.new_zeros(len(x), size, *x.shape[2:]) for x in given
            )
        for x, chunks in zip(given, self.kept, strict=True):
            if x is not None and chunks is not None:
                piece.keep(x, chunks)

    def pass_by(self, update: Update, tokens: Sequence[int]) -> None:
        """Take over the states after `tokens` of each row."""
        taken = torch.tensor([bool(count) for count in tokens])
        self.last_k = _chosen(self.last_k, update.carry_k, taken)
        self.last_v = _chosen(self.last_v, update.carry_v, taken)

    def join(self, update: Update, joining: Joining, size: int, halo: int) -> None:
        """Make the chunks at hand that `joining` adds known."""
        if update.summaries is not None:
            new = update.summaries
            if self.summaries is None:
                first = joining.joined(None, new.k), joining.joined(None, new.v)
                codes = None if new.signature is None else Table.of(joining.joined(None, new.signature))
                self.summaries = Table.of(first[0]), Table.of(first[1]), codes
            else:
                for table, x in zip(self.summaries, (new.k, new.v, new.signature), strict=True):
                    if table is not None and x is not None:
                        table.join(x, joining)
        if update.k is not None and update.v is not None:
            near = self.near_of(update.k, size, halo)
            # [B, count*C, G, d] -> [B, count, C, G, d]
            before = [x.unflatten(1, (near.count, size)) if near.count else None for x in near.halo()]
            late = (padded(update.k, size), padded(update.v, size))
            k, v = (joining.joined(old, new, halo) for old, new in zip(before, late, strict=True))
            near.count = k.shape[1]
            for x, into in zip((k, v), near.halo(), strict=True):
                into.copy_(x.flatten(1, 2))
        if update.queries is not None:
            self.queries = _last(self.queries, update.queries, joining.tokens)
        taken = torch.tensor([bool(count) for count in joining.tokens])
        self.carry_k, self.carry_v = (
            _chosen(old, new, taken)
            for old, new in ((self.carry_k, update.carry_k), (self.carry_v, update.carry_v))
        )
        # numbers of chunks change with the tables
        self.selected = self.recalled = None


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
