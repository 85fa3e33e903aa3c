"""What one layer sees of the rows of a generation.

Shapes: B rows, S slots at hand, G KV heads of this rank, d head channels, C chunk size, N chunks known, R recalled
chunks, T tokens of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.memory.documents import Documents
from mka_megatron.memory.paged import Key, read_pages, stored_pages
from mka_megatron.memory.remembered import Remembered
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Carry, Choose, Pages, Summaries


@dataclass(frozen=True)
class GenerationView:
    """memory.view.View of one layer over the slots of a piece."""

    memory: Remembered
    piece: Piece
    store: TierStore | None
    key: Key
    """(row, KV head of this rank, chunk) -> page."""
    window: int
    """Chunks of the halo, as far as that many are known."""

    @property
    def open(self) -> OpenChunks | None:
        """See View."""
        return None if self.piece.continued.opened is None else OpenChunks(self)

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Carry | None:
        """See View."""
        rows, memory = self.piece.continued, self.memory
        states = (memory.carry_k, memory.carry_v) if rows.opened is None else (memory.last_k, memory.last_v)
        state = states["kv".index(name)]
        if state is None or isinstance(state, tuple) or all(rows.earlier):
            return state
        return torch.where(documents.continues[:, None, None], state, x[:, 0].to(state.dtype))

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """See View; what rows without so many chunks have there is no token's."""
        near = self.memory.near
        return (k[:, :0], v[:, :0]) if near is None else near.halo()

    def queries(self, local: Tensor) -> Tensor | None:
        """See View."""
        return self.memory.queries

    def summaries(self, local: Summaries) -> Summaries:
        """See View."""
        known = self.memory.known
        return local if known is None else known.then(local)

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """See View. What open chunks recall is read once, and is what they recall when they are whole."""
        assert self.store is not None and self.piece.continued.chunks is not None
        memory = self.memory
        if memory.recalled is not None and memory.selected is not None and (
            recalled is memory.selected or recalled.equal(memory.selected)
        ):
            return memory.recalled
        found = read_pages(
            self.store, self.key, recalled, k, known=self.piece.continued.chunks.first, halo=halo, size=self._size
        )
        if self.open:
            memory.recalled = found
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

    @property
    def _size(self) -> int:
        assert self.piece.continued.chunks is not None
        return self.piece.continued.chunks.size


@dataclass(frozen=True)
class OpenChunks:
    """memory.view.OpenChunks of a :class:`GenerationView`."""

    view: GenerationView

    @property
    def summaries(self) -> Summaries | None:
        """See there."""
        return self.view.memory.known

    def selected(self, choose: Choose) -> Tensor | None:
        """See there."""
        memory, known, chunks = self.view.memory, self.summaries, self.view.piece.continued.chunks
        memory.choose = choose
        if known is None:
            return None
        if memory.selected is None:
            assert memory.queries is not None and known.signature is not None and chunks is not None
            memory.selected = choose(memory.queries, known.signature, chunks)
        return memory.selected

    def prefetch(self) -> None:
        """Begin to read the pages that will be asked for, as far as they lie on the SSD alone."""
        view, memory = self.view, self.view.memory
        if view.store is None or memory.choose is None or memory.near is None:
            return
        recalled = self.selected(memory.choose)
        if recalled is not None and view.piece.continued.chunks is not None:
            end = view.piece.continued.chunks.first - memory.near.count
            found = stored_pages(view.store, view.key, recalled, end)
            view.store.prefetch([view.key(row, head, chunk) for row, head, _, chunk in found])

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See there."""
        view = self.view
        near = view.memory.near_of(k, view._size, view.window)
        return near.extend(k, v, view.piece)


def _roomy(cache: Tensor, slots: int) -> Tensor:
    """The cache with room for `slots`: a fourth more than that when it has to grow, so that growing stays rare."""
    if cache.shape[1] >= slots:
        return cache
    larger = cache.new_zeros(len(cache), slots + slots // 4 + 16, *cache.shape[2:])
    larger[:, : cache.shape[1]] = cache
    return larger
