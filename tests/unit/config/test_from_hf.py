"""`model.init_from`: the model section of Hugging Face directories, against transformers' own reading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from mka_megatron.config.load import ConfigError, load_config
from mka_megatron.config.schema import ModelConfig

SMALL = {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 24.0}

CASES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SMALL, rope_theta=1e6, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SMALL, rope_theta=5e5, tie_word_embeddings=False),
    "qwen2-head-dim": Qwen2Config(**SMALL, head_dim=32),
    "qwen2-yarn": Qwen2Config(**SMALL, rope_theta=1e6, rope_scaling=dict(YARN)),
    "qwen3": Qwen3Config(**SMALL, head_dim=32, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3-default-head-dim": Qwen3Config(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "llama-mha": LlamaConfig(**{**SMALL, "num_key_value_heads": None}),
    "llama3": LlamaConfig(**SMALL, rope_theta=5e5, rope_scaling=dict(LLAMA3)),
    "llama-linear": LlamaConfig(**SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}),
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def save(config: PreTrainedConfig, directory: Path) -> dict[str, Any]:
    """Save as transformers does; returns the JSON on disk."""
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def as_version_4(raw: dict[str, Any]) -> dict[str, Any]:
    """The same settings as transformers 4 wrote them."""
    raw = dict(raw)
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


def check(model: ModelConfig, directory: Path) -> None:
    """`model` says what transformers reads from the same file."""
    hf = AutoConfig.from_pretrained(directory)
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (
        hf.num_hidden_layers, hf.hidden_size, hf.intermediate_size)
    assert (model.num_attention_heads, model.num_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert model.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    assert (model.vocab_size, model.max_position_embeddings) == (hf.vocab_size, hf.max_position_embeddings)
    assert (model.norm_eps, model.tie_embeddings) == (hf.rms_norm_eps, hf.tie_word_embeddings)
    assert (model.qkv_bias, model.qk_norm) == (hf.model_type == "qwen2", hf.model_type == "qwen3")
    rope = hf.rope_parameters
    assert model.rope.theta == rope["rope_theta"]
    assert model.rope.scaling == ("none" if rope["rope_type"] == "default" else rope["rope_type"])
    assert model.rope.factor == rope.get("factor", 1.0)
    if model.rope.scaling in ("llama3", "yarn"):
        assert model.rope.original_max_position == rope["original_max_position_embeddings"]
    if model.rope.scaling == "llama3":
        assert (model.rope.low_freq_factor, model.rope.high_freq_factor) == (1.0, 4.0)
    if model.rope.scaling == "yarn":
        assert (model.rope.beta_fast, model.rope.beta_slow) == (24.0, 1.0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("generation", [4, 5])
def test_reads_what_transformers_reads(name: str, generation: int, tmp_path: Path) -> None:
    raw = save(CASES[name], tmp_path)
    if generation == 4:
        (tmp_path / "config.json").write_text(json.dumps(as_version_4(raw)))
    config = load_config((), [f"model.init_from={tmp_path}", "attention.variant=gqa"])
    check(config.model, tmp_path)
    assert config.model.init_from == str(tmp_path)


def test_the_old_type_key_of_rope_scaling(tmp_path: Path) -> None:
    raw = as_version_4(save(CASES["llama-linear"], tmp_path))
    raw["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    check(load_config((), [f"model.init_from={tmp_path}"]).model, tmp_path)


@pytest.mark.parametrize(("override", "parts"), [
    ("model.num_layers=5", ("model.num_layers is 5", "the command line", "3", "config.json")),
    ("model.head_dim=64", ("model.head_dim is 64", "16")),
    ("model.rope.theta=123", ("model.rope.theta is 123", "1000000")),
    ("model.tie_embeddings=false", ("model.tie_embeddings is false", "true")),
    ("attention.variant=mla", ("attention.variant is mla", "gqa")),
    ("attention.variant=mqa", ("attention.variant is mqa", "2 KV heads")),
])
def test_a_contradiction_is_refused_by_name(override: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    save(CASES["qwen2"], tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config((), [f"model.init_from={tmp_path}", override])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_small_models_positions_bound_the_default_length_of_samples(tmp_path: Path) -> None:
    """What generates text gives no length; what does is held to it."""
    save(CASES["qwen2"], tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 96}))
    assert load_config((), [f"model.init_from={tmp_path}"]).data.sequence_length == 96
    assert load_config((), [f"model.init_from={tmp_path}", "data.sequence_length=64"]).data.sequence_length == 64
    with pytest.raises(ConfigError, match=r"data.sequence_length is 512"):
        load_config((), [f"model.init_from={tmp_path}", "data.sequence_length=512"])


def test_a_run_may_reach_further_than_the_weights_were_trained(tmp_path: Path) -> None:
    save(CASES["qwen2"], tmp_path)
    before = load_config((), [f"model.init_from={tmp_path}"]).model
    yarn = ["model.rope.scaling=yarn", "model.rope.factor=8", "model.rope.original_max_position=512"]
    model = load_config((), [f"model.init_from={tmp_path}", "model.max_position_embeddings=4096", *yarn]).model
    rope = dataclasses.replace(before.rope, scaling="yarn", factor=8.0, original_max_position=512)
    assert rope.theta == 1e6
    assert model == dataclasses.replace(before, max_position_embeddings=4096, rope=rope)


def test_agreeing_and_own_keys_stay(tmp_path: Path) -> None:
    save(CASES["qwen2"], tmp_path)
    model = load_config((), [f"model.init_from={tmp_path}", "model.num_layers=3", "model.rope.theta=1e6",
                             "model.vocab_size=null", "model.init_std=0.01", "model.vocab_multiple=8"]).model
    assert (model.num_layers, model.vocab_size, model.init_std, model.vocab_multiple) == (3, 320, 0.01, 8)


@pytest.mark.parametrize(("change", "parts"), [
    ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "Qwen2ForCausalLM")),
    ({"architectures": None}, ("architectures is null",)),
    ({"use_sliding_window": True}, ("use_sliding_window is true",)),
    ({"hidden_act": "gelu"}, ("hidden_act is gelu", "silu")),
    ({"mlp_bias": True}, ("mlp_bias is true",)),
    ({"attention_bias": True}, ("attention_bias is true",)),
    ({"hidden_size": "96"}, ("hidden_size is 96", "positive integer")),
    ({"hidden_size": True}, ("hidden_size is true", "positive integer")),
    ({"num_hidden_layers": None}, ("num_hidden_layers is null",)),
    ({"vocab_size": 0}, ("vocab_size is 0", "positive integer")),
    ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings is yes", "true or false")),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_type is dynamic",)),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ("mrope_section", "not supported")),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("partial_rotary_factor is 0.5",)),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}}, ("attention_factor is 1.0",)),
    ({"rope_parameters": {"rope_type": "linear"}}, ("factor is null",)),
    ({"rope_parameters": [1]}, ("rope settings are [1]",)),
    ({"rope_parameters": {"rope_theta": "x"}}, ("rope_theta is x", "a number")),
])
def test_unsupported_settings_are_refused(change: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    raw = save(CASES["qwen2"], tmp_path) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        load_config((), [f"model.init_from={tmp_path}"])
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and all(part in text for part in parts), text


def test_a_missing_or_damaged_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_from is .*no config.json"):
        load_config((), [f"model.init_from={tmp_path}"])
    for text in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"model.init_from is .*copy the model again"):
            load_config((), [f"model.init_from={tmp_path}"])
