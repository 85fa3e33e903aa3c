"""What one micro-batch's rows remember from segment to segment: per layer a view, and pages in a store.

Everything remembered is detached. A segment's view does not change until its backward has ended; `commit`
then adds the segment. Summaries and codes, 1/C of the keys and values, stay on the device with the window; the
keys and values of every chunk go to the store, one page per (row, layer, KV head, chunk).

Shapes: B batch, S slots of a segment, G KV heads of this rank, d head channels, C chunk size, n chunks of a
segment, N chunks so far, R recalled chunks, M pages, Q = 16 selecting queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import SELECTING_QUERIES
from mka_megatron.memory.paged import read_pages
from mka_megatron.memory.tiers.pages import PageKey
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Pages, Summaries, Update

_CHUNKS_PER_BLOCK = 64


@dataclass(frozen=True)
class _Layer:
    """What is remembered of one layer."""

    k: Tensor
    """[B, h*C, G, d] rotated keys of the window before the next segment."""
    v: Tensor
    """[B, h*C, G, d] values."""
    summary_k: Tensor
    """[B, N, G, d]."""
    summary_v: Tensor
    """[B, N, G, d]."""
    signature: Tensor | None
    """[B, N, G, W]."""
    queries: Tensor | None
    """[B, Q, G, d]."""
    carry_k: Tensor | None
    """[B, G, d]."""
    carry_v: Tensor | None
    """[B, G, d]."""


class Session:
    """The memory of a micro-batch's rows; `begin`, a forward, its backward and `commit` for every segment.

    Args:
        store: keeps the pages.
        generation: of the keys, so that pages of a run that went back to a checkpoint are not mistaken for this one's.
        sequences: unique number of each row.
        heads: the model's numbers of this rank's KV heads.
        chunk_size: C.
        window: chunks of the window, the query's own included.
    """

    def __init__(
        self, store: TierStore, generation: int, sequences: Sequence[int], heads: range, chunk_size: int, window: int
    ) -> None:
        self._store, self._generation = store, generation
        self._sequences, self._heads = tuple(sequences), heads
        self._size, self._window = chunk_size, window
        self._layers: dict[int, _Layer] = {}
        self._staged: dict[int, Update] = {}
        self._wanted: dict[int, list[PageKey]] = {}
        self._documents: Documents | None = None

    def begin(self, documents: Documents) -> None:
        """The next segment's slots, a part of the rows."""
        self._documents = documents
        self._prefetch(0)

    def view(self, layer: int) -> SegmentView:
        """What `layer` sees of the segments before this one."""
        self._prefetch(layer + 1)
        return SegmentView(self, layer)

    def stage(self, layer: int, update: Update) -> None:
        """Keep what `layer` computed until :meth:`commit`."""
        self._staged[layer] = update

    def commit(self) -> None:
        """Make the staged segment part of the memory; call it when its backward has ended."""
        if self._documents is None:
            raise ValueError("there is no segment to commit: call begin first.")
        chunks = Chunks.of(self._documents, self._size)
        for layer, update in self._staged.items():
            if update.recalled is not None:
                self._put(layer, update, chunks)
                self._wanted[layer] = self._last_recalled(layer, update.recalled)
            self._layers[layer] = self._joined(self._layers.get(layer), update)
        self._staged.clear()

    def close(self) -> None:
        """Forget the rows."""
        for sequence in self._sequences:
            self._store.drop(sequence)
        self._layers.clear()
        self._staged.clear()
        self._wanted.clear()

    def key(self, row: int, layer: int, head: int, chunk: int) -> PageKey:
        """The page of this rank's `head`-th KV head."""
        return PageKey(self._generation, self._sequences[row], layer, self._heads[head], chunk)

    def state(self) -> dict[str, Any]:
        """Everything but the pages, as plain tensors and numbers."""
        layers = {
            number: {field.name: getattr(layer, field.name) for field in fields(layer)}
            for number, layer in self._layers.items()
        }
        return {"sequences": list(self._sequences), "layers": layers}

    def blocks(self) -> Iterator[dict[str, Any]]:
        """The pages, some tens of chunks at a time, each block as plain tensors and numbers."""
        for layer, known in self._layers.items():
            if known.signature is None:
                continue
            for begin in range(0, known.summary_k.shape[1], _CHUNKS_PER_BLOCK):
                numbers = range(begin, min(begin + _CHUNKS_PER_BLOCK, known.summary_k.shape[1]))
                places = [(row, layer, head, chunk) for row in range(len(self._sequences)) for chunk in numbers
                          for head in range(len(self._heads))]  # fmt: skip
                kept = [place for place in places if self._store.holds(self.key(*place))]
                if kept:
                    pages = self._store.read_all([self.key(*place) for place in kept])
                    yield {"places": kept, "pages": {name: value.clone() for name, value in pages.items()}}

    def restore(self, state: dict[str, Any], blocks: Iterator[dict[str, Any]], device: torch.device) -> None:
        """Take over what :meth:`state` and :meth:`blocks` gave, under this session's keys."""
        for number, layer in state["layers"].items():
            moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in layer.items()}
            self._layers[int(number)] = _Layer(**moved)
        for block in blocks:
            self._store.put([self.key(*place) for place in block["places"]], **block["pages"])

    def _prefetch(self, layer: int) -> None:
        if wanted := self._wanted.get(layer):
            self._store.prefetch(wanted)

    def _put(self, layer: int, update: Update, chunks: Chunks) -> None:
        lengths = chunks.at_hand(chunks.lengths)
        rows, numbers, heads = torch.meshgrid(
            *(torch.arange(count) for count in (*lengths.shape, len(self._heads))), indexing="ij"
        )
        # chunks without tokens have no page; [B, n, G] -> [P]
        filled = (lengths > 0).cpu()[..., None].expand(rows.shape)
        rows, numbers, heads = rows[filled], numbers[filled], heads[filled]
        keys = [
            self.key(row, layer, head, chunks.first + number)
            for row, number, head in zip(rows.tolist(), numbers.tolist(), heads.tolist(), strict=True)
        ]
        assert update.k is not None and update.v is not None and update.summaries is not None
        # [B, S, G, d] -> [B, n, C, G, d] -> [P, C, d]
        k, v = (x.unflatten(1, (-1, self._size)).transpose(2, 3)[rows, numbers, heads] for x in (update.k, update.v))
        signature = update.summaries.signature
        assert signature is not None
        summaries = (x[rows, numbers, heads] for x in (update.summaries.k, update.summaries.v, signature))
        self._store.put(keys, k, v, lengths[rows, numbers], *summaries)

    def _last_recalled(self, layer: int, recalled: Tensor) -> list[PageKey]:
        """What the last chunk of a segment recalled is what the next segment's first will probably want."""
        last = recalled[:, -1].tolist()
        return [self.key(row, layer, head, chunk) for row, heads in enumerate(last) for head, chunks in enumerate(heads)
                for chunk in chunks if chunk >= 0]  # fmt: skip

    def _joined(self, before: _Layer | None, update: Update) -> _Layer:
        new = update.summaries
        assert update.k is not None and update.v is not None and new is not None
        assert not isinstance(update.carry_k, tuple) and not isinstance(update.carry_v, tuple)
        halo = (self._window - 1) * self._size
        if before is None:
            k, v, queries = update.k, update.v, update.queries
            summaries: list[Tensor | None] = [new.k, new.v, new.signature]
        else:
            k, v = torch.cat((before.k, update.k), dim=1), torch.cat((before.v, update.v), dim=1)
            queries = self._last_queries(before.queries, update.queries)
            summaries = [None if old is None or late is None else torch.cat((old, late), dim=1)
                         for old, late in zip((before.summary_k, before.summary_v, before.signature),
                                              (new.k, new.v, new.signature), strict=True)]  # fmt: skip
        k, v = (x[:, max(0, x.shape[1] - halo) :].clone() for x in (k, v))
        assert summaries[0] is not None and summaries[1] is not None
        return _Layer(k, v, summaries[0], summaries[1], summaries[2], queries, update.carry_k, update.carry_v)

    def _last_queries(self, before: Tensor | None, late: Tensor | None) -> Tensor | None:
        """The last Q tokens' of both; a segment's row may hold fewer than Q."""
        if before is None or late is None or self._documents is None:
            return late
        padding = self._documents.padding
        slots = self._documents.starts.shape[1]
        if padding is None and slots >= SELECTING_QUERIES:
            return late
        tokens = torch.full_like(late[:, 0, 0, 0], slots).long() if padding is None else (~padding).sum(dim=1)
        fresh = tokens.clamp_max(SELECTING_QUERIES)
        # slot j of the result is slot j of the late ones, or slot j + fresh of those before
        places = torch.arange(SELECTING_QUERIES, device=late.device) + fresh[:, None]
        old = before.gather(1, places.clamp_max(SELECTING_QUERIES - 1)[:, :, None, None].expand_as(before))
        return torch.where((places < SELECTING_QUERIES)[:, :, None, None], old, late)


