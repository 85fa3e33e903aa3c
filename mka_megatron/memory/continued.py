"""Rows that go on: tokens at hand whose row began in earlier calls, which a view remembers.

Shapes: B rows, S slots at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mka_megatron.memory.documents import Documents

if TYPE_CHECKING:
    from mka_megatron.memory.chunks import Chunks


@dataclass(frozen=True, eq=False)
class Continued:
    """Each row is one document. Its tokens at hand lie at its head, without gaps."""

    tokens: tuple[int, ...]
    """Tokens at hand of each row."""
    earlier: tuple[int, ...]
    """Tokens of each row before slot 0."""
    again: tuple[int, ...]
    """Tokens at hand of each row, the first ones, that were at hand before: nobody needs their outputs again."""
    first: tuple[int, ...]
    """Tokens of each row's first chunk, so far."""
    chunks: Chunks | None
    """The chunks of the rows; None where there are none."""
    opened: tuple[int, ...] | None = None
    """Tokens of each row's open chunk before slot 0, where the slots at hand are the next ones of open chunks, which
    stay open; None: slot 0 begins a chunk, or there are none."""
    hidden: tuple[int, ...] | None = None
    """Tokens of each row, the first ones, that nobody sees; None: everything is seen."""

    def documents(self, device: torch.device | str) -> Documents:
        """These rows, as wide as the longest one."""
        slots = torch.arange(max(self.tokens), device=device)
        tokens, earlier = (
            torch.tensor(counts, device=device)[:, None] for counts in (self.tokens, self.earlier)
        )
        starts = (slots == 0).expand(len(self.tokens), -1)
        padding = None if len(set(self.tokens)) == 1 else slots >= tokens
        positions = earlier + slots
        if padding is not None:
            positions = positions.masked_fill(padding, 0)
        spans = tuple((row, 0, count) for row, count in enumerate(self.tokens) if count)
        return Documents(starts, padding, positions, spans, spans, False, continued=self)

    def later(self) -> Continued:
        """The same rows as seen by a level that has no keys in a row's first chunk."""
        return replace(self, hidden=self.first)
