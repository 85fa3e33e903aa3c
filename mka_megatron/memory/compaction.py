"""Moving the tokens of rows with gaps together and back. Shapes: B batch, S sequence (slots)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mka_megatron.memory.documents import Documents


@dataclass(frozen=True)
class Move:
    """A gather of the B*S slots, to as many or to rows of another length."""

    source: Tensor
    """[B*S] int64: the slot that comes here."""
    blank: Tensor
    """[B*S] bool: none does."""


@dataclass(frozen=True, eq=False)
class Compaction:
    """Rows whose documents have gaps, and the same rows without."""

    documents: Documents
    """The rows without gaps, on their own: `whole` is None."""
    into: Move
    back: Move

    def take(self, x: Tensor) -> Tensor:
        """[B, S, ...] of the rows with gaps -> the same of those without; 0 on padding. Differentiable."""
        return _Moved.apply(x, self.into, self.back)

    def put(self, x: Tensor) -> Tensor:
        """[B, S, ...] of the rows without gaps -> the same of those with; 0 on padding. Differentiable."""
        return _Moved.apply(x, self.back, self.into)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, inverse: Move) -> Tensor:
        ctx.moves = (inverse, move)
        return moved(x, move)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Moved.apply(grad, *ctx.moves), None, None


def moved(x: Tensor, move: Move) -> Tensor:
    """`x` [B, S, ...] gathered by `move`, 0 where it is blank; without a gradient."""
    # [B, S, ...] -> [B*S, ...] and back
    flat = x.flatten(0, 1).index_select(0, move.source)
    return flat.masked_fill_(move.blank.view(-1, *(1,) * (flat.dim() - 1)), 0).unflatten(0, (len(x), -1))
