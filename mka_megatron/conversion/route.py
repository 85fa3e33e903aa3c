"""The tensors that an import adds: the learned route of each layer, at values that leave the model's function alone.

Suffixes: H query heads, G KV heads, d head channels, r gate width, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import recalls
from mka_megatron.memory import hashing
from mka_megatron.memory.summary import decay_logits


def route_tensors(config: Config, layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the Megatron and the Hugging Face model call `route.*` and `planes` of one layer, unsharded.

    The blend beta is routing.beta_init or 0, and the second layer of the core's gate is 0: the model computes what it did.

    Args:
        config: model, attention, routing and memory_hierarchy are read.
        layer: from 0.
        generator: of the gates' first weights.

    Returns:
        Full names -> fp32 tensors, and int8 planes [T, bits, d] where chunks are recalled by hash.
    """
    variant, model, l2, l3 = (VARIANTS[config.attention.variant], config.model, config.memory_hierarchy.l2,
                              config.memory_hierarchy.l3)
    levels, core_levels = variant.levels(config), variant.core_levels(config)
    tensors: dict[str, Tensor] = {}
    for name, count, last_std in (("gate", levels, model.init_std), ("core_gate", core_levels, 0.0)):
        if count > 1:
            tensors |= {f"route.{name}.{key}": value for key, value in _gate(config, count, last_std, generator).items()}
    if levels > 1:
        tensors["route.beta"] = torch.tensor([config.routing.beta_init or 0.0])
        if l2.enabled and l2.summary == "ema" and l2.decay != "fixed":
            for name in ("decay_k", "decay_v"):
                tensors[f"route.{name}"] = decay_logits(l2, model.num_kv_heads, model.head_dim)
    if recalls(config) and l3.selection == "hash":
        tensors["planes"] = hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, model.head_dim)
    return {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in tensors.items()}


def _gate(config: Config, levels: int, last_std: float, generator: torch.Generator) -> dict[str, Tensor]:
    model, routing = config.model, config.routing
    width, groups = routing.gate_hidden_size, model.num_kv_heads
    first: tuple[int, ...]
    last: tuple[int, ...]
    if routing.gate_input == "x":
        # every rank has the whole gate: [r, hidden], [L or G*L, r]
        first, last = (width, model.hidden_size), (groups * levels if routing.scope == "group" else levels, width)
    elif routing.scope == "group":
        # [G, r, H/G*d], [G, L, r]
        channels = model.num_attention_heads // groups * model.head_dim
        first, last = (groups, width, channels), (groups, levels, width)
    else:
        # [r, H*d], [L, r]
        first, last = (width, model.num_attention_heads * model.head_dim), (levels, width)
    return {
        "fc1": torch.randn(first, generator=generator) * model.init_std, "bias1": torch.zeros(first[:-1]),
        "fc2": torch.randn(last, generator=generator) * last_std, "bias2": torch.zeros(last[:-1]),
    }
