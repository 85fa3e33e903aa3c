"""What every layer's attention needs beside the hidden states, made once per forward pass.

Shapes: B batch, T columns of the pass, S slots at hand, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mka_megatron.hf.layout import Layout
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.view import Alone, View

Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""transformers' rotary module: (any tensor, positions [B, S]) -> (cos, sin) [B, S, d] of the tensor's dtype."""
Core = Callable[..., tuple[Any, ...]]
"""(slots, view, the layer's tensors at hand) -> what a variant's `attend` gives."""


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots at hand."""

    documents: Documents
    chunks: Chunks | None
    """None where the variant works on none."""
    cos: Tensor
    """[B or 1, S, d]."""
    sin: Tensor
    """[B or 1, S, d]."""
    rope: Rope
    """Tables at other positions."""

    @staticmethod
    def of(documents: Documents, chunks: Chunks | None, rope: Rope, like: Tensor) -> Slots:
        """With tables of the dtype and device of `like`."""
        positions = documents.positions[:1] if documents.whole_rows and not documents.continued else documents.positions
        return Slots(documents, chunks, *rope(like, positions), rope)


@dataclass(frozen=True, eq=False)
class Whole:
    """A pass over whole rows, of which nothing is remembered."""

    layout: Layout
    slots: Slots

    def attend(self, layer: int, core: Core, *tensors: Tensor | None) -> Tensor:
        """A layer's attention: `tensors` [B, T, ...] in the core's order -> [B, T, H, d]."""
        return self.layout.put(core(self.slots, Alone(), *map(self.layout.take, tensors))[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Whole:
        """The same on another device: a model may be spread over several."""
        slots = self.slots
        if slots.cos.device == torch.device(device):
            return self
        layout, chunks = self.layout.to(device), slots.chunks
        if chunks is not None:
            tables = (chunks.lengths, chunks.documents, chunks.last)
            lengths, documents, last = (table.to(device, non_blocking=non_blocking) for table in tables)
            chunks = replace(chunks, lengths=lengths, documents=documents, last=last)
        cos, sin = (table.to(device, non_blocking=non_blocking) for table in (slots.cos, slots.sin))
        return Whole(layout, Slots(layout.documents, chunks, cos, sin, slots.rope))


@dataclass(frozen=True, eq=False)
class Step:
    """A pass that goes on with remembered rows."""

    generation: Generation
    slots: Callable[[Piece], Slots]
    """Of any piece."""

    @staticmethod
    def of(generation: Generation, rope: Rope, like: Tensor) -> Step:
        """The pass that the generation has begun."""
        return Step(generation, partial(_slots, rope=rope, like=like.new_empty(0)))

    def attend(self, layer: int, core: Core, *tensors: Tensor | None) -> Tensor:
        """As :meth:`Whole.attend`; 0 in columns without a token."""
        if not self.generation.pieces:
            assert tensors[0] is not None
            return torch.zeros_like(tensors[0])
        return self.generation.attend(layer, partial(_piece, core, self.slots), *tensors)


def _slots(piece: Piece, rope: Rope, like: Tensor) -> Slots:
    # the same for all layers
    return piece.documents.once(Slots.of, piece.continued.chunks, rope, like)


def _piece(
    core: Core, slots: Callable[[Piece], Slots], piece: Piece, view: View, *tensors: Tensor | None
) -> tuple[Tensor, Any]:
    out, _, *update = core(slots(piece), view, *tensors)
    return out, update[0] if update else None
