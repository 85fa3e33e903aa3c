"""Multi-head latent attention, DeepSeek-V2 section 2.1: the part after the projections.

Shapes: B batch, S sequence, H heads, n key channels without position, r rotary channels, e value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.rope import apply_rope
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import NO_MEMORY, View


def latent_attention(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents: Documents,
    *,
    nope: int,
    scale: float,
    view: View = NO_MEMORY.view,
) -> Tensor:
    """Causal attention with decoupled rotary channels, whose key all heads share (eq. 14-18 there).

    Args:
        q: [B, S, H, n + r], the rotary channels last and not yet rotated.
        kv: [B, S, H, n + e], the up-projected latent: keys without position, then values.
        k_rope: [B, S, r], the shared rotary key, not yet rotated.
        cos, sin: [B, S, r] fp32.
        nope: n.
        scale: factor on the scores, 1/sqrt(n + r) in the paper.
        view: of the slots before those at hand, on other ranks.

    Returns:
        [B, S, H, e], dtype of q.
    """
    q_nope, q_rope = q.tensor_split((nope,), dim=-1)
    k_nope, v = kv.tensor_split((nope,), dim=-1)
    # [B, S, r] -> [B, S, H, r]
    shared = apply_rope(k_rope[:, :, None], cos, sin).expand(-1, -1, q.shape[2], -1)
    queries = torch.cat((q_nope, apply_rope(q_rope, cos, sin)), dim=-1)
    keys = torch.cat((k_nope, shared), dim=-1)
    return causal_attention(queries, keys, v, documents, scale, view)


def absorbed_attention(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents: Documents,
    *,
    nope: int,
    scale: float,
    view: View = NO_MEMORY.view,
) -> Tensor:
    """The same out of the latents themselves: all that a cache has to keep, one key for all heads.

    The up-projections go to the other side of the two products: q . (U_k c) = (U_k^T q) . c and
    sum_t p_t U_v c_t = U_v sum_t p_t c_t (section 2.1.2 there).

    Args:
        latent: [B, S, c], what `up` [H (n + e), c] projects to the `kv` of :func:`latent_attention`.
        The others as there.

    Returns:
        [B, S, H, e], dtype of q.
    """
    # [H (n + e), c] -> [H, n, c], [H, e, c]
    up_k, up_v = up.unflatten(0, (q.shape[2], -1)).tensor_split((nope,), dim=1)
    q_nope, q_rope = q.tensor_split((nope,), dim=-1)
    queries = torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, up_k), apply_rope(q_rope, cos, sin)), dim=-1)
    # [B, S, c], [B, S, r] -> [B, S, 1, c + r]
    keys = torch.cat((latent[:, :, None], apply_rope(k_rope[:, :, None], cos, sin)), dim=-1)
    # the keys are the values, of which the latent channels count
    mixed = causal_attention(queries, keys, keys, documents, scale, view)[..., : latent.shape[2]]
    return torch.einsum("bshc,hec->bshe", mixed, up_v)
