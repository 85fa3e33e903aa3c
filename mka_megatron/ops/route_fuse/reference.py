"""The specification of route_fuse, and what runs without the kernels: PyTorch on any device, differentiable.

Shapes: B batch, S slots, G KV heads, d head channels, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mka_megatron.ops.route_fuse.route import route
from mka_megatron.ops.scan import Rows, ema

if TYPE_CHECKING:
    from mka_megatron.ops.route_fuse import Stream


def route_fuse(
    streams: Sequence[Stream], logits: Tensor, beta: Tensor, rows: Rows, available: Tensor | None, mode: str
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
    """As the contract says; checked inputs."""
    weights = route(logits, available, mode)
    fused = []
    for each in streams:
        levels, last = [each.summary, each.long_term], None
        if each.decay is not None:
            levels[0], last = ema(each.x, each.decay, rows, each.carry)
        fused.append((fuse(each.x, weights, beta, *(level for level in levels if level is not None)), last))
    return fused, weights.detach()


def fuse(tokens: Tensor, weights: Tensor, beta: Tensor, *summaries: Tensor) -> Tensor:
    """tokens + beta * (sum_l lambda_l level_l - tokens), level 1 being the tokens themselves.

    With weights that sum to one this is tokens + sum_{l>1} beta lambda_l (level_l - tokens): exactly the tokens
    for beta = 0.

    Args:
        tokens: [B, S, G, d]; summaries: levels 2..L, the same shape.
        weights: [B, S, L] or [B, S, G, L].
        beta: scalar or [1].

    Returns:
        [B, S, G, d], dtype of tokens; the arithmetic is in the wider of the dtypes.
    """
    # [B, S, L] -> [B, S, 1, L]
    shares = beta * (weights if weights.dim() == 4 else weights[:, :, None])
    wide = tokens.to(shares.dtype)
    fused = wide
    for level, summary in enumerate(summaries, start=1):
        fused = fused + shares[..., level, None] * (summary.to(shares.dtype) - wide)
    return fused.to(tokens.dtype)
