"""The attention layers that tools/bench_attention.py --layer measures: from the input of the QKV projection to the output of
the output projection, as training runs them, with RoPE and, where the variant has one, the gate.

Shapes: S tokens, h hidden size, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.attention.backends import Backends
from mka_megatron.attention.gate import token_logits
from mka_megatron.attention.mla import latent_attention
from mka_megatron.attention.registry import VARIANTS, Finish, RouteInputs
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import AttentionConfig, Config, L1Config, L3Config, MemoryConfig, ModelConfig
from mka_megatron.config.variants import recalls
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Memory
from tools.attention_cores import (
    MLA_WIDTHS,
    Core,
    Setting,
    Work,
    block_pairs,
    causal_pairs,
    mla_cost,
    own_cost,
    with_pinned,
)

ROPE_CHANNELS = 64
"""Rotary channels of a DeepSeek head, whose key all heads share."""
Q_RANK, KV_RANK = 1536 / 7168, 512 / 7168
"""DeepSeek-V3's latents, as shares of the hidden size."""


def grouped(setting: Setting, length: int, variant: str) -> Work:
    """One fused projection to the query heads and KV heads; `fastmka` over the block core, with fusion and both gates."""
    config = configuration(setting, variant)
    hidden, groups, width = setting.heads * setting.head_dim, setting.kv_heads, setting.head_dim
    fan = setting.heads // groups
    x, weights = setting.normal(1, length, hidden, seed=0), {}
    for seed, (name, shape) in enumerate(shapes(setting, variant).items(), start=1):
        weights[name] = setting.normal(*shape, seed=seed).detach().mul_(shape[-1] ** -0.5)
        weights[name].requires_grad_(not setting.forward_only)
    documents = Documents.unpacked(1, length).to(setting.device)
    memory, finish = remembering(setting, config, documents), rotary(setting, length, width)
    span = torch.rand(groups, width, generator=torch.Generator().manual_seed(0)).to(setting.device)
    decay = 1 - 2.0 ** -(1 + 6 * span)

    def forward() -> Tensor:
        # [1, S, h] -> [1, S, G, (H/G + 2) * d]
        mixed = F.linear(x, weights["qkv"], weights["qkv bias"]).unflatten(2, (groups, -1))
        q, k, v = mixed.split((fan * width, width, width), dim=3)
        q = q.reshape(1, length, setting.heads, width)
        route = None
        if "fc1" in weights:
            w = weights
            logits = token_logits(q, w["fc1"], w["bias1"], w["fc2"], w["bias2"])
            route = RouteInputs(None, None, None, None, logits)
            if "beta" in w:
                # two levels to fuse, then those of the core
                route = RouteInputs(logits[..., :2], w["beta"].float(), decay, decay, logits[..., 2:])
        out = VARIANTS[variant].attend(
            q, k, v, finish=finish, route=route, documents=documents, scale=width**-0.5, config=config, memory=memory
        )[0]
        return F.linear(out.flatten(2), weights["out"])

    return Work(forward, [x, *weights.values()], x.shape)


def latent(setting: Setting, length: int) -> Work:
    """DeepSeek's projections through latents, scaled to the hidden size."""
    hidden, heads = setting.heads * setting.head_dim, setting.mla_heads
    (wide, narrow), nope = MLA_WIDTHS, MLA_WIDTHS[0] - ROPE_CHANNELS
    q_rank, kv_rank = (max(8, round(share * hidden)) for share in (Q_RANK, KV_RANK))
    drawn = {
        "q down": (q_rank, hidden), "q up": (heads * wide, q_rank), "kv down": (kv_rank + ROPE_CHANNELS, hidden),
        "kv up": (heads * (nope + narrow), kv_rank), "out": (hidden, heads * narrow),
    }  # fmt: skip
    x, weights = setting.normal(1, length, hidden, seed=0), {}
    for seed, (name, shape) in enumerate(drawn.items(), start=1):
        weights[name] = setting.normal(*shape, seed=seed).detach().mul_(shape[-1] ** -0.5)
        weights[name].requires_grad_(not setting.forward_only)
    documents = Documents.unpacked(1, length)
    cos, sin = tables(setting, length, ROPE_CHANNELS)

    def forward() -> Tensor:
        compressed = F.rms_norm(F.linear(x, weights["q down"]), (q_rank,))
        q = F.linear(compressed, weights["q up"]).unflatten(2, (heads, -1))
        down, k_rope = F.linear(x, weights["kv down"]).split((kv_rank, ROPE_CHANNELS), dim=-1)
        kv = F.linear(F.rms_norm(down, (kv_rank,)), weights["kv up"]).unflatten(2, (heads, -1))
        out = latent_attention(q, kv, k_rope, cos, sin, documents, nope=nope, scale=wide**-0.5)
        return F.linear(out.flatten(2), weights["out"])

    return Work(forward, [x, *weights.values()], x.shape)


