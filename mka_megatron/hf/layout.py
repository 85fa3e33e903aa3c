"""Where the tokens of a batch lie: from transformers' masks and position ids to documents on chunk boundaries.

Shapes: B batch, S columns of the batch as transformers has it, T slots of the same rows with every document (and what
follows a closed prompt) on a chunk boundary, C chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.memory.compaction import Compaction, Move
from mka_megatron.memory.documents import Documents


def documents_of(attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, columns: int) -> Documents:
    """The documents of [B, S] columns, on the host.

    Args:
        attention_mask: [B, S], 0 on padding, or [B, 1, S, S] that says no more than causal attention and padding.
            None: no padding.
        position_ids: [B or 1, S]; without a mask, a step other than +1 starts another document. Otherwise they must
            count the tokens of a row; where they begin has no effect.

    Raises:
        ValueError: masks or positions that say anything else.
    """
    padding = None if attention_mask is None else _padding(attention_mask.cpu(), batch, columns)
    positions = None if position_ids is None else position_ids.cpu().expand(batch, columns)
    if padding is None and positions is None:
        return Documents.unpacked(batch, columns)
    starts = torch.zeros(batch, columns, dtype=torch.bool)
    starts[:, 0] = True
    if padding is None:
        assert positions is not None
        starts[:, 1:] = positions.diff(dim=1) != 1
        return Documents.from_starts(starts)
    starts |= _first_tokens(~padding)
    documents = Documents.from_starts(starts, padding)
    if positions is not None:
        offset = (positions - documents.positions).masked_fill(padding, 0)
        first = offset.gather(1, (~padding).long().argmax(dim=1, keepdim=True))
        if bool((offset != first).masked_fill(padding, False).any()):
            raise ValueError("position_ids do not count the tokens of attention_mask one by one: leave them out, or for "
                             "packed documents leave attention_mask out.")
    return documents


def _padding(mask: Tensor, batch: int, columns: int) -> Tensor | None:
    """[B, S] bool: no token; None where every column holds one."""
    if mask.dim() == 4:
        mask = _padding_of_square(mask, columns)
    if mask.shape != (batch, columns):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}: give [{batch}, {columns}], 0 on padding.")
    padding = mask == 0
    return padding if bool(padding.any()) else None


def _padding_of_square(mask: Tensor, columns: int) -> Tensor:
    """The [B, S] mask that a causal [B, 1, S, S] one was made of."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if tuple(seen.shape[1:]) != (1, columns, columns):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}: give [batch, {columns}], 0 on padding.")
    tokens = seen[:, 0, -1]
    causal = tokens[:, None] & torch.ones(columns, columns, dtype=torch.bool).tril()
    if bool((seen[:, 0] != causal)[tokens].any()):
        raise ValueError("a four-dimensional attention_mask says more than causal attention and padding: give "
                         "[batch, length], and position_ids for packed documents.")
    return tokens


def _first_tokens(tokens: Tensor) -> Tensor:
    """[B, S] bool: every row's first token."""
    return tokens & (tokens.long().cumsum(dim=1) == 1)


@dataclass(frozen=True)
class Layout:
    """The slots that the attention works on."""

    documents: Documents
    """Of [B, T] slots."""
    compaction: Compaction | None
    """From the [B, S] columns to the slots (take) and back (put); None: they are the same."""

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on `device`."""
        documents, compaction = self.documents.to(device), self.compaction
        if compaction is not None:
            into, back = (Move(m.source.to(device), m.blank.to(device)) for m in (compaction.into, compaction.back))
            compaction = Compaction(documents, into, back)
        return Layout(documents, compaction)

    def take(self, x: Tensor | None) -> Tensor | None:
        """[B, S, ...] -> [B, T, ...]."""
        return x if x is None or self.compaction is None else self.compaction.take(x)

    def put(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, S, ...]."""
        return x if self.compaction is None else self.compaction.put(x)


@dataclass
class _Piece:
    """Consecutive tokens of a document."""

    first: int
    """Column of the first one."""
    count: int
    begins: bool
    """With its document's first token."""
    slot: int = 0
    """Of its first token."""


def in_chunks(documents: Documents, size: int, prompt_columns: int | None = None) -> Layout:
    """`documents` with every document, and its tokens from column `prompt_columns` on, at a multiple of `size`.

    Args:
        documents: of [B, S] columns, on the host.
        prompt_columns: columns of the prompt, at whose end the open chunk is closed; None: there is no such end.

    Returns:
        The layout, T a multiple of `size` where the tokens had to move.
    """
    rows = _pieces(documents, size, prompt_columns)
    if all(piece.first == piece.slot for row in rows for piece in row):
        return Layout(documents, None)
    batch, columns = documents.starts.shape
    length = max((piece.slot + piece.count for row in rows for piece in row), default=1)
    return _moved_to(rows, batch, columns, _aligned(length, size))


def _pieces(documents: Documents, size: int, prompt_columns: int | None) -> list[list[_Piece]]:
    """Per row the runs of tokens, cut at the prompt's end, and their slots."""
    rows: list[list[_Piece]] = [[] for _ in range(len(documents.starts))]
    ends = [0] * len(rows)  # past the last token so far: its column
    cut = documents.starts.shape[1] if prompt_columns is None else prompt_columns
    first_tokens = {(row, begin) for row, begin, _ in documents.spans}
    for row, begin, end in documents.runs:
        for low, high in ((begin, min(end, cut)), (max(begin, cut), end)):
            if low >= high:
                continue
            before = rows[row][-1] if rows[row] else None
            slot = 0 if before is None else before.slot + before.count
            begins = (row, low) in first_tokens
            if begins or (ends[row] <= cut <= low):
                slot = _aligned(slot, size)
            rows[row].append(_Piece(low, high - low, begins, slot))
            ends[row] = high
    return rows


def _moved_to(rows: list[list[_Piece]], batch: int, columns: int, slots: int) -> Layout:
    starts = torch.zeros(batch, slots, dtype=torch.bool)
    starts[:, 0] = True
    into, back = torch.full((batch, slots), -1), torch.full((batch, columns), -1)
    for row, pieces in enumerate(rows):
        for piece in pieces:
            steps = torch.arange(piece.count)
            into[row, piece.slot : piece.slot + piece.count] = row * columns + piece.first + steps
            back[row, piece.first : piece.first + piece.count] = row * slots + piece.slot + steps
            starts[row, piece.slot] |= piece.begins
    documents = Documents.from_starts(starts, into < 0)
    return Layout(documents, Compaction(documents, _move(into), _move(back)))


def _move(source: Tensor) -> Move:
    # [B, S] -> [B*S]
    return Move(source.flatten().clamp_min(0), source.flatten() < 0)


def _aligned(slot: int, size: int) -> int:
    return -(-slot // size) * size
