"""Our config classes: the base family's, with the three sections of our configuration in the field `mka`."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.hf_sections import from_json, to_json
from mka_megatron.config.schema import Config, ModelConfig

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _mlp_only(plan: dict[str, Any]) -> dict[str, Any]:
    """A tensor-parallel plan in which every rank has the whole attention: a gate reads all heads."""
    return {name: how for name, how in plan.items() if ".self_attn." not in name}


class MKAQwen2Config(Qwen2Config):
    """Qwen2 and Qwen2.5. `mka`: {"attention", "routing", "memory_hierarchy", "base"}; None: the defaults."""

    model_type = "mka_qwen2"
    base_model_tp_plan = _mlp_only(Qwen2Config.base_model_tp_plan)
    mka: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        run_config(self)


class MKAQwen3Config(Qwen3Config):
    """Qwen3. `mka`: {"attention", "routing", "memory_hierarchy", "base"}; None: the defaults."""

    model_type = "mka_qwen3"
    base_model_tp_plan = _mlp_only(Qwen3Config.base_model_tp_plan)
    mka: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        run_config(self)


class MKALlamaConfig(LlamaConfig):
    """Llama 3. `mka`: {"attention", "routing", "memory_hierarchy", "base"}; None: the defaults."""

    model_type = "mka_llama"
    base_model_tp_plan = _mlp_only(LlamaConfig.base_model_tp_plan)
    mka: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        run_config(self)


def run_config(config: PreTrainedConfig) -> Config:
    """The typed sections and the shape that the attention reads.

    Raises:
        ConfigError: sections that are not usable, or a shape or setting that our attention does not compute.
    """
    raw = to_json(Config()) if config.mka is None else config.mka
    attention, routing, memory = from_json(raw)
    model = ModelConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        init_std=config.initializer_range,
    )
    _check(config, attention.variant, model)
    return Config(model=model, attention=attention, routing=routing, memory_hierarchy=memory)


def _check(config: PreTrainedConfig, variant: str, model: ModelConfig) -> None:
    if VARIANTS[variant].projection != "grouped":
        raise ConfigError(f"attention.variant is {variant}: {config.model_type} has grouped projections; use gqa, mka, "
                          "fastmka or blockmka.")
    if VARIANTS[variant].kv_heads(model) != model.num_kv_heads:
        raise ConfigError(f"attention.variant is {variant}: the model has {model.num_kv_heads} KV heads for "
                          f"{model.num_attention_heads} query heads; use gqa, mka, fastmka or blockmka.")
    if config.attention_dropout:
        raise ConfigError(f"attention_dropout is {show(config.attention_dropout)}: our attention has none; set it to 0.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError("use_sliding_window is true: the window of our attention is memory_hierarchy.l1.window; set "
                          "use_sliding_window to false.")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise ConfigError(f"rope_type is {show(rope)}: its angles depend on the length of the input; only "
                          f"{', '.join(_ROPE_TYPES)} are supported.")
