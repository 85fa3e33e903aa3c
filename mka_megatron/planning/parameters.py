"""The parameters of one rank's model, by name and size, as model/ builds them; needs no torch.

Letters: H query heads, G KV heads, d head channels, r gate width, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import effective_kv_heads


@dataclass(frozen=True)
class Parameter:
    """One parameter on one tensor-parallel rank."""

    name: str
    elements: int
    """Of this rank's shard."""
    split: bool
    """Shared out over the tensor-parallel ranks; False: every rank holds the whole."""
    decayed: bool
    """In AdamW's group with weight decay: two or more dimensions, and no bias, decay or blend."""


def rank_parameters(config: Config, vocab_size: int, tensor: int) -> tuple[Parameter, ...]:
    """What a rank of `tensor` tensor-parallel ranks holds, in the model's order; `vocab_size` without padding."""
    model = Config(model=config.model, attention=config.attention, routing=config.routing, memory_hierarchy=config.memory_hierarchy)
    return _of_model(model, vocab_size, tensor)


@lru_cache(maxsize=16)
def _of_model(config: Config, vocab_size: int, tensor: int) -> tuple[Parameter, ...]:
    """The same for one model under hundreds of layouts: asked for over and over."""
    return tuple(_parameters(config, vocab_size, tensor))


def padded_vocabulary(config: Config, vocab_size: int) -> int:
    """Rows of the embedding."""
    multiple = config.model.vocab_multiple
    return math.ceil(vocab_size / multiple) * multiple


def _parameters(config: Config, vocab_size: int, tensor: int) -> Iterator[Parameter]:
    model = config.model
    vocabulary = padded_vocabulary(config, vocab_size) // tensor * model.hidden_size
    yield Parameter("embedding.word_embeddings.weight", vocabulary, True, True)
    for layer in range(model.num_layers):
        yield from _layer(config, f"decoder.layers.{layer}.", tensor)
    yield Parameter("decoder.final_layernorm.weight", model.hidden_size, False, False)
    if not model.tie_embeddings:
        yield Parameter("output_layer.weight", vocabulary, True, True)


def _layer(config: Config, prefix: str, tensor: int) -> Iterator[Parameter]:
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    yield Parameter(f"{prefix}input_layernorm.weight", hidden, False, False)
    latent = VARIANTS[config.attention.variant].projection == "latent"
    yield from (_latent if latent else _grouped)(config, f"{prefix}self_attention.", tensor)
    yield Parameter(f"{prefix}pre_mlp_layernorm.weight", hidden, False, False)
    yield Parameter(f"{prefix}mlp.linear_fc1.weight", 2 * ffn * hidden, True, True)
    yield Parameter(f"{prefix}mlp.linear_fc2.weight", hidden * ffn, True, True)


def _grouped(config: Config, prefix: str, tensor: int) -> Iterator[Parameter]:
    model = config.model
    queries = model.num_attention_heads * model.head_dim // tensor
    groups = effective_kv_heads(config.attention.variant, model)
    projected = queries + 2 * groups * model.head_dim // tensor
    yield from _route(config, f"{prefix}core_attention.route.", tensor)
    yield Parameter(f"{prefix}linear_proj.weight", model.hidden_size * queries, True, True)
    yield Parameter(f"{prefix}linear_qkv.weight", projected * model.hidden_size, True, True)
    if model.qkv_bias:
        yield Parameter(f"{prefix}linear_qkv.bias", projected, True, False)
    if model.qk_norm:
        for name in ("q_layernorm", "k_layernorm"):
            yield Parameter(f"{prefix}{name}.weight", model.head_dim, False, False)


def _latent(config: Config, prefix: str, tensor: int) -> Iterator[Parameter]:
    model, mla = config.model, config.attention.mla
    hidden, heads = model.hidden_size, model.num_attention_heads // tensor
    query_input = hidden
    if mla.q_lora_rank is not None:
        yield Parameter(f"{prefix}q_down", mla.q_lora_rank * hidden, False, True)
        query_input = mla.q_lora_rank
    yield Parameter(f"{prefix}kv_down", (mla.kv_lora_rank + mla.qk_rope_head_dim) * hidden, False, True)
    if mla.q_lora_rank is not None:
        yield Parameter(f"{prefix}q_norm.weight", mla.q_lora_rank, False, False)
    yield Parameter(f"{prefix}linear_q.weight", heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim) * query_input, True, True)
    yield Parameter(f"{prefix}kv_norm.weight", mla.kv_lora_rank, False, False)
    up = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield Parameter(f"{prefix}linear_kv.weight", up * mla.kv_lora_rank, True, True)
    yield Parameter(f"{prefix}linear_proj.weight", hidden * heads * mla.v_head_dim, True, True)


def _route(config: Config, prefix: str, tensor: int) -> Iterator[Parameter]:
    """Gates, blend and decays."""
    variant, model, l2 = VARIANTS[config.attention.variant], config.model, config.memory_hierarchy.l2
    levels = variant.levels(config)
    if levels > 1:
        yield Parameter(f"{prefix}beta", 1, False, False)
        if l2.enabled and l2.summary == "ema" and l2.decay != "fixed":
            decays = model.num_kv_heads // tensor * (1 if l2.decay == "head" else model.head_dim)
            for name in ("decay_k", "decay_v"):
                yield Parameter(prefix + name, decays, True, False)
    for name, count in (("gate.", levels), ("core_gate.", variant.core_levels(config))):
        if count > 1:
            yield from _gate(config, prefix + name, count, tensor)


def _gate(config: Config, prefix: str, levels: int, tensor: int) -> Iterator[Parameter]:
    """The two layers of a gate: fc1 [r, channels], fc2 [L, r], per KV head under scope group."""
    model, routing, width = config.model, config.routing, config.routing.gate_hidden_size
    queries, groups = model.num_attention_heads * model.head_dim, model.num_kv_heads
    if routing.gate_input == "x":
        logits = levels * (groups if routing.scope == "group" else 1)
        sizes = ((width * model.hidden_size, False), (width, False), (logits * width, False), (logits, False))
    elif routing.scope == "group":
        heads = groups // tensor
        sizes = ((heads * width * (queries // groups), True), (heads * width, True), (heads * levels * width, True),
                 (heads * levels, True))
    else:
        sizes = ((width * queries // tensor, True), (width, False), (levels * width, False), (levels, False))
    for (elements, split), name in zip(sizes, ("fc1", "bias1", "fc2", "bias2"), strict=True):
        yield Parameter(prefix + name, elements, split, name.startswith("fc"))
