"""Document boundaries of a packed batch. Shapes: B batch, S sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a [B, S] batch lie: everything that has to reset at a boundary reads this.

    The tensors may live on any device; the spans are host integers, so that planning over documents
    never waits for a device. Build it with :meth:`from_starts` or :meth:`whole`.
    """

    starts: Tensor
    """[B, S] bool: a document's first token; column 0 is always True."""
    padding: Tensor | None
    """[B, S] bool: slots that hold no token, at the tail of a document or filling a row; None: no padding."""
    positions: Tensor
    """[B, S] int64: a token's place in its document; 0 on padding."""
    spans: tuple[tuple[int, int, int], ...]
    """(row, begin, end) of every document's tokens, ascending, padding excluded."""

    _derived: dict[Callable[[Documents], Any], Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_starts(starts: Tensor, padding: Tensor | None = None) -> Documents:
        """Documents of [B, S] bool `starts` and `padding`; reads values, so call it with CPU tensors.

        Raises ValueError when column 0 of `starts` is not all True, when the shapes differ, or when a token
        follows padding without a start, or a start lies on padding (other than in a row without tokens).
        """
        if starts.dim() != 2 or starts.dtype != torch.bool:
            raise ValueError(
                f"starts is {starts.dtype} of shape {list(starts.shape)}: give a bool tensor [B, S]."
            )
        if not bool(starts[:, 0].all()):
            raise ValueError("starts[:, 0] is False in some row: mark every row's first token as a start.")
        if padding is not None and padding.shape != starts.shape:
            raise ValueError(
                f"padding has shape {list(padding.shape)}, starts {list(starts.shape)}: make them equal."
            )
        if padding is not None and not bool(padding.any()):
            padding = None
        sequence = starts.shape[1]
        slots = torch.arange(sequence, device=starts.device)
        first = torch.where(starts, slots, 0).cummax(dim=1).values
        positions = slots - first
        if padding is not None:
            _check_padding(starts, padding)
            positions = positions.masked_fill(padding, 0)
        spans = []
        for row, begins in groupby(starts.nonzero().tolist(), key=lambda start: start[0]):
            begin = [start[1] for start in begins]
            spans += [(row, b, e) for b, e in zip(begin, [*begin[1:], sequence], strict=True)]
        if padding is not None:
            tokens = (~padding).long().cumsum(dim=1).tolist()
            counts = [tokens[r][e - 1] - (tokens[r][b - 1] if b else 0) for r, b, e in spans]
            spans = [(r, b, b + n) for (r, b, _), n in zip(spans, counts, strict=True) if n]
        return Documents(starts, padding, positions, tuple(spans))

    @staticmethod
    def whole(batch: int, sequence: int, device: torch.device | str = "cpu") -> Documents:
        """One document per row."""
        starts = torch.zeros(batch, sequence, dtype=torch.bool, device=device)
        starts[:, 0] = True
        positions = torch.arange(sequence, device=device).expand(batch, sequence)
        return Documents(starts, None, positions, tuple((row, 0, sequence) for row in range(batch)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """The same documents with their tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        padding = None if self.padding is None else move(self.padding)
        return Documents(move(self.starts), padding, move(self.positions), self.spans)

    def once(self, build: Callable[[Documents], T]) -> T:
        """build(self), computed on the first call and then kept: every layer plans over the same documents."""
        if build not in self._derived:
            self._derived[build] = build(self)
        return self._derived[build]

    @property
    def packed(self) -> bool:
        """Some row holds more than one document."""
        return any(begin for _, begin, _ in self.spans)

    @property
    def whole_rows(self) -> bool:
        """Every row is one document without padding."""
        return self.padding is None and not self.packed

    @cached_property
    def regions(self) -> tuple[tuple[slice, slice], ...]:
        """(rows, times) that cover the tokens, none of them across a document's end: the whole batch as one
        region if every row is one document, else one region per document."""
        if self.whole_rows:
            return ((slice(None), slice(None)),)
        return tuple((slice(row, row + 1), slice(begin, end)) for row, begin, end in self.spans)

    @cached_property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, times, last), int64 [P] each: every padding slot behind tokens, and the slot of the last token
        before it, whose state it holds. Rows without tokens are in :attr:`empty` instead."""
        batch, sequence = self.starts.shape
        ends: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        for row, begin, end in self.spans:
            ends[row].append((begin, end))
        rows: list[int] = []
        times: list[int] = []
        last: list[int] = []
        for row, spans in enumerate(ends):
            nexts = [*(begin for begin, _ in spans[1:]), sequence]
            for (_, end), following in zip(spans, nexts, strict=False):
                rows += [row] * (following - end)
                times += range(end, following)
                last += [end - 1] * (following - end)
        device = self.starts.device
        return tuple(torch.tensor(part, dtype=torch.int64, device=device) for part in (rows, times, last))  # type: ignore[return-value]

    @cached_property
    def empty(self) -> tuple[int, ...]:
        """Rows that hold no token at all."""
        return tuple(sorted(set(range(self.starts.shape[0])) - {row for row, _, _ in self.spans}))


def _check_padding(starts: Tensor, padding: Tensor) -> None:
    resumed = ~padding[:, 1:] & padding[:, :-1] & ~starts[:, 1:]
    blank = padding & starts & ~padding.all(dim=1, keepdim=True)
    problems = {"a token follows padding inside a document": resumed, "a document starts on padding": blank}
    for problem, where in problems.items():
        if bool(where.any()):
            row = int(where.any(dim=1).nonzero()[0])
            raise ValueError(f"padding, row {row}: {problem}: pad the tail of a document or a whole row.")
