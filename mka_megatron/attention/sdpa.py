"""torch's scaled_dot_product_attention for grouped heads, with queries that may be the end of longer keys.

Shapes: B batch, S queries, T >= S keys, H query heads, G KV heads, d channels of keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

_HOST_QUERIES = 512
"""The host's kernel takes a mask for queries at an offset: so many rows of it at a time."""


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, query s seeing the keys up to T - S + s; on CUDA never a mask tensor.

    Args:
        q: [B, S, H, d]. k, v: [B, T, G, d], G dividing H.

    Returns:
        [B, S, H, d].
    """
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # CUDA's fp32 kernel knows no groups; SDPA would fall back to S x T scores
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        grouped = False
    # [B, S, H, d] -> [B, H, S, d] and back
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    offset = k.shape[2] - q.shape[2]
    if q.shape[2] == 1:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    elif offset == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    elif q.is_cuda:
        mask = causal_lower_right(q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    else:
        outs = []
        for first in range(0, q.shape[2], _HOST_QUERIES):
            some = q[:, :, first : first + _HOST_QUERIES]
            end = offset + first + some.shape[2]
            seen = torch.ones(some.shape[2], end, dtype=torch.bool).tril(offset + first)
            outs.append(
                F.scaled_dot_product_attention(
                    some, k[:, :, :end], v[:, :, :end], attn_mask=seen, scale=scale, enable_gqa=grouped
                )
            )
        out = torch.cat(outs, dim=2)
    return out.transpose(1, 2)
