"""What an adapter hands to a variant besides q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Finish:
    """Norm and rotary embedding of queries and keys, applied after the levels are fused.

    Both map [B, S, heads, d] to the same shape; `k` is applied to every level's keys.
    """

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RouteInputs:
    """Differentiable inputs of the gated variants, explicit so that a recomputed function gets them as arguments."""

    logits: Tensor
    """[B, S, L] gate logits (one route per token) or [B, S, G, L] (one per KV head), fp32; levels L1, L2."""
    beta: Tensor
    """Scalar or [1]: the blend of the fused levels against the plain tokens."""
    decay_k: Tensor | None
    """EMA decay of the keys in (0, 1), broadcastable to [G, d]; None for the prefix mean."""
    decay_v: Tensor | None
    """EMA decay of the values in (0, 1), broadcastable to [G, d]; None for the prefix mean."""
