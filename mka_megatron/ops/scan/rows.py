"""What the scan reads of the documents of a batch. memory.Documents is one. Shapes: B batch, S slots, P padding slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Gathered(Protocol):
    """Rows with the tokens of every document moved together. memory.compaction.Compaction is one."""

    @property
    def documents(self) -> Rows:
        """The rows without gaps."""

    def take(self, x: Tensor) -> Tensor:
        """[B, S, ...] of the rows with gaps -> the same of those without; 0 on padding."""

    def put(self, x: Tensor) -> Tensor:
        """The way back."""


class Rows(Protocol):
    """Documents in rows, their places as host integers: nothing here waits for a device."""

    @property
    def starts(self) -> Tensor:
        """[B, S] bool: a document's first slot; column 0 is always True."""

    @property
    def padding(self) -> Tensor | None:
        """[B, S] bool: slots without a token; None: there are none."""

    @property
    def positions(self) -> Tensor:
        """[B, S] int64: a token's place in its document; 0 on padding."""

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(row, first slot, past the last slot) of every document with tokens, ascending."""

    @property
    def gaps(self) -> bool:
        """Some document has padding before its last token."""

    @property
    def compacted(self) -> Gathered:
        """The same tokens without gaps."""

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, times, last), int64 [P]: padding behind tokens of its row, and the slot of the last token before it."""

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(row, slots before its first token) of the rows that start with padding."""

    def once(self, build: Callable[..., T], *arguments: Any) -> T:
        """build(self, *arguments), computed on the first call and then kept."""
