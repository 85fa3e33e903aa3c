"""The "mka" block of our config.json: what a Hugging Face config.json does not say of a model with memory levels.

config.json is the base model's own (Qwen2, Qwen3 or Llama) with another model_type and architectures, auto_map
(the remote code), and "mka": the sections attention, routing and memory_hierarchy of our Config, and what
the base file said instead. This module is its only writer and reader.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.schema import AttentionConfig, Config, MemoryConfig, RoutingConfig
from mka_megatron.config.typed import typed
from mka_megatron.config.validate import validate_attention

SECTIONS = ("attention", "routing", "memory_hierarchy")
PLACEMENT = (
    "attention.block_backend", "attention.kernels", "routing.beta_init", "memory_hierarchy.ssd_spill_path",
    "memory_hierarchy.l3.placement", "memory_hierarchy.l3.hbm_pool_gib", "memory_hierarchy.l3.dram_pool_gib",
    "memory_hierarchy.l3.ssd_pool_gib", "memory_hierarchy.l3.when_full",
)
"""Keys of the sections that every run sets for itself: only the start reads them, or they say where things lie."""
BASE_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
"""Architectures that we extend -> their model_type."""
OURS = {f"MKA{name}": name for name in BASE_TYPES}
"""Our architectures -> the ones they extend."""


def to_json(config: Config) -> dict[str, Any]:
    """The three sections as plain JSON values, keys of `PLACEMENT` at their defaults: a file names no machine."""
    sections: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    defaults = Config()
    for key in PLACEMENT:
        *parents, last = key.split(".")
        inner, default = sections, defaults
        for name in parents:
            inner, default = inner[name], getattr(default, name)
        inner[last] = getattr(default, last)
    return sections


def from_json(raw: dict[str, Any], origin: str = "config.json") -> tuple[AttentionConfig, RoutingConfig, MemoryConfig]:
    """The typed sections of the "mka" block `raw`, checked as a configuration file's are.

    A key that an older version did not write has its default.

    Raises:
        ConfigError: a section is missing, a key unknown, or a value impossible; the sentence names `origin`.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"mka is {show(raw)} in {origin}: it must be an object; convert the model again.")
    unknown = sorted(set(raw) - {*SECTIONS, "base"})
    if unknown:
        raise ConfigError(f"mka has the key {show(unknown[0])} in {origin}, which this version does not know; "
                          "update mka_megatron.")
    for name in SECTIONS:
        if not isinstance(raw.get(name), dict):
            raise ConfigError(f"mka.{name} is {show(raw.get(name))} in {origin}: it must be an object; convert the "
                              "model again.")
    config = typed({name: raw[name] for name in SECTIONS}, {(name,): origin for name in SECTIONS})
    try:
        validate_attention(config)
    except ConfigError as error:
        raise ConfigError(f"The mka block of {origin} is not usable: {error}") from None
    return config.attention, config.routing, config.memory_hierarchy


def add(base: dict[str, Any], config: Config) -> dict[str, Any]:
    """The config.json `base` of a supported model as ours, with `config`'s sections; `base` is left alone."""
    architecture = base["architectures"][0]
    return base | {
        "model_type": f"mka_{BASE_TYPES[architecture]}",
        "architectures": [f"MKA{architecture}"],
        "auto_map": {
            "AutoConfig": f"configuration_mka.MKA{architecture.removesuffix('ForCausalLM')}Config",
            "AutoModelForCausalLM": f"modeling_mka.MKA{architecture}",
        },
        "mka": to_json(config) | {"base": {key: base.get(key) for key in ("model_type", "architectures")}},
    }


def remove(raw: dict[str, Any]) -> dict[str, Any]:
    """Our config.json `raw` -> the base model's; `raw` is left alone."""
    kept = {key: value for key, value in raw.items() if key not in ("mka", "auto_map")}
    return kept | raw["mka"]["base"]
