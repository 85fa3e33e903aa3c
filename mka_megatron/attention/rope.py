"""Rotary position embedding, applied. Shapes: B batch, S sequence, n heads, d head channels, r rotated channels."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin with rotate_half([a, b]) = [-b, a]: Hugging Face's convention, bit for bit.

    Args:
        x: [B, S, n, d] floating point. Channels beyond r pass unchanged.
        cos, sin: [B, S, r] with r even and at most d; taken to x's dtype first.

    Returns:
        [B, S, n, d], dtype of x. Raises ValueError for an odd r or one above d.
    """
    rotated = cos.shape[-1]
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(
            f"rotary tables have {rotated} channels, heads {x.shape[-1]}: give an even number, at most that."
        )
    if rotated < x.shape[-1]:
        turned, passed = x.tensor_split((rotated,), dim=-1)
        return torch.cat((apply_rope(turned, cos, sin), passed), dim=-1)
    low, high = x.chunk(2, dim=-1)
    sin_low, sin_high = sin.to(x.dtype).chunk(2, dim=-1)
    # the sign goes to the small table instead of x; [B, S, r] -> [B, S, 1, r]
    signed = torch.cat((-sin_low, sin_high), dim=-1)[:, :, None]
    return x * cos.to(x.dtype)[:, :, None] + torch.cat((high, low), dim=-1) * signed
