"""What a Hugging Face directory fixes of a configuration, read from its config.json (no transformers needed).

A plain Qwen2, Qwen3 or Llama directory fixes the model section; one of ours (model_type mka_*) the sections of
`hf_sections` too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.hf_sections import OURS, from_json
from mka_megatron.config.schema import AttentionConfig, MemoryConfig, ModelConfig, RopeConfig, RoutingConfig

# What the architecture implies and config.json does not say: QKV bias, q/k-norm, head_dim default.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False, "head_dim": None},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True, "head_dim": 128},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False, "head_dim": None},
}
DEFAULT_THETA = 10000.0  # transformers' own default where config.json names none
# Settings we do not compute: allowed only at the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,), "attention_dropout": (0.0,), "pretraining_tp": (1,),
}
ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,), "truncate": (True,),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
             "high_freq_factor", "beta_fast", "beta_slow", *ROPE_NEUTRAL}
SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read_model(directory: str) -> dict[str, Any]:
    """The ModelConfig fields that `<directory>/config.json` fixes, ready for `dataclasses.replace`.

    Reads the `rope_theta`/`rope_scaling` form of transformers 4 and the `rope_parameters` form of 5.
    Raises ConfigError for a missing or damaged file, an architecture or setting that is not supported, or a
    value of the wrong type.
    """
    raw, path = read_config_json(directory)
    reader = _Reader(raw, path)
    family = _family(raw, path)
    for key, allowed in NEUTRAL.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ConfigError(f"{key} is {show(raw[key])} in {path}: only {show(allowed[0])} is supported; "
                              "choose another model.init_from.")
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    head_dim = reader.integer("head_dim", FAMILIES[family]["head_dim"] or max(1, hidden // heads))
    positions = reader.integer("max_position_embeddings")
    return {
        "num_layers": reader.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": reader.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "vocab_size": reader.integer("vocab_size"),
        "max_position_embeddings": positions,
        "norm_eps": reader.number("rms_norm_eps", 1e-6),
        "qkv_bias": FAMILIES[family]["qkv_bias"],
        "qk_norm": FAMILIES[family]["qk_norm"],
        "tie_embeddings": reader.boolean("tie_word_embeddings", False),
        "rope": _rope(raw, path, positions),
    }


def at_positions(model: ModelConfig, run: ModelConfig, explicit: dict[str, Any]) -> ModelConfig:
    """`model` of a directory with the positions that the run's `explicit` keys set: no weight depends on them.

    They are max_position_embeddings and all of rope but its theta; a longer context is trained so.
    """
    rope = explicit.get("rope", {})
    wanted = {name: getattr(run.rope, name) for name in rope if name != "theta"}
    changes: dict[str, Any] = {"rope": dataclasses.replace(model.rope, **wanted)}
    if "max_position_embeddings" in explicit:
        changes["max_position_embeddings"] = run.max_position_embeddings
    return dataclasses.replace(model, **changes)


def read_sections(directory: str) -> tuple[AttentionConfig, RoutingConfig, MemoryConfig] | None:
    """The sections that one of our directories fixes beside the model; None for a plain one. Raises ConfigError."""
    raw, path = read_config_json(directory)
    ours = _architecture(raw) in OURS
    if ours != ("mka" in raw):
        raise ConfigError(f"architectures is {show(raw.get('architectures'))} in {path}, {'without' if ours else 'with'} "
                          'the block "mka": convert the model again.')
    return from_json(raw["mka"], str(path)) if ours else None


def read_config_json(directory: str) -> tuple[dict[str, Any], Path]:
    """The object in `<directory>/config.json`, and that path. Raises ConfigError."""
    path = Path(directory) / "config.json"
    try:
        if not path.is_file():
            raise ConfigError(f"model.init_from is {show(directory)}: there is no config.json in it; give the "
                              "directory of a Hugging Face model.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.init_from is {show(directory)}: its config.json cannot be read as JSON; "
                          "copy the model again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"model.init_from is {show(directory)}: its config.json is not a JSON object; "
                          "copy the model again.")
    return raw, path


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""


def _family(raw: dict[str, Any], path: Path) -> str:
    """The plain architecture that the model is or extends."""
    name = _architecture(raw)
    if OURS.get(name, name) not in FAMILIES:
        raise ConfigError(f"architectures is {show(raw.get('architectures'))} in {path}: only one of "
                          f"{', '.join(FAMILIES)}, plain or converted by tools/convert_hf.py, is supported; choose "
                          "another model.init_from.")
    return OURS.get(name, name)


class _Reader:
    """Typed access to one JSON object; a None default means the key is required."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def _get(self, key: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(f"{key} is {show(value)} in {self.path}: it must be {what}; copy the model again.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default, (int,), "a positive integer")
        if value < 1:
            raise ConfigError(f"{key} is {value} in {self.path}: it must be a positive integer; copy the model again.")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._get(key, default, (int, float), "a number"))

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return bool(self._get(key, default, (bool,), "true or false"))


def _rope(raw: dict[str, Any], path: Path, positions: int) -> RopeConfig:
    """Both generations of the rotary settings as one RopeConfig."""
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"rope settings are {show(settings)} in {path}: they must be an object; copy the model again.")
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, value in settings.items():
        if key not in ROPE_KEYS or (key in ROPE_NEUTRAL and value not in ROPE_NEUTRAL[key]):
            raise ConfigError(f"the rope setting {key} is {show(value)} in {path}: it is not supported; choose "
                              "another model.init_from.")
    name = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(name, str) or name not in SCALINGS:
        raise ConfigError(f"rope_type is {show(name)} in {path}: only {', '.join(SCALINGS)} are supported; choose "
                          "another model.init_from.")
    theta = _Reader(settings, path).number("rope_theta", _Reader(raw, path).number("rope_theta", DEFAULT_THETA))
    if name == "default":
        return RopeConfig(theta=theta)
    reader = _Reader(settings, path)
    defaults = RopeConfig()
    original = reader.integer("original_max_position_embeddings", positions)
    factor = reader.number("factor", positions / original if name == "yarn" else None)
    if name == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    if name == "llama3":
        return RopeConfig(theta=theta, scaling="llama3", factor=factor, original_max_position=original,
                          low_freq_factor=reader.number("low_freq_factor"),
                          high_freq_factor=reader.number("high_freq_factor"))
    return RopeConfig(theta=theta, scaling="yarn", factor=factor, original_max_position=original,
                      beta_fast=reader.number("beta_fast", defaults.beta_fast),
                      beta_slow=reader.number("beta_slow", defaults.beta_slow))
