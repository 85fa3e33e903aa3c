"""Where the rows of a generation stand: how many tokens and chunks each has, and how new tokens come behind them.

Host integers and [B, N] tables, shared by all layers. Rows of a batch may hold different numbers of chunks: the
tables are right-aligned, chunks without tokens lie in front, so that the next chunk of every row has one number.

Shapes: B rows, T new slots, S slots at hand, C chunk size, N chunks known, n chunks at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.continued import Continued
from mka_megatron.memory.documents import Documents


@dataclass(frozen=True, eq=False)
class Joining:
    """How the complete chunks at hand come behind those known."""

    added: tuple[int, ...]
    """Chunks of each row, the first ones at hand."""
    tokens: tuple[int, ...]
    """Tokens of each row in them."""
    lengths: Tensor
    """[B, n] int64 tokens of each chunk at hand."""
    known: int
    """N before."""
    index: Tensor | None
    """[B, N after] int64 into (known chunks, chunks at hand); negative: none. None: every row adds as many."""
    pages: np.ndarray
    """[B, n] int64 name of the pages of each chunk at hand that is added."""

    def joined(self, known: Tensor | None, new: Tensor, held: int | None = None) -> Tensor:
        """[B, N, ...] and [B, n, ...] -> [B, N after, ...], of which `known` and the result are the last `held`."""
        if self.index is None:
            both = new[:, : self.added[0]]
            both = both if known is None else torch.cat((known, both), dim=1)
        else:
            before = 0 if known is None else known.shape[1]
            index = (self.index - (self.known - before)).clamp_min(0)
            if held is not None:
                index = index[:, max(0, index.shape[1] - held) :]
            both = new if known is None else torch.cat((known, new), dim=1)
            both = both[torch.arange(len(index), device=index.device)[:, None], index]
        return both if held is None else both[:, max(0, both.shape[1] - held) :].clone()


@dataclass(frozen=True, eq=False)
class Piece:
    """Slots at hand that every layer attends to at once: whole chunks, or the next slots of open chunks."""

    documents: Documents
    joining: Joining | None
    """Of whole chunks; None: they stay open."""
    slots: int
    """S."""
    uniform: tuple[int, int] | None
    """Every row has `again` kept tokens, then the new slots from this one on: (again, first new slot)."""
    source: Tensor | None
    """[B, S] int64 into (kept slots where some are at hand again, new slots), where rows differ; any on padding."""
    fresh: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """(rows, slots at hand, new slots, slots of the open chunk) of the new tokens at hand, where rows differ."""
    pages: np.ndarray
    """[B, N] names of the pages of the chunks before those at hand; -1: no chunk."""

    @property
    def continued(self) -> Continued:
        """Where the rows stand."""
        assert self.documents.continued is not None
        return self.documents.continued

    @property
    def opens(self) -> bool:
        """Some row begins a chunk here, which stays open."""
        opened = self.continued.opened
        return opened is not None and any(
            count and not had for count, had in zip(self.continued.tokens, opened, strict=True)
        )

    @property
    def held(self) -> int:
        """Slots of the longest open chunk, those at hand included."""
        assert self.continued.opened is not None
        return max(map(sum, zip(self.continued.tokens, self.continued.opened, strict=True)))

    def gather(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """The layers' [B, C, ...], of open chunks, and [B, T, ...] -> those at hand, [B, S, ...]."""
        again = any(self.continued.again)
        if self.uniform is not None:
            count, first = self.uniform
            late = new[:, first : first + self.slots - count]
            return torch.cat((kept[:, :count], late), dim=1) if again and kept is not None else late
        both = torch.cat((kept, new), dim=1) if again and kept is not None else new
        assert self.source is not None
        return both[torch.arange(len(both), device=both.device)[:, None], self.source]

    def keep(self, x: Tensor, chunks: Tensor) -> None:
        """Put [B, S, ...] of open chunks at hand to where they are in `chunks` [B, C, ...]."""
        assert self.continued.opened is not None
        if self.fresh is None:
            begin = self.continued.opened[0]
            chunks[:, begin : begin + self.slots] = x
        else:
            rows, at_hand, _, places = self.fresh
            chunks[rows, places] = x[rows, at_hand]

    def scatter(self, out: Tensor, into: Tensor) -> None:
        """Put the new tokens' of [B, S, ...] to where they are in `into` [B, T, ...]."""
        if self.uniform is not None:
            again, first = self.uniform
            into[:, first : first + self.slots - again] = out[:, again:]
        else:
            assert self.fresh is not None
            rows, at_hand, places, _ = self.fresh
            into[rows, places] = out[rows, at_hand]


