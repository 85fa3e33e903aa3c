"""The YAML files of configs/: they load, and they say what was published."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mka_megatron.config.fields import annotation_at, kind
from mka_megatron.config.fine_tune import load_fine_tune
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import RopeConfig

CONFIGS = Path(__file__).parents[3] / "configs"
FINE_TUNING = sorted(CONFIGS.glob("*_fastmka.yaml"))
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(FINE_TUNING))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(CONFIGS)) for f in FILES])
def test_every_file_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", FINE_TUNING, ids=[f.stem for f in FINE_TUNING])
def test_every_fine_tuning_file_loads(path: Path) -> None:
    config = load_fine_tune(path, world_size=8)
    assert (config.attention.variant, config.adam_beta1, config.adam_beta2) == ("fastmka", 0.9, 0.999)
    assert 1e-5 <= config.learning_rate <= 5e-5 and 2 <= config.batch_size <= 4 and config.precision == "bf16"
    assert {"tp_size", "seed", "warmup_steps", "deterministic"} <= yaml.safe_load(path.read_text()).keys()


@pytest.mark.parametrize(("name", "world_size"), [("tiny", 1), ("tiny-256k", 1), ("qwen2.5-7b", 8), ("qwen2.5-14b", 8), ("llama-3.1-8b", 8)])
def test_run_files_fit_their_machines(name: str, world_size: int) -> None:
    variant = load_config(CONFIGS / f"run/{name}.yaml", world_size=world_size).attention.variant
    assert variant == ("blockmka" if name == "tiny-256k" else "fastmka")


LONG = [(model, context) for model in ("qwen2.5-7b", "qwen2.5-14b", "llama-3.1-8b") for context in ("64k", "128k", "256k")]


@pytest.mark.parametrize(("model", "context"), LONG, ids=["_".join(each) for each in LONG])
@pytest.mark.parametrize("world_size", [8, 16, 32, 64, 128, 256])
def test_recipes_fit_every_number_of_nodes(model: str, context: str, world_size: int) -> None:
    path = CONFIGS / f"run/{model}_{context}.yaml"
    config = load_config(path, world_size=world_size)
    assert config.data.sequence_length == 1024 * int(context[:-1]) <= config.model.max_position_embeddings
    assert config.attention.core == ("dense" if context == "64k" else "block")
    assert path.stem in config.training.output_dir
    for other, core in (("fastmka-dense", "dense"), ("fastmka-block-long", "block")):
        assert load_config([path, CONFIGS / f"attention/{other}.yaml"], world_size=world_size).attention.core == core


@pytest.mark.parametrize(("model", "context"), LONG, ids=["_".join(each) for each in LONG])
def test_recipes_reach_their_length(model: str, context: str) -> None:
    """By the factor over what the weights were trained on; Llama 3.1's factor of 8 is published for 16 times its 8K."""
    config = load_config(CONFIGS / f"run/{model}_{context}.yaml")
    rope, length = config.model.rope, config.data.sequence_length
    if model == "llama-3.1-8b":
        assert (rope.scaling, rope.original_max_position) == ("llama3", 8192)
        assert rope.factor == max(8, 8 * length / 131072)
    else:
        assert (rope.scaling, rope.original_max_position, rope.factor) == ("yarn", 32768, length / 32768)


@pytest.mark.parametrize("variant", [f.stem for f in (CONFIGS / "attention").glob("*.yaml")])
def test_attention_files_go_over_a_run(variant: str) -> None:
    config = load_config([CONFIGS / "run/tiny.yaml", CONFIGS / f"attention/{variant}.yaml"])
    assert config.attention.variant == variant.split("-")[0]


def test_there_is_a_file_for_every_variant() -> None:
    options = kind(annotation_at(("attention", "variant"))).replace(" or ", ", ").split(", ")
    assert {f.stem.split("-")[0] for f in (CONFIGS / "attention").glob("*.yaml")} == set(options)


def test_published_parameter_counts() -> None:
    """Weights of the published shapes, counted by hand, in billions as their model cards give them."""
    for name, billions in (("qwen2.5-7b", 7.62), ("qwen2.5-14b", 14.77), ("llama-3.1-8b", 8.03)):
        model = load_config(CONFIGS / f"model/{name}.yaml", ["attention.variant=gqa"]).model
        width = model.num_attention_heads * model.head_dim
        kv = model.num_kv_heads * model.head_dim
        layer = (model.hidden_size * (2 * width + 2 * kv) + model.qkv_bias * (width + 2 * kv)
                 + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size)
        assert model.vocab_size is not None and not model.tie_embeddings
        total = model.num_layers * layer + 2 * model.vocab_size * model.hidden_size + model.hidden_size
        assert round(total / 1e9, 2) == billions


def test_llama_rope_as_published() -> None:
    rope = load_config(CONFIGS / "model/llama-3.1-8b.yaml").model.rope
    assert rope == RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, original_max_position=8192,
                              low_freq_factor=1.0, high_freq_factor=4.0)