class SegmentView:
    """memory.view.View of one layer over a :class:`Session`."""

    def __init__(self, session: Session, layer: int) -> None:
        self._session, self._layer = session, layer
        self._known = session._layers.get(layer)

    @property
    def open(self) -> None:
        """Segments have whole chunks."""
        return None

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Tensor | None:
        """The state that the last segment left, in rows whose document goes on."""
        if self._known is None:
            return None
        state = self._known.carry_k if name == "k" else self._known.carry_v
        assert state is not None
        return torch.where(documents.continues[:, None, None], state, x[:, 0].to(state.dtype))

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """The end of the segments before."""
        if self._known is None:
            return k[:, :0], v[:, :0]
        return self._known.k, self._known.v

    def queries(self, local: Tensor) -> Tensor | None:
        """Those of the segments before."""
        return None if self._known is None else self._known.queries

    def summaries(self, local: Summaries) -> Summaries:
        """Those of the segments before, then `local`."""
        known = self._known
        if known is None:
            return local
        return Summaries(known.summary_k, known.summary_v, known.signature).then(local)

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """Recalled chunks of earlier segments, read from the store."""
        session = self._session
        known = 0 if self._known is None else self._known.summary_k.shape[1]

        def key(row: int, head: int, chunk: int) -> PageKey:
            return session.key(row, self._layer, head, chunk)

        return read_pages(session._store, key, recalled, k, known=known, halo=halo, size=session._size)

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """Raises ValueError: the dense core has no segments."""
        raise ValueError("the dense core sees all tokens at once: use the block core with segments.")
