"""Rotary position embedding, applied. Shapes: B batch, S sequence, n heads, d head channels, r rotated channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin with rotate_half([a, b]) = [-b, a]: Hugging Face's convention, bit for bit.

    Args:
        x: [B, S, n, d] floating point. Channels beyond r pass unchanged.
        cos, sin: [B, S, r] with r even and at most d, taken to x's dtype first; they get no gradient.

    Returns:
        [B, S, n, d], dtype of x. Raises ValueError for an odd r or one above d.
    """
    rotated = cos.shape[-1]
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(
            f"rotary tables have {rotated} channels, heads {x.shape[-1]}: give an even number, at most that."
        )
    # [B, S, r] -> [B, S, 1, r]
    return _Rotate.apply(x, cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        # the transpose of the rotation
        return _rotate(grad, cos, torch.cat((-second, -first), dim=-1)), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, passed = x.tensor_split((cos.shape[-1],), dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_turned, out_passed = out.tensor_split((cos.shape[-1],), dim=-1)
    out_passed.copy_(passed)
    torch.mul(turned, cos, out=out_turned)
    low, high = turned.chunk(2, dim=-1)
    out_low, out_high = out_turned.chunk(2, dim=-1)
    sin_low, sin_high = sin.chunk(2, dim=-1)
    # a separate product, then the sum: a fused multiply-add would round otherwise than Hugging Face's
    out_low.sub_(high * sin_low)
    out_high.add_(low * sin_high)
    return out