def configuration(setting: Setting, variant: str) -> Config:
    """The variant; the gated ones over the block core."""
    hidden, l3 = setting.heads * setting.head_dim, L3Config(hash_bits=setting.hash_bits)
    if setting.recalled:
        l3 = replace(l3, enabled=True, recalled_chunks=setting.recalled)
    return Config(
        model=ModelConfig(
            hidden_size=hidden, num_attention_heads=setting.heads, num_kv_heads=setting.kv_heads, head_dim=setting.head_dim
        ),
        attention=AttentionConfig(
            variant=variant, core="block" if variant == "fastmka" else "dense", block_backend=setting.backend
        ),
        memory_hierarchy=MemoryConfig(l1=L1Config(window=setting.window, chunk_size=setting.chunk), l3=l3),
    )  # fmt: skip


def shapes(setting: Setting, variant: str) -> dict[str, tuple[int, ...]]:
    """Of the weights, by name."""
    hidden = setting.heads * setting.head_dim
    mixed = hidden + 2 * setting.kv_heads * setting.head_dim
    found: dict[str, tuple[int, ...]] = {"qkv": (mixed, hidden), "qkv bias": (mixed,), "out": (hidden, hidden)}
    if variant != "gqa":
        levels = 2 + (setting.recalled > 0) + 2 * (variant == "fastmka")
        found |= {"fc1": (64, hidden), "bias1": (64,), "fc2": (levels, 64), "bias2": (levels,)}
    return found | {"beta": (1,)} if variant == "fastmka" else found


def remembering(setting: Setting, config: Config, documents: Documents) -> Memory:
    """The kernels and the lists of the variant."""
    chosen = Backends.choose(config, getattr(torch, setting.dtype), setting.device)
    chunks, selector, l3 = Chunks.of(documents, setting.chunk), None, config.memory_hierarchy.l3
    if recalls(config):
        planes = hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, setting.head_dim).to(setting.device)
        selector = hashing.Selector(l3.selection, l3.recalled_chunks, planes)
    return Memory(
        chunks=chunks, selector=selector, backend=chosen.block, fuse_backend=chosen.fuse, recall_backend=chosen.recall
    )


def rotary(setting: Setting, length: int, channels: int) -> Finish:
    """RoPE, without norms."""
    cos, sin = tables(setting, length, channels)

    def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return apply_rope(x, cos, sin)
        at: tuple[Any, Any] = torch.zeros_like(positions), positions
        return apply_rope(x, cos[at], sin[at])

    return Finish(lambda x: x, lambda x: x, rotate)


def tables(setting: Setting, length: int, channels: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, S, channels]."""
    rate = 1e6 ** -torch.arange(0, 1, 2 / channels, device=setting.device)
    angles = (torch.arange(length, device=setting.device)[:, None] * rate).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


LAYERS = {
    **with_pinned(
        Core(partial(grouped, variant="gqa"), causal_pairs, own_cost), Core(latent, causal_pairs, mla_cost)
    ),
    "blockmka": Core(partial(grouped, variant="blockmka"), block_pairs, own_cost),
    "fastmka": Core(partial(grouped, variant="fastmka"), block_pairs, own_cost),
}
