"""Routing weights over the memory levels. Shapes: B batch, S sequence, G KV heads, L levels.

Ties go to the lower level. A level that is not available is masked out of the softmax, never fed zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.config.schema import MemoryConfig


def levels(memory: MemoryConfig) -> int:
    """How many levels the gate routes over; with one there is nothing to route, hence no gate."""
    return 1 + int(memory.l2.enabled) + int(memory.l3.enabled)


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
    soft = _masked(logits, available).softmax(dim=-1)
    if mode == "soft":
        return soft
    if mode == "fixed":
        return _masked(torch.zeros_like(logits), available).softmax(dim=-1).detach()
    hard = _masked(logits.detach(), _selected(logits, available, _picks(mode))).softmax(dim=-1)
    # straight-through: the difference is exactly zero, its gradient is not
    return hard + (soft - soft.detach())


def score_bias(logits: Tensor, available: Tensor | None, mode: str) -> Tensor:
    """The same routes as an additive bias on attention scores: lambda_l exp(s) = exp(s + log lambda_l).

    A bias common to all levels cancels in the one softmax over them, so raw logits serve (eq. 5).

    Args: as for :func:`route`; "top2" trains within the selected pair.

    Returns:
        [..., L] in fp32 (fp64 for fp64 logits), -inf where a level takes no part.
        Raises ValueError for "top1", whose gradient is zero, and for an unknown mode.
    """
    if mode == "soft":
        return _masked(logits, available)
    if mode == "fixed":
        return _masked(torch.zeros_like(logits), available).detach()
    if mode == "top1":
        raise ValueError(
            "routing.mode top1 has no gradient under attention.mixture score: use soft, fixed or top2."
        )
    return _masked(logits, _selected(logits, available, _picks(mode)))


def route_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of [..., L] weights: 0 for a hard route, log L for a uniform one; shape [...]."""
    return -torch.xlogy(weights, weights).sum(dim=-1)


def _masked(logits: Tensor, available: Tensor | None) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if available is None else wide.masked_fill(~available, float("-inf"))


def _picks(mode: str) -> int:
    if mode not in ("top1", "top2"):
        raise ValueError(f"routing.mode is {mode!r}: use soft, fixed, top1 or top2.")
    return int(mode[-1])


def _selected(logits: Tensor, available: Tensor | None, count: int) -> Tensor:
    order = _masked(logits.detach(), available).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :count], True)
    return chosen if available is None else chosen & available
