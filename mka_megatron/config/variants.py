"""The few facts about attention variants that the checks need (attention/registry.py has the variants)."""

from __future__ import annotations

from mka_megatron.config.schema import ModelConfig

GATED = frozenset({"mka", "fastmka"})
"""Variants with a gate over the memory levels: each rank must own whole KV heads."""

HAS_HF_WEIGHTS = frozenset({"mha", "mqa", "gqa", "mka", "fastmka"})
"""Variants on the grouped projections that Qwen and Llama checkpoints hold."""


def effective_kv_heads(variant: str, model: ModelConfig) -> int:
    """KV heads that the layers have: mha and mla one per query head, mqa one, the others as configured."""
    return {"mha": model.num_attention_heads, "mla": model.num_attention_heads, "mqa": 1}.get(
        variant, model.num_kv_heads)
