"""Rows of fixed length packed from documents: random access by row number, nothing materialised.

An epoch is a stream of slots: the documents in that epoch's order, each one padded to a multiple of
`chunk_size` when one is given. Row r is the slots [r*S, (r+1)*S) of it, and the slot after them for the last
label; rows are then visited in a scattered order. A document that crosses a row's end goes on in the next
row as a fresh document. With `split_documents` false (fine-tuning samples, which are useless without their
beginning) a document that does not fit goes to the next row instead, and one longer than a row is cut;
with a `chunk_size` and a loss mask each response then begins on a multiple of it too, as generation closes the
open chunk at a prompt's end.

Memory is O(number of documents); every order depends on (seed, epoch) only.
Legend: S slots of a row, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mka_megatron.data.batch import IGNORE, DataError
from mka_megatron.data.corpus import Corpus
from mka_megatron.data.shuffle import permutation, scatter


@dataclass(frozen=True)
class Row:
    """One packed sample."""

    tokens: np.ndarray
    """[S] int64; 0 in padding slots."""
    labels: np.ndarray
    """[S] int64; IGNORE where there is no loss."""
    starts: np.ndarray
    """[S] bool: a document's first token; [0] always."""
    padding: np.ndarray
    """[S] bool: slots without a token."""


class Packing:
    """`len()` rows per epoch; `row(n)` for any n >= 0 (epoch n // len, wraps for ever)."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence_length: int,
        chunk_size: int | None = None,
        reset_at_documents: bool = True,
        split_documents: bool = True,
        count_prompts: bool = False,
        seed: int | None = 0,
    ) -> None:
        """Plan the rows of `corpus`.

        Args:
            corpus: the documents.
            sequence_length: S, slots of a row.
            chunk_size: pad every document, and what comes before a response, to a multiple of this; None: no padding.
            reset_at_documents: labels that cross documents are IGNORE and every document is a start; when
                false, a row is one document.
            split_documents: see the module.
            count_prompts: every token is a label, whatever the loss mask says of it.
            seed: order of documents and rows; None: storage order.

        Raises:
            DataError: no tokens, or sequence_length, chunk_size and reset_at_documents do not fit together.
        """
        if sequence_length < 1:
            raise DataError(f"data.sequence_length: {sequence_length} is not positive; give at least 1")
        if chunk_size is not None:
            if not reset_at_documents:
                raise DataError(
                    "data.pad_documents_to_chunks: true needs data.reset_at_documents: true; turn one of them round"
                )
            if sequence_length % chunk_size:
                raise DataError(
                    f"data.sequence_length: {sequence_length} is no multiple of memory_hierarchy.l1.chunk_size "
                    f"{chunk_size}, which data.pad_documents_to_chunks needs; round it to "
                    f"{max(1, sequence_length // chunk_size) * chunk_size}"
                )
        self._corpus = corpus
        self._length = sequence_length
        self._reset = reset_at_documents
        self._split = split_documents
        self._count_prompts = count_prompts
        self._seed = seed
        chunk = chunk_size or 1
        # first token of every piece of a document that begins on a chunk of its own, and the piece's slot
        self._cuts: list[tuple[tuple[int, int], ...]] | None = None
        if split_documents:
            self._used = corpus.lengths
            self._slots = -(-self._used // chunk) * chunk
        elif chunk_size is None or corpus.loss is None:
            self._used = np.minimum(corpus.lengths, sequence_length)
            self._slots = -(-self._used // chunk) * chunk
        else:
            self._cuts = [_cuts(corpus, document, chunk) for document in range(len(corpus.lengths))]
            self._used, self._slots = _fit(self._cuts, corpus.lengths, sequence_length, chunk)
        total = int(self._slots.sum())
        if total == 0:
            raise DataError(f"{corpus.name}: no tokens to pack; add documents or remove the source")
        self._epoch = -1
        self._order = self._ends = np.empty(0, np.int64)
        if split_documents:
            self._rows = -(-total // sequence_length)
            self._first: np.ndarray | None = None
        else:
            self._enter(0)
            self._first = self._fill_rows()
            self._rows = len(self._first) - 1

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int) -> Row:
        """Row `number` of the endless sequence of epochs."""
        epoch, index = divmod(number, self._rows)
        if self._seed is not None:
            index = scatter(index, self._rows, "rows", self._seed, epoch)
        # Rows of whole documents are filled once; an epoch only reorders them.
        self._enter(epoch if self._split else 0)
        length = self._length
        tokens = np.zeros(length + 1, np.int64)
        counts = np.zeros(length + 1, bool)
        begins = np.zeros(length + 1, bool)
        padding = np.ones(length + 1, bool)
        follows: list[tuple[int, int]] = []
        before = (-1, -1, -1)
        for document, begin, end, slot in self._pieces(index):
            stop = slot + end - begin
            if begin and before[:2] == (document, begin):
                follows.append((before[2], slot))
            before = (document, end, stop - 1)
            tokens[slot:stop] = self._corpus.read(document, begin, end)
            counts[slot:stop] = self._count_prompts or self._corpus.read_loss(document, begin, end)
            padding[slot:stop] = False
            begins[slot] = begin == 0
        keep = counts[1:] & ~padding[1:] & ~padding[:-1]
        starts = np.zeros(length, bool)
        if self._reset:
            keep &= ~begins[1:]
            starts = begins[:-1]
        starts[0] = True
        labels = np.where(keep, tokens[1:], IGNORE)
        for last, slot in follows:
            if counts[slot]:
                labels[last] = tokens[slot]
        return Row(tokens[:-1], labels, starts, padding[:-1])

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        count = len(self._slots)
        self._order = (
            np.arange(count) if self._seed is None else permutation(count, "documents", self._seed, epoch)
        )
        self._ends = np.cumsum(self._slots[self._order])
        self._epoch = epoch

    def _pieces(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """(document, its first token, past its last token, slot in the row) over the row's S + 1 slots."""
        if self._first is None:
            low = index * self._length
            high = low + self._length + 1
            place = int(np.searchsorted(self._ends, low, side="right"))
        else:
            place, last = int(self._first[index]), int(self._first[index + 1])
            low = int(self._ends[place] - self._slots[self._order[place]])
            high = int(self._ends[last - 1])
        while place < len(self._order):
            document = int(self._order[place])
            start = int(self._ends[place] - self._slots[document])
            if start >= high:
                return
            begin = max(0, low - start)
            end = int(self._used[document])
            if self._cuts is None:
                end = min(end, high - start)
            pieces = ((begin, begin),) if self._cuts is None else self._cuts[document]
            for (first, offset), (following, _) in pairwise((*pieces, (end, 0))):
                if first < min(following, end):
                    yield document, first, min(following, end), start + offset - low
            place += 1

    def _fill_rows(self) -> np.ndarray:
        """[rows + 1] int64: place in the order of each row's first document, next-fit."""
        first, place, filled = [0], 0, 0
        while place < len(self._order):
            place = int(np.searchsorted(self._ends, filled + self._length, side="right"))
            filled = int(self._ends[place - 1])
            first.append(place)
        return np.array(first, np.int64)


def _cuts(corpus: Corpus, document: int, chunk: int) -> tuple[tuple[int, int], ...]:
    """(first token, slot) of the pieces of a document, one more wherever the loss mask turns on."""
    mask = corpus.read_loss(document, 0, int(corpus.lengths[document]))
    cuts = [(0, 0)]
    for token in (np.flatnonzero(mask[1:] & ~mask[:-1]) + 1).tolist():
        first, slot = cuts[-1]
        end = slot + token - first
        cuts.append((token, -(-end // chunk) * chunk))
    return tuple(cuts)


def _fit(
    cuts: Sequence[tuple[tuple[int, int], ...]], lengths: np.ndarray, sequence: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """[D] int64 each: tokens of every document that fit into a row, and its slots, padding included."""
    used, slots = np.zeros_like(lengths), np.zeros_like(lengths)
    for document, (pieces, length) in enumerate(zip(cuts, lengths.tolist(), strict=True)):
        first, slot = max(piece for piece in pieces if piece[1] < sequence)
        used[document] = min(length, first + sequence - slot)
        following = next((token for token, _ in pieces if token > first), length)
        used[document] = min(used[document], following)
        slots[document] = -(-(slot + used[document] - first) // chunk) * chunk
    return used, slots
