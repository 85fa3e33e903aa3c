"""FastMKA, Algorithm 2: fuse the levels by the route before one attention; the cache would hold fused K and V.

Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, L levels.

The paper fuses hidden states and then projects. The weights are scalars per token that sum to one, so fusion
commutes with the projection and its bias, and happens here on raw K and V, before norm and RoPE.
"""

from __future__ import annotations

from torch import Tensor

from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config
from mka_megatron.memory import routing
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.summary import ema, prefix_mean


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    finish: Finish,
    route: RouteInputs | None,
    documents: Documents,
    scale: float,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """K' = K + beta * (sum_l lambda_l K_l - K), likewise V, then finish and one causal attention.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], raw.
        route: the gate's output; None when L1 is the only level, where fusion is the identity.
        config: reads attention.fuse and routing.mode.

    Returns:
        ([B, S, H, d], the weights for monitoring, detached, [B, S, L] or [B, S, G, L]; None without a route).
    """
    weights = None
    if route is not None:
        weights = routing.route(route.logits, None, config.routing.mode)
        if "k" in config.attention.fuse:
            k = fuse(k, weights, route.beta, l2_summary(k, route.decay_k, documents))
        if "v" in config.attention.fuse:
            v = fuse(v, weights, route.beta, l2_summary(v, route.decay_v, documents))
        weights = weights.detach()
    return causal_attention(finish.q(q), finish.k(k), v, documents, scale), weights


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


def l2_summary(x: Tensor, decay: Tensor | None, documents: Documents) -> Tensor:
    """The session level of raw keys or values, [B, S, G, d] -> the same shape; no decay: the prefix mean."""
    return prefix_mean(x, documents)[0] if decay is None else ema(x, decay, documents)[0]
