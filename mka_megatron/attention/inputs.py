"""What an adapter hands to a variant besides q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Finish:
    """Norm and rotary embedding of queries and keys, applied after the levels are fused."""

    norm_q: Callable[[Tensor], Tensor]
    """[B, S, heads, d] -> the same shape."""
    norm_k: Callable[[Tensor], Tensor]
    """The same for every level's keys."""
    rotate: Callable[[Tensor, Tensor | None], Tensor]
    """(x [B, T, heads, d], positions [B, T]) -> x rotated; positions None: those of the tokens at hand."""

    def q(self, x: Tensor) -> Tensor:
        """Queries of the tokens at hand, normed and rotated."""
        return self.rotate(self.norm_q(x), None)

    def k(self, x: Tensor) -> Tensor:
        """Keys of the tokens at hand, normed and rotated."""
        return self.rotate(self.norm_k(x), None)


@dataclass(frozen=True)
class RouteInputs:
    """Differentiable inputs of the gated variants, explicit so that a recomputed function gets them as arguments."""

    logits: Tensor | None
    """Of the fusion or mixture: [B, S, L] gate logits (one route per token) or [B, S, G, L] (one per KV head), fp32,
    over the levels that are enabled; None where there is nothing to fuse."""
    beta: Tensor | None
    """Scalar or [1]: the blend of the fused levels against the plain tokens; None where there is nothing to fuse."""
    decay_k: Tensor | None
    """EMA decay of the keys in (0, 1), broadcastable to [G, d]; None for the prefix mean."""
    decay_v: Tensor | None
    """EMA decay of the values in (0, 1), broadcastable to [G, d]; None for the prefix mean."""
    core: Tensor | None = None
    """Block core: logits of its levels, shaped like `logits`; None with the dense core or a single level."""
