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
from mka_megatron.ops.route_fuse.route import MODES
from mka_megatron.ops.scan import Rows

BACKENDS = {"reference": reference.route_fuse, "cuda": cuda.route_fuse}


@dataclass(frozen=True)
class Stream:
    """What is fused by the common route: the raw keys, or the raw values."""

    x: Tensor
    """[B, S, G, d], any strides."""
    decay: Tensor | None = None
    """L2: the EMA's decay in (0, 1), broadcastable to [G, d]; None: no EMA."""
    carry: Tensor | None = None
    """L2: [B, G, d] state of the EMA before slot 0, which the first document of every row continues; None: every row
    starts afresh."""
    long_term: Tensor | None = None
    """L3: [B, S, G, d], dtype of x; None: no L3."""
    summary: Tensor | None = None
    """L2 where it is no EMA but given: [B, S, G, d], dtype of x. The reference only."""


def route_fuse(
    streams: Sequence[Stream],
    logits: Tensor,
    beta: Tensor,
    rows: Rows,
    available: Tensor | None = None,
    *,
    mode: str = "soft",
    backend: str = "reference",
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
    """Fuse one or two streams by one route; differentiable once in every floating point tensor that goes in.

    The EMA is that of ops.scan.ema. Arithmetic and states are fp32, fp64 for fp64 x. Nothing of one document reaches
    another, be it NaN.

    Args:
        streams: one or two, alike in shape, dtype and levels.
        logits: [B, S, L], or [B, S, G, L] for a route per KV head; L is 2 or 3.
        beta: scalar or [1], the blend.
        rows: boundaries of the [B, S] slots.
        available: bool, the levels that hold something, L1 always: [B, S, L], beside a route per KV head [B, S, 1, L];
            None: all.
        mode: "soft", "fixed", "top1" or "top2", as in :func:`route.route`.
        backend: "reference" or "cuda", as ops.library.choose gives it.

    Returns:
        For every stream (fused [B, S, G, d], dtype of x; the EMA's state after the last slot [B, G, d] in fp32 or
        fp64, None without one); and the weights, of the shape of `logits`, detached. Raises ValueError when the
        inputs contradict each other, which is not looked for in a single slot without gradients: a token that is
        generated goes the way of its prompt.
    """
    if logits.shape[1] != 1 or torch.is_grad_enabled():
        _check(streams, logits, beta, rows, available, mode)
    return BACKENDS[backend](streams, logits, beta, rows, available, mode)


def _check(
    streams: Sequence[Stream], logits: Tensor, beta: Tensor, rows: Rows, available: Tensor | None, mode: str
) -> None:
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
        for name, level in (("long_term", each.long_term), ("summary", each.summary)):
            if level is not None and (level.shape, level.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"{name} is {level.dtype} of shape {list(level.shape)}, x {x.dtype} of shape {list(x.shape)}: make "
                    "them equal."
                )
        if each.decay is not None and each.summary is not None:
            raise ValueError("decay and summary are both given: L2 is one of the two.")
        if each.decay is not None and torch.broadcast_shapes(each.decay.shape, (groups, channels)) != (groups, channels):
            raise ValueError(f"decay has shape {list(each.decay.shape)}: make it broadcastable to [G, d].")
        if each.carry is not None and each.decay is None:
            raise ValueError("carry is given without a decay: only the EMA carries a state.")
        if each.carry is not None and each.carry.shape != (batch, groups, channels):
            raise ValueError(f"carry has shape {list(each.carry.shape)}: give [B, G, d].")
    if sum(levels) == 0:
        raise ValueError("neither L2 nor L3 is given: with one level there is nothing to fuse.")
    routes = {(batch, sequence, 1 + sum(levels)), (batch, sequence, groups, 1 + sum(levels))}
    if tuple(logits.shape) not in routes:
        raise ValueError(
            f"logits has shape {list(logits.shape)}: give [B, S, L] or [B, S, G, L] with L = {1 + sum(levels)}."
        )
    if beta.numel() != 1:
        raise ValueError(f"beta has shape {list(beta.shape)}: give a scalar or [1].")
    if rows.starts.shape != (batch, sequence):
        raise ValueError(f"rows are of {list(rows.starts.shape)} slots, x of {[batch, sequence]}: make them equal.")
    per_slot = (batch, sequence, *(1,) * (logits.dim() - 3), logits.shape[-1])
    if available is not None and (available.dtype, tuple(available.shape)) != (torch.bool, per_slot):
        raise ValueError(
            f"available is {available.dtype} of shape {list(available.shape)}: give bool {list(per_slot)}."
        )


def _levels(stream: Stream) -> tuple[bool, bool, bool]:
    return stream.decay is not None, stream.summary is not None, stream.long_term is not None
