"""The few facts about attention variants that the checks need (attention/registry.py has the variants)."""

from __future__ import annotations

from mka_megatron.config.schema import Config, ModelConfig

GATED = frozenset({"mka", "fastmka", "blockmka"})
"""Variants with a gate over the memory levels: each rank must own whole KV heads."""

FUSING = frozenset({"fastmka"})
"""Variants whose route fuses keys and values before one attention."""

HAS_HF_WEIGHTS = frozenset({"mha", "mqa", "gqa", "mka", "fastmka", "blockmka"})
"""Variants on the grouped projections that Qwen and Llama checkpoints hold."""


ALWAYS_BLOCK = frozenset({"blockmka"})
"""Variants that have no other core."""


def effective_kv_heads(variant: str, model: ModelConfig) -> int:
    """KV heads that the layers have: mha and mla one per query head, mqa one, the others as configured."""
    return {"mha": model.num_attention_heads, "mla": model.num_attention_heads, "mqa": 1}.get(
        variant, model.num_kv_heads)


def block_core(config: Config) -> bool:
    """Attends to a window, chunk summaries and recalled chunks instead of to every token."""
    return config.attention.variant in ALWAYS_BLOCK or config.attention.core == "block"


def gated(config: Config) -> bool:
    """Routes queries over memory levels; the others are attention as the model has it."""
    return config.attention.variant in GATED


def recalls(config: Config) -> bool:
    """Offers recalled chunks (L3)."""
    return gated(config) and config.memory_hierarchy.l3.enabled


def fuses(config: Config) -> bool:
    """Mixes levels into one key and value per token before one attention."""
    memory = config.memory_hierarchy
    return config.attention.variant in FUSING and (memory.l2.enabled or (memory.l3.enabled and not block_core(config)))


def has_kernels(config: Config) -> bool:
    """Runs an op of which there are CUDA kernels: the fusion, or pooling and recall."""
    return fuses(config) or needs_chunks(config)


def needs_chunks(config: Config) -> bool:
    """Works on chunks, so that documents must start on their boundaries."""
    return block_core(config) or recalls(config)
