"""A plain Hugging Face config.json for a model of ours: `from_hf` backwards."""

from __future__ import annotations

from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.from_hf import FAMILIES
from mka_megatron.config.hf_sections import BASE_TYPES
from mka_megatron.config.schema import ModelConfig, RopeConfig


def plain_config(model: ModelConfig, kv_heads: int, vocab_size: int) -> dict[str, Any]:
    """What transformers needs to build `model` with the plain attention.

    The rotary settings are in the form that transformers 4 wrote and 5 reads too.

    Args:
        kv_heads: that the attention variant has.
        vocab_size: rows of the embedding in the directory.

    Raises:
        ConfigError: no supported family has this bias and these norms.
    """
    wanted = {"qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm}
    fits = (name for name, implied in FAMILIES.items() if all(implied[key] == value for key, value in wanted.items()))
    family = next(fits, None)
    if family is None:
        raise ConfigError(f"model.qkv_bias is {show(model.qkv_bias)} with model.qk_norm {show(model.qk_norm)}: neither Qwen nor "
                          "Llama is such a model, so it has no Hugging Face form.")
    return {
        "architectures": [family],
        "model_type": BASE_TYPES[family],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
        "rope_theta": model.rope.theta,
        "rope_scaling": _rope(model.rope),
    }


def _rope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    settings: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        settings["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        settings |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        settings |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return settings
