"""FastMKA, Algorithm 2: fuse the levels by the route before one attention; the cache would hold fused K and V.

Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, L levels.

The paper fuses hidden states and then projects. The weights are scalars per token that sum to one, so fusion
commutes with the projection and its bias, and happens here on raw K and V, before norm and RoPE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from mka_megatron.attention.blockmka import block_core as attend_blocks
from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.long_term import available, l3_level, mixes_l3
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.summary import ema, prefix_mean
from mka_megatron.memory.view import NO_MEMORY, Carry, Memory, Update, View
from mka_megatron.ops.route_fuse import Stream, route_fuse


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
        config: reads attention.fuse, routing.mode and which levels are enabled.
        memory: with L3, chunks of the rows and the selector; the view of the slots before.

    Returns:
        ([B, S, H, d], the weights for monitoring, detached, [B, S, L] or [B, S, G, L]; None without a route, the
        memory's update).
    """
    weights = None
    carry_k: Carry | None = None
    carry_v: Carry | None = None
    update = Update(None, None, None, None, None, None)
    if route is not None and route.logits is not None:
        assert route.beta is not None
        k3 = v3 = None
        if mixes_l3(config):
            k3, v3, update = l3_level(q, k, v, finish, documents, scale, memory)
        fuses, streams, means = config.attention.fuse, [], []
        for name, x, long_term, decay in (("k", k, k3, route.decay_k), ("v", v, v3, route.decay_v)):
            if name in fuses:
                stream, mean = _stream(x, long_term, decay, documents, config, memory.view, name)
                streams.append(stream)
                means.append(mean)
        fused, weights = route_fuse(
            streams, route.logits, route.beta, documents, available(route.logits, config, memory),
            mode=config.routing.mode, backend=memory.fuse_backend,
        )  # fmt: skip
        carries = [mean if last is None else last.detach() for (_, last), mean in zip(fused, means, strict=True)]
        if "k" in fuses:
            k, carry_k = fused[0][0], carries[0]
        if "v" in fuses:
            v, carry_v = fused[-1][0], carries[-1]
    if block_core(config):
        core = None if route is None else route.core
        out, _, update = attend_blocks(q, k, v, finish, core, documents, scale, config, memory, carry_k, carry_v)
        return out, weights, update
    out = causal_attention(finish.q(q), finish.k(k), v, documents, scale, memory.view)
    return out, weights, replace(update, carry_k=carry_k, carry_v=carry_v)


def _stream(
    x: Tensor, long_term: Tensor | None, decay: Tensor | None, documents: Documents, config: Config, view: View, name: str
) -> tuple[Stream, Carry | None]:
    """What is fused of raw keys or values [B, S, G, d] (`name`: "k" or "v"), given L3's; and the prefix mean's state
    after the last slot, detached, None where L2 is not one."""
    if not config.memory_hierarchy.l2.enabled:
        return Stream(x, long_term=long_term), None
    if decay is None:
        mean, state = l2_summary(x, None, documents, view, name)
        return Stream(x, long_term=long_term, summary=mean), state
    carry = view.carry(name, x, decay, documents)
    assert not isinstance(carry, tuple)
    return Stream(x, decay, carry, long_term), None


def summaries(
    x: Tensor, long_term: Tensor | None, decay: Tensor | None, documents: Documents, config: Config, view: View, name: str
) -> tuple[list[Tensor], Carry | None]:
    """Levels 2..L, as far as they are enabled, of raw keys or values [B, S, G, d] (`name`: "k" or "v"), each of the
    same shape, given L3's; and the state of L2 after the last slot, detached."""
    levels, carry = [], None
    if config.memory_hierarchy.l2.enabled:
        level, carry = l2_summary(x, decay, documents, view, name)
        levels.append(level)
    return levels if long_term is None else [*levels, long_term], carry


def l2_summary(
    x: Tensor, decay: Tensor | None, documents: Documents, view: View, name: str
) -> tuple[Tensor, Carry]:
    """The session level of raw keys or values (`name`: "k" or "v"), [B, S, G, d] -> the same shape, and its state
    after the last slot, detached; no decay: the prefix mean."""
    before = view.carry(name, x, decay, documents)
    if decay is None:
        assert before is None or isinstance(before, tuple)
        level, (total, count) = prefix_mean(x, documents, before)
        return level, (total.detach(), count)
    assert not isinstance(before, tuple)
    level, state = ema(x, decay, documents, before)
    return level, state.detach()
