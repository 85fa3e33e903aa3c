"""Document boundaries of a packed batch. Shapes: B batch, S sequence (slots), T tokens of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.compaction import Compaction, Move, moved

if TYPE_CHECKING:
    from mka_megatron.memory.continued import Continued

T = TypeVar("T")
Span = tuple[int, int, int]
"""(row, first slot, past the last slot)."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a [B, S] batch lie: everything that has to reset at a boundary reads this.

    The tensors may live on any device; the spans are host integers, so that planning over documents
    never waits for a device. Build it with :meth:`from_starts` or :meth:`unpacked`, and take :meth:`part` of it.
    """

    starts: Tensor
    """[B, S] bool: a document's first slot; column 0 is always True."""
    padding: Tensor | None
    """[B, S] bool: slots that hold no token, inside a document (gaps), at its tail or filling a row; None: none."""
    positions: Tensor
    """[B, S] int64: a token's place in its document, padding not counted; 0 on padding."""
    spans: tuple[Span, ...]
    """Every document with tokens, ascending: from its first token (slot 0, where it goes on there) to past its last,
    gaps included."""
    runs: tuple[Span, ...]
    """Every contiguous run of a document's tokens, ascending."""
    gaps: bool
    """Some document has padding before its last token."""
    whole: Documents | None = None
    """The rows that these slots are a part of; None: these are whole rows."""
    begin: int = 0
    """Slot of `whole` that is slot 0 here."""
    continued: Continued | None = None
    """How these slots go on with rows that a view remembers (generation), then instead of `whole`; None: they do not."""

    _derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_starts(starts: Tensor, padding: Tensor | None = None) -> Documents:
        """Documents of [B, S] bool `starts` and `padding`; reads values, so call it with CPU tensors.

        Raises ValueError when column 0 of `starts` is not all True, when the shapes differ, or when a document
        that has tokens starts on padding.
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
        first = _first_slots(starts)
        if padding is None:
            positions = torch.arange(starts.shape[1], device=starts.device) - first
            spans = _runs(starts, torch.ones_like(starts))
            return Documents(starts, None, positions, spans, spans, False)
        tokens = ~padding
        positions = _ranks(tokens, first).masked_fill(padding, 0)
        late = tokens & (positions == 0) & ~starts
        if bool(late.any()):
            row = int(late.any(dim=1).nonzero()[0])
            raise ValueError(f"padding, row {row}: a document starts on padding: start it on its first token.")
        runs = _runs(starts, tokens)
        rows, begins = torch.tensor([run[:2] for run in runs], dtype=torch.int64).view(-1, 2).unbind(1)
        spans = _join(runs, starts.long().cumsum(dim=1)[rows, begins].tolist())
        return Documents(starts, padding, positions, spans, runs, runs != spans)

    @staticmethod
    def unpacked(batch: int, sequence: int, device: torch.device | str = "cpu") -> Documents:
        """One document per row."""
        starts = torch.zeros(batch, sequence, dtype=torch.bool, device=device)
        starts[:, 0] = True
        positions = torch.arange(sequence, device=device).expand(batch, sequence)
        spans = tuple((row, 0, sequence) for row in range(batch))
        return Documents(starts, None, positions, spans, spans, False)

    def part(self, begin: int, end: int) -> Documents:
        """The slots [begin, end) of every row: spans and runs count from `begin`, positions go on.

        Its `whole` are the whole rows, of which this may itself be a part. Raises ValueError for slots that are
        not there.
        """
        sequence = self.starts.shape[1]
        if not 0 <= begin < end <= sequence:
            raise ValueError(f"slots [{begin}, {end}) are no part of rows of {sequence}.")
        rows = self if self.whole is None else self.whole
        low, high = self.begin + begin, self.begin + end
        starts = rows.starts[:, low:high].clone()
        starts[:, 0] = True
        spans: list[Span] = []
        runs: list[Span] = []
        for (row, first, _), mine in zip(rows.spans, rows._runs_of_spans, strict=True):
            here = [(row, max(b, low) - low, min(e, high) - low) for _, b, e in mine if b < high and e > low]
            if here:
                spans.append((row, max(first, low) - low, here[-1][2]))
                runs += here
        full = sum(last - first for _, first, last in runs) == starts.numel()
        padding = None if rows.padding is None or full else rows.padding[:, low:high]
        positions = rows.positions[:, low:high]
        return Documents(
            starts, padding, positions, tuple(spans), tuple(runs), runs != spans, rows, low
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """The same documents with their tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        padding = None if self.padding is None else move(self.padding)
        whole = None if self.whole is None else self.whole.to(device, non_blocking)
        return Documents(
            move(self.starts), padding, move(self.positions), self.spans, self.runs, self.gaps, whole, self.begin,
            self.continued,
        )  # fmt: skip

    def once(self, build: Callable[..., T], *arguments: Any) -> T:
        """build(self, *arguments), computed on the first call and then kept: every layer plans over the same
        documents."""
        key = (build, *arguments)
        if key not in self._derived:
            self._derived[key] = build(self, *arguments)
        return self._derived[key]

    def later(self, slots: int) -> Documents:
        """The same documents without their first `slots` slots, which are padding then: for what only exists from
        there on. Documents without later tokens drop out."""
        if self.continued is not None:
            return replace(self, continued=self.continued.later())
        if self.whole is not None:
            later = self.whole.once(Documents.later, slots)
            return later.part(self.begin, self.begin + self.starts.shape[1])
        runs: list[Span] = []
        owners: list[int] = []
        for owner, ((row, begin, _), mine) in enumerate(zip(self.spans, self._runs_of_spans, strict=True)):
            rest = [(row, max(b, begin + slots), e) for _, b, e in mine if e > begin + slots]
            runs += rest
            owners += [owner] * len(rest)
        spans = _join(runs, owners)
        starts = torch.zeros(self.starts.shape, dtype=torch.bool)
        starts[:, 0] = True
        rows, begins = torch.tensor([span[:2] for span in spans], dtype=torch.int64).view(-1, 2).unbind(1)
        starts[rows, begins] = True
        starts = starts.to(self.starts.device)
        tokens = torch.arange(starts.shape[1], device=starts.device) - _first_slots(self.starts) >= slots
        if self.padding is not None:
            tokens &= ~self.padding
        positions = _ranks(tokens, _first_slots(starts)).masked_fill(~tokens, 0)
        return Documents(starts, ~tokens, positions, spans, tuple(runs), tuple(runs) != spans)

    @property
    def packed(self) -> bool:
        """Some row holds more than one document, or starts with padding."""
        return any(begin for _, begin, _ in self.spans)

    @property
    def whole_rows(self) -> bool:
        """Every row is one document without padding."""
        return self.padding is None and not self.packed

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens at hand of every document of `spans`."""
        return tuple(sum(end - begin for _, begin, end in runs) for runs in self._runs_of_spans)

    @cached_property
    def _runs_of_spans(self) -> tuple[tuple[Span, ...], ...]:
        if not self.gaps:
            return tuple((run,) for run in self.runs)
        inner: list[list[Span]] = [[] for _ in self.spans]
        owner = 0
        for row, begin, end in self.runs:
            while self.spans[owner][0] < row or self.spans[owner][2] <= begin:
                owner += 1
            inner[owner].append((row, begin, end))
        return tuple(map(tuple, inner))

    @cached_property
    def continues(self) -> Tensor:
        """[B] bool: slot 0 goes on with a document that began before it."""
        if self.continued is not None:
            return torch.tensor(self.continued.earlier, device=self.starts.device) > 0
        if self.whole is None:
            return torch.zeros_like(self.starts[:, 0])
        return ~self.whole.starts[:, self.begin]

    @cached_property
    def regions(self) -> tuple[tuple[slice, slice], ...]:
        """(rows, times) that cover the tokens, none of them across a document's end: the whole batch as one
        region if every row is one document, else one region per document."""
        if self.whole_rows:
            return ((slice(None), slice(None)),)
        return tuple((slice(row, row + 1), slice(begin, end)) for row, begin, end in self.spans)

    @cached_property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, times, last), int64 [P] each: every padding slot behind tokens of its row, and the slot of the
        last token before it, whose state it holds. Those before a row's first token are in :attr:`heads`."""
        batch, sequence = self.starts.shape
        runs: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
        for row, begin, end in self.runs:
            runs[row].append((begin, end))
        rows: list[int] = []
        times: list[int] = []
        last: list[int] = []
        for row, ends in enumerate(runs):
            nexts = [*(begin for begin, _ in ends[1:]), sequence]
            for (_, end), following in zip(ends, nexts, strict=False):
                rows += [row] * (following - end)
                times += range(end, following)
                last += [end - 1] * (following - end)
        device = self.starts.device
        return tuple(torch.tensor(part, dtype=torch.int64, device=device) for part in (rows, times, last))  # type: ignore[return-value]

    @cached_property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(row, slots) of the rows that start with padding: the slots before the first token, S if there is none."""
        sequence = self.starts.shape[1]
        first = {row: begin for row, begin, _ in reversed(self.runs)}
        begins = ((row, first.get(row, sequence)) for row in range(self.starts.shape[0]))
        return tuple((row, begin) for row, begin in begins if begin)

    @cached_property
    def compacted(self) -> Compaction:
        """The same tokens, those of every document moved together to its front: no gaps."""
        tokens = torch.ones_like(self.starts) if self.padding is None else ~self.padding
        slots = torch.arange(tokens.numel(), device=tokens.device)
        first = _first_slots(self.starts)
        row = slots.view(tokens.shape)[:, :1]
        # padding goes to one slot more, so that nothing here waits for the device
        to = torch.where(tokens, row + first + _ranks(tokens, first), tokens.numel()).flatten()
        source = torch.full((tokens.numel() + 1,), -1, device=tokens.device).scatter(0, to, slots)[:-1]
        into = Move(source.clamp_min(0), source < 0)
        back = Move(torch.where(tokens.flatten(), to, 0), ~tokens.flatten())
        spans = tuple(
            (row, begin, begin + count) for (row, begin, _), count in zip(self.spans, self.lengths, strict=True)
        )
        documents = Documents(
            self.starts, (source < 0).view(tokens.shape), moved(self.positions, into), spans, spans, False
        )
        return Compaction(documents, into, back)


def _first_slots(starts: Tensor) -> Tensor:
    """[B, S] int64: the first slot of every slot's document."""
    slots = torch.arange(starts.shape[1], device=starts.device)
    return torch.where(starts, slots, 0).cummax(dim=1).values


def _ranks(tokens: Tensor, first: Tensor) -> Tensor:
    """[B, S] int64: for a token, the tokens of its document before it."""
    before = tokens.long().cumsum(dim=1) - tokens.long()
    return before - before.gather(1, first)


def _runs(starts: Tensor, tokens: Tensor) -> tuple[Span, ...]:
    sealed = F.pad(starts[:, 1:] | ~tokens[:, 1:], (0, 1), value=True)
    begins = tokens & (starts | ~F.pad(tokens[:, :-1], (1, 0)))
    pairs = zip(begins.nonzero().tolist(), (tokens & sealed).nonzero().tolist(), strict=True)
    return tuple((row, begin, last + 1) for (row, begin), (_, last) in pairs)


def _join(runs: Sequence[Span], owners: Sequence[int]) -> tuple[Span, ...]:
    """One span from the first to the last run of every (row, owner)."""
    ends: dict[tuple[int, int], Span] = {}
    for (row, begin, end), owner in zip(runs, owners, strict=True):
        ends[row, owner] = (row, ends.get((row, owner), (row, begin, end))[1], end)
    return tuple(ends.values())
