"""The routes over the memory levels: as weights and as biases on scores. Shapes: B batch, S sequence, G KV heads, L levels.

Ties go to the lower level. A level that is not available is masked out of the softmax, never fed zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.config.schema import MemoryConfig
from mka_megatron.ops.route_fuse.route import masked, selected
from mka_megatron.ops.route_fuse.route import route as route


def levels(memory: MemoryConfig) -> int:
    """How many levels the gate routes over; with one there is nothing to route, hence no gate."""
    return 1 + int(memory.l2.enabled) + int(memory.l3.enabled)


def score_bias(logits: Tensor, available: Tensor | None, mode: str) -> Tensor:
    """The same routes as an additive bias on attention scores: lambda_l exp(s) = exp(s + log lambda_l).

    A bias common to all levels cancels in the one softmax over them, so raw logits serve (eq. 5).

    Args: as for :func:`route`; "top2" trains within the selected pair.

    Returns:
        [..., L] in fp32 (fp64 for fp64 logits), -inf where a level takes no part.
        Raises ValueError for "top1", whose gradient is zero, and for an unknown mode.
    """
    if mode == "soft":
        return masked(logits, available)
    if mode == "fixed":
        return masked(torch.zeros_like(logits), available).detach()
    if mode == "top1":
        raise ValueError(
            "routing.mode top1 has no gradient under attention.mixture score: use soft, fixed or top2."
        )
    return masked(logits, selected(logits, available, mode))


def route_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of [..., L] weights: 0 for a hard route, log L for a uniform one; shape [...]."""
    return -torch.xlogy(weights, weights).sum(dim=-1)
