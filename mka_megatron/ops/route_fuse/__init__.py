"""FastMKA's fusion of one layer: y = x + beta * sum_{l>1} lambda_l (level_l - x), over raw keys and values at once.

Algorithm 2 of the paper, moved behind the projection: levels are the tokens x (L1), their exponential moving average
(L2) and given long-term vectors (L3); lambda is the softmax of the gate's logits over the levels that hold something.

Shapes: B batch, S slots, G KV heads, d head channels, L levels (in the order L1, L2, L3, without the absent ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.ops.route_fuse import cuda, reference
from mka_megatron.ops.route_fuse.slots import pack as pack

BACKENDS = {"reference": reference.route_fuse, "cuda": cuda.route_fuse}
MODES = ("soft", "fixed", "top1", "top2")


@dataclass(frozen=True)
class Stream:
    """What is fused by the common route: the raw keys, or the raw values."""

    x: Tensor
    """[B, S, G, d]."""
    decay: Tensor | None = None
    """L2: the EMA's decay in (0, 1), broadcastable to [G, d]; None: no L2."""
    carry: Tensor | None = None
    """L2: [B, G, d] state before slot 0; None: 0."""
    long_term: Tensor | None = None
    """L3: [B, S, G, d], dtype of x; None: no L3."""


def route_fuse(
    streams: Sequence[Stream],
    logits: Tensor,
    beta: Tensor,
    slots: Tensor,
    *,
    mode: str = "soft",
    backend: str = "reference",
) -> list[tuple[Tensor, Tensor | None]]:
    """Fuse one or two streams by one route; differentiable once in every floating point tensor that goes in.

    The state of L2 is s_t = a s_{t-1} + b x_t with (a, b) by the slot's kind: (decay, 1 - decay) for a STEP, (0, 1)
    for a FRESH one, (1, 0) for HOLD, whose x is not read into the state. Arithmetic and states are fp32, fp64 for
    fp64 x. Nothing of one document reaches another, be it NaN.

    Args:
        streams: one or two, alike in shape, dtype and levels.
        logits: [B, S, L], or [B, S, G, L] for a route per KV head; 2 <= L <= 3.
        beta: scalar or [1], the blend.
        slots: [B, S] uint8 from :func:`pack`: every slot's kind and available levels.
        mode: "soft", "fixed", "top1" or "top2", as memory.routing.route.
        backend: as :func:`choose` gives it.

    Returns:
        For every stream (fused [B, S, G, d], dtype of x; L2's state after the last slot [B, G, d] in fp32 or fp64,
        None without L2). Raises ValueError when the inputs contradict each other.
    """
    _check(streams, logits, beta, slots, mode)
    return BACKENDS[backend](streams, logits, beta, slots, mode)


def _check(streams: Sequence[Stream], logits: Tensor, beta: Tensor, slots: Tensor, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: use soft, fixed, top1 or top2.")
    if len(streams) not in (1, 2):
        raise ValueError(f"{len(streams)} streams were given: give keys, values or both.")
    x, levels = streams[0].x, _levels(streams[0])
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}: give [B, S, G, d].")
    batch, sequence, groups, channels = x.shape
    for each in streams:
        if each.x.shape != x.shape or each.x.dtype != x.dtype or _levels(each) != levels:
            raise ValueError("the two streams differ in shape, dtype or levels: make them alike.")
        if each.long_term is not None and (each.long_term.shape, each.long_term.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"long_term is {each.long_term.dtype} of shape {list(each.long_term.shape)}, x {x.dtype} of shape "
                f"{list(x.shape)}: make them equal."
            )
        if each.decay is not None and torch.broadcast_shapes(each.decay.shape, (groups, channels)) != (groups, channels):
            raise ValueError(f"decay has shape {list(each.decay.shape)}: make it broadcastable to [G, d].")
        if each.carry is not None and each.decay is None:
            raise ValueError("carry is given without a decay: only L2 carries a state.")
        if each.carry is not None and each.carry.shape != (batch, groups, channels):
            raise ValueError(f"carry has shape {list(each.carry.shape)}: give [B, G, d].")
    if sum(levels) == 0:
        raise ValueError("neither decay nor long_term is given: with one level there is nothing to fuse.")
    routes = {(batch, sequence, 1 + sum(levels)), (batch, sequence, groups, 1 + sum(levels))}
    if tuple(logits.shape) not in routes:
        raise ValueError(
            f"logits has shape {list(logits.shape)}: give [B, S, L] or [B, S, G, L] with L = {1 + sum(levels)}."
        )
    if beta.numel() != 1:
        raise ValueError(f"beta has shape {list(beta.shape)}: give a scalar or [1].")
    if slots.dtype != torch.uint8 or slots.shape != (batch, sequence):
        raise ValueError(f"slots is {slots.dtype} of shape {list(slots.shape)}: give uint8 [B, S] from pack.")


def _levels(stream: Stream) -> tuple[bool, bool]:
    return stream.decay is not None, stream.long_term is not None
