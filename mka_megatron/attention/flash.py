"""Causal flash attention that also returns its logsumexp, and its backward for a given one.

torch's public SDPA keeps the logsumexp to itself, so these are its own kernels by name; the choice between
them is this file. Shapes: B batch, S sequence, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED_LSE = 32
_QUERIES = 512
"""Queries at an offset take a mask on some kernels: so many rows of it at a time."""


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """softmax(scale * q k^T) v with lower-triangular scores, query s seeing the keys up to T - S + s.

    Args:
        q: [B, S, H, d]; k, v: [B, T, G, d], dtypes equal; CPU, or CUDA in fp32 or (d a multiple of 8) 16 bits.

    Returns:
        ([B, S, H, d], logsumexp [B, H, S] fp32 (fp64 for fp64), what :func:`causal_backward` wants as `extra` where
        T = S).
    """
    if k.shape[1] != q.shape[1] and (not q.is_cuda or q.dtype == torch.float32):
        return _masked_forward(q, k, v, scale)
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q, k, v), 0.0, True, scale=scale
        )
        return out.transpose(1, 2), lse, ()
    if q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        out, lse, *extra = torch.ops.aten._scaled_dot_product_efficient_attention(
            *_heads_first(q, k, v), None, True, 0.0, True, scale=scale
        )
        return out.transpose(1, 2), lse[..., : q.shape[1]], tuple(extra)
    out, lse, *extra = torch.ops.aten._scaled_dot_product_flash_attention(
        *_heads_first(q, k, v), 0.0, True, scale=scale
    )
    return out.transpose(1, 2), lse, tuple(extra[:6])


def _masked_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    offset = k.shape[1] - q.shape[1]
    outs, sums = [], []
    for first in range(0, q.shape[1], _QUERIES):
        some = q[:, first : first + _QUERIES]
        end = offset + first + some.shape[1]
        mask = None
        if some.shape[1] > 1:
            future = torch.ones(some.shape[1], end, dtype=torch.bool, device=q.device).triu(offset + first + 1)
            mask = torch.zeros(future.shape, dtype=q.dtype, device=q.device).masked_fill_(future, float("-inf"))
        if q.is_cuda:
            fan = q.shape[2] // k.shape[2]
            keys, values = (x[:, :end].repeat_interleave(fan, dim=2) for x in (k, v))
            if mask is not None:
                # the kernel wants rows of an aligned length
                aligned = F.pad(mask, (0, -end % 16))
                mask = aligned[:, :end].expand(len(q), q.shape[2], -1, -1)
            out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
                *_heads_first(some, keys, values), mask, True, 0.0, False, scale=scale
            )
        else:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(some, k[:, :end], v[:, :end]), 0.0, False, attn_mask=mask, scale=scale
            )
        outs.append(out.transpose(1, 2))
        sums.append(lse[..., : some.shape[1]])
    return torch.cat(outs, dim=1), torch.cat(sums, dim=2), ()


def causal_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: tuple[Any, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped like them, with probabilities exp(scores - lse) and row terms grad . out.

    So with the `out` and `lse` of a softmax over more keys than these it gives these keys' part of that
    softmax's gradient.

    Args:
        grad, out: [B, S, H, d]; lse: [B, H, S]; extra: from :func:`causal_forward` over these q, k, v.
    """
    if not q.is_cuda:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(grad, q, k, v, out), lse, 0.0, True, scale=scale
        )
        return _heads_last(*grads)
    if q.dtype == torch.float32:
        groups = k.shape[2]
        k, v = (x.repeat_interleave(q.shape[2] // groups, dim=2) for x in (k, v))
        lse = F.pad(lse, (0, -lse.shape[-1] % _ALIGNED_LSE), value=float("inf"))
        q_, k_, v_, out_ = _heads_first(q, k, v, out)
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad.transpose(1, 2),
            q_,
            k_,
            v_,
            None,
            out_,
            lse,
            *extra,
            0.0,
            [True, True, True, False],
            True,
            scale=scale,
        )
        grad_q, grad_k, grad_v = _heads_last(*grads[:3])
        # [B, S, H, d] -> [B, S, G, H/G, d]
        grad_k, grad_v = (x.unflatten(2, (groups, -1)).sum(dim=3) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_heads_first(grad, q, k, v, out), lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset,
        scale=scale,
    )  # fmt: skip
    return _heads_last(*grads)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    # [B, S, H, d] -> [B, H, S, d]
    return tuple(x.transpose(1, 2) for x in tensors)


def _heads_last(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)
