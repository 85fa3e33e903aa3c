"""FastMKA, Algorithm 2: fuse the levels by the route before one attention; the cache would hold fused K and V.

Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, L levels.

The paper fuses hidden states and then projects. The weights are scalars per token that sum to one, so fusion
commutes with the projection and its bias, and happens here on raw K and V, before norm and RoPE.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mka_megatron.attention.blockmka import block_core as attend_blocks
from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core
from mka_megatron.memory import routing
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.summary import ema, prefix_mean
from mka_megatron.memory.view import NO_MEMORY, Memory, View


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
    memory: Memory = NO_MEMORY,
) -> tuple[Any, ...]:
    """K' = K + beta * (sum_l lambda_l K_l - K), likewise V, then finish and one causal attention.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], raw.
        route: the gate's output; None when L1 is the only level, where fusion is the identity.
        config: reads attention.fuse and routing.mode.

    Returns:
        ([B, S, H, d], the weights for monitoring, detached, [B, S, L] or [B, S, G, L]; None without a route).
    """
    weights = None
    carries: tuple[Tensor | None, Tensor | None] = (None, None)
    if route is not None and route.logits is not None:
        weights = routing.route(route.logits, None, config.routing.mode)
        if "k" in config.attention.fuse:
            summary, carry = l2_summary(k, route.decay_k, documents, memory.view, "k")
            k, carries = fuse(k, weights, route.beta, summary), (carry, carries[1])
        if "v" in config.attention.fuse:
            summary, carry = l2_summary(v, route.decay_v, documents, memory.view, "v")
            v, carries = fuse(v, weights, route.beta, summary), (carries[0], carry)
        weights = weights.detach()
    if block_core(config):
        core = None if route is None else route.core
        out, _, update = attend_blocks(q, k, v, finish, core, documents, scale, config, memory, *carries)
        return out, weights, update
    return causal_attention(finish.q(q), finish.k(k), v, documents, scale, memory.view), weights


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


def l2_summary(
    x: Tensor, decay: Tensor | None, documents: Documents, view: View, name: str
) -> tuple[Tensor, Tensor | None]:
    """The session level of raw keys or values (`name`: "k" or "v"), [B, S, G, d] -> the same shape, and the EMA's
    state after the last slot; no decay: the prefix mean, without a state."""
    if decay is None:
        return prefix_mean(x, documents)[0], None
    return ema(x, decay, documents, view.carry(name, x, decay, documents))