class Rows:
    """Counts of B rows that begin empty. `size`: C, or None where the layers work on no chunks."""

    def __init__(self, batch: int, size: int | None, device: torch.device) -> None:
        self._size, self._device = size, device
        self.known = [0] * batch
        """Tokens in complete chunks; without chunks all tokens."""
        self.open = [0] * batch
        """Tokens of each row's open chunk."""
        self._first = [0] * batch
        """Tokens of each row's first chunk, 0 while it is open."""
        self._chunks = [0] * batch
        self._lengths = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self._last = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.pages = np.zeros((batch, 0), np.int64)
        """[B, N] names of the chunks' pages, one for each chunk whoever shares it; -1: no chunk."""
        self._next = 0

    @property
    def chunked(self) -> bool:
        """The layers work on chunks."""
        return self._size is not None

    def __len__(self) -> int:
        return len(self.known)

    def advance(self, slots: int, valid: Tensor | None) -> list[Piece]:
        """Add `slots` new slots to every row, of which `valid` [B, T] bool hold tokens (None: all).

        The pieces in which the layers take them in, in order: whole chunks, then what stays open.
        """
        counts = [slots] * len(self) if valid is None else valid.sum(dim=1).tolist()
        order = None if valid is None or min(counts) == slots else (~valid).long().argsort(dim=1, stable=True)
        nothing = [0] * len(self)
        if self._size is None:
            pieces = [self._piece(counts, nothing, nothing, order)] if any(counts) else []
            self.known = [known + count for known, count in zip(self.known, counts, strict=True)]
            return pieces
        size, before = self._size, self.open
        whole = [(mine + count) // size if count else 0 for mine, count in zip(before, counts, strict=True)]
        again = [mine if many else 0 for mine, many in zip(before, whole, strict=True)]
        left = [0 if many else mine for mine, many in zip(before, whole, strict=True)]
        first = [size * many - mine if many else 0 for mine, many in zip(before, whole, strict=True)]
        rest = [count - begin for count, begin in zip(counts, first, strict=True)]
        pieces = []
        if any(whole):
            pieces.append(self._piece([size * many for many in whole], again, nothing, order, added=whole))
        if any(rest):
            pieces.append(self._piece(rest, nothing, first, order, opened=left))
        self.open = [had + count for had, count in zip(left, rest, strict=True)]
        return pieces

    def close(self, rows: Sequence[int] | None) -> Piece | None:
        """Make the open chunks of `rows` (None: all) complete ones, all of whose tokens are at hand again; None: none
        is open."""
        chosen = range(len(self)) if rows is None else rows
        tokens = [mine if row in chosen else 0 for row, mine in enumerate(self.open)]
        if self._size is None or not any(tokens):
            return None
        self.open = [mine - closed for mine, closed in zip(self.open, tokens, strict=True)]
        nothing = [0] * len(self)
        return self._piece(tokens, tokens, nothing, None, added=[int(count > 0) for count in tokens])

    def select(self, index: Sequence[int]) -> list[int]:
        """Row i becomes what row index[i] was. Returns the names of pages that no row has any more."""
        self.known, self.open, self._first, self._chunks = (
            [counts[row] for row in index] for counts in (self.known, self.open, self._first, self._chunks)
        )
        rows = torch.tensor(index, dtype=torch.int64, device=self._device)
        self._lengths, self._last = self._lengths[rows], self._last[rows]
        before, self.pages = self.pages, self.pages[np.array(index, dtype=np.int64)]
        if set(index) == set(range(len(before))):
            return []
        return [name for name in np.setdiff1d(before, self.pages).tolist() if name >= 0]

    def _local(self, tokens: Sequence[int], earlier: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[B, n] tokens of the chunks at hand, and position of the last one of each."""
        assert self._size is not None
        edges = torch.arange(0, max(tokens), self._size, device=self._device)
        counts, begun = (torch.tensor(each, device=self._device)[:, None] for each in (tokens, earlier))
        lengths = (counts - edges).clamp(0, self._size)
        return lengths, (begun + edges + lengths - 1).masked_fill(lengths == 0, 0)

    def _piece(
        self,
        tokens: list[int],
        again: list[int],
        first: list[int],
        order: Tensor | None,
        *,
        opened: list[int] | None = None,
        added: list[int] | None = None,
    ) -> Piece:
        """`tokens` at hand of each row, of which `again` were before, the others from the `first` new one on. They go
        on with chunks that have `opened` tokens, or are `added` whole chunks."""
        chunks: Chunks | None = None
        joining: Joining | None = None
        pages, behind = self.pages, opened or [0] * len(self)
        begun, earlier = self.known, [sum(each) for each in zip(self.known, behind, strict=True)]
        ends = [sum(each) for each in zip(behind, tokens, strict=True)]
        started = [had or min(end, self._size or end) for had, end in zip(self._first, ends, strict=True)]
        if self._size is not None:
            lengths, last = self._local(ends, begun)
            table = torch.cat((self._lengths, lengths), dim=1)
            chunks = Chunks(
                self._size, table, (table > 0).long() - 1, torch.cat((self._last, last), dim=1),
                self._lengths.shape[1], lengths.shape[1],
            )  # fmt: skip
            if added is not None:
                joining = self._join(added, tokens, lengths, last)
        before = None if opened is None else tuple(opened)
        rows = Continued(tuple(tokens), tuple(earlier), tuple(again), tuple(started), chunks, before)
        documents = rows.documents(self._device)
        if order is None and len(set(zip(tokens, again, first, behind, strict=True))) == 1:
            return Piece(documents, joining, max(tokens), (again[0], first[0]), None, None, pages)
        places = self._places(tokens, again, first, behind, order)
        return Piece(documents, joining, max(tokens), None, *places, pages)

    def _places(
        self, tokens: list[int], again: list[int], first: list[int], behind: list[int], order: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`source` and `fresh` of a piece."""
        column = torch.arange(max(tokens), device=self._device)
        count, old, new, had = (
            torch.tensor(each, device=self._device)[:, None] for each in (tokens, again, first, behind)
        )
        fresh = (column >= old) & (column < count)
        numbers = torch.where(fresh, column - old + new, 0)
        places = numbers if order is None else order.gather(1, numbers)
        kept = (self._size or 0) if any(again) else 0
        source = torch.where(fresh, places + kept, torch.where(column < old, column, 0))
        rows, at_hand = fresh.nonzero().unbind(1)
        return source, (rows, at_hand, places[rows, at_hand], at_hand + had[rows, 0])

    def _join(self, added: list[int], tokens: Sequence[int], lengths: Tensor, last: Tensor) -> Joining:
        known, count = self._lengths.shape[1], lengths.shape[1]
        self._chunks = [had + more for had, more in zip(self._chunks, added, strict=True)]
        heads = lengths[:, 0].tolist()
        self._first = [
            had or (head if more else 0) for had, head, more in zip(self._first, heads, added, strict=True)
        ]
        self.known = [had + more for had, more in zip(self.known, tokens, strict=True)]
        names = np.full((len(self), count), -1, np.int64)
        filled = np.arange(count) < np.array(added)[:, None]
        names[filled] = self._next + np.arange(int(filled.sum()))
        self._next += int(filled.sum())
        index = None
        if len(set(added)) > 1:
            width = max(self._chunks)
            ends = torch.tensor(added, device=self._device)[:, None] + known
            index = torch.arange(-width, 0, device=self._device) + ends
        joining = Joining(tuple(added), tuple(tokens), lengths, known, index, names)
        none = None if index is None else index < 0
        self._lengths, self._last = (
            joined if none is None else joined.masked_fill(none, 0)
            for joined in (joining.joined(self._lengths, lengths), joining.joined(self._last, last))
        )
        pages = (
            joining.joined(torch.from_numpy(self.pages), torch.from_numpy(names)) if index is None else None
        )
        if pages is None:
            on_host = replace(joining, index=index.cpu())  # type: ignore[union-attr]
            pages = on_host.joined(torch.from_numpy(self.pages), torch.from_numpy(names))
            pages = pages.masked_fill(none.cpu(), -1)  # type: ignore[union-attr]
        self.pages = pages.numpy()
        return joining


def padded(x: Tensor, size: int) -> Tensor:
    """[B, S, ...] with zeros behind to whole chunks, [B, n, C, ...]."""
    missing = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x
    return x.unflatten(1, (-1, size))
