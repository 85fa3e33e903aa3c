"""The route: weights over the memory levels. Shapes: B batch, S sequence, G KV heads, L levels.

Ties go to the lower level. A level that is not available is masked out of the softmax, never fed zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("soft", "fixed", "top1", "top2")


def route(logits: Tensor, available: Tensor | None, mode: str) -> Tensor:
    """Weights lambda over the levels, Algorithm 1 and 2's gate after its MLP.

    Args:
        logits: [..., L] gate logits.
        available: bool, broadcastable to logits; None: every level. At least one level per route.
        mode: "soft": softmax. "fixed": uniform over the available levels, no gradient. "top1", "top2": all
            weight on the highest one or two (their softmax), with the gradient of the soft weights.

    Returns:
        [..., L] in fp32 (fp64 for fp64 logits), non-negative, summing to one.
        Raises ValueError for an unknown mode.
    """
    soft = masked(logits, available).softmax(dim=-1)
    if mode == "soft":
        return soft
    if mode == "fixed":
        return masked(torch.zeros_like(logits), available).softmax(dim=-1).detach()
    hard = masked(logits.detach(), selected(logits, available, mode)).softmax(dim=-1)
    # straight-through: the difference is exactly zero, its gradient is not
    return hard + (soft - soft.detach())


def masked(logits: Tensor, available: Tensor | None) -> Tensor:
    """`logits` in fp32 or wider, -inf where a level is not available."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if available is None else wide.masked_fill(~available, float("-inf"))


def selected(logits: Tensor, available: Tensor | None, mode: str) -> Tensor:
    """[..., L] bool: the highest available level (mode "top1") or two ("top2").

    Raises ValueError for another mode.
    """
    if mode not in ("top1", "top2"):
        raise ValueError(f"routing.mode is {mode!r}: use soft, fixed, top1 or top2.")
    order = masked(logits.detach(), available).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., : int(mode[-1])], True)
    return chosen if available is None else chosen & available
