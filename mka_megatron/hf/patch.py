"""A loaded transformers model, turned into ours where it stands."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.hf_sections import add
from mka_megatron.config.schema import Config
from mka_megatron.hf.attention import MKAAttention
from mka_megatron.hf.configuration import MKALlamaConfig, MKAQwen2Config, MKAQwen3Config, run_config
from mka_megatron.hf.modeling import OURS, adopt, replace_attention
from mka_megatron.hf.route import Gate

_CONFIGS = {"qwen2": MKAQwen2Config, "qwen3": MKAQwen3Config, "llama": MKALlamaConfig}


def patch_model(model: PreTrainedModel, config: Config, seed: int = 0) -> PreTrainedModel:
    """Give a Qwen2, Qwen3 or Llama language model the attention that `config` describes.

    The model is changed in place: its class, its config and every layer's self_attn; nothing outside it is. It starts
    function-preserving (beta is 0, the core gate's last layer too), so that its outputs are those it had where the
    variant has an exact mode; `save_pretrained` then writes our format.

    Args:
        model: on any device, in any dtype.
        config: its attention, routing and memory_hierarchy are read; the shape is the model's own.
        seed: of the gates' first values.

    Returns:
        `model`.

    Raises:
        ConfigError: another architecture, or one whose settings our attention does not compute.
    """
    if type(model) not in OURS or model.config.model_type not in _CONFIGS:
        raise ConfigError(f"the model is a {type(model).__name__}: patch_model takes Qwen2ForCausalLM, Qwen3ForCausalLM "
                          "or LlamaForCausalLM.")
    new = _config(model, config)
    run_config(new)  # refuses before anything changes
    old = model.config
    base: Any = model.base_model
    holders: list[Any] = [module for module in model.modules() if getattr(module, "config", None) is old]
    for module in holders:
        module.config = new
    for part in (model, base):
        adopt(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        replace_attention(base)
        for layer in base.layers:
            _fill(layer.self_attn, new.initializer_range)
    return model


def _config(model: PreTrainedModel, config: Config) -> PreTrainedConfig:
    """Ours, with the settings of the model's own."""
    kept = model.config
    block = add({"model_type": kept.model_type, "architectures": [type(model).__name__]}, config)
    new = copy.deepcopy(kept)
    new.__class__ = _CONFIGS[kept.model_type]
    new.mka, new.architectures = block["mka"], block["architectures"]
    return new


def _fill(attention: MKAAttention, std: float) -> None:
    """First values on the host, then where the projections are."""
    weight = attention.get_parameter("q_proj.weight")
    if attention.route is not None:
        for module in attention.route.modules():
            if isinstance(module, Gate):
                module.initialize(std)
        attention.route.initialize()
        attention.route.to(weight.device, weight.dtype)
        attention.route.train(attention.training)
    if attention.planes is not None:
        attention.planes = attention.planes.to(weight.device)
