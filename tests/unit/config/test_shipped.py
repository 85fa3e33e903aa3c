"""The YAML files of configs/: they load, they say what was published, and no edit of them ends in a traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mka_megatron.config.fields import annotation_at, kind, type_hints
from mka_megatron.config.fine_tune import load_fine_tune
from mka_megatron.config.load import ConfigError, load_config
from mka_megatron.config.schema import Config, RopeConfig

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


VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000003, 10**25, 0.5, -2.5, 1e-30, float("nan"), float("inf"), "",
          "x", "none", "gqa", "1e-3", "9" * 500, "\x07", "a\nb", "../base.yaml", [], [1, 2], ["a"], [[1]], [{"path": "q"}],
          {}, {"a": 1}, {"path": "q"}, {1: 2}, {None: None}]


def mutate(tree: dict[str, Any], rng: random.Random) -> None:
    """One edit somewhere in the tree, in place: replace, delete, misspell, duplicate elsewhere, or add a key."""
    node: Any = tree
    hint: Any = Config
    while True:
        below = [key for key, value in node.items() if isinstance(value, dict) and value]
        if not below or rng.random() < 0.3:
            break
        key = rng.choice(below)
        hint = type_hints(hint).get(key) if hint is not None and hasattr(hint, "__dataclass_fields__") else None
        node = node[key]
    keys = list(node)
    edit = rng.choice(["replace", "delete", "misspell", "known", "unknown"])
    if edit == "known" and hasattr(hint, "__dataclass_fields__"):
        node[rng.choice(list(type_hints(hint)))] = rng.choice(VALUES)
    elif edit == "unknown" or not keys:
        node[rng.choice(["zzz", "base", "model", "hbm_enabled", "dram_staging", "", "a.b", "é"])] = rng.choice(VALUES)
    elif edit == "replace":
        node[rng.choice(keys)] = rng.choice(VALUES)
    else:
        key = rng.choice(keys)
        value = node.pop(key)
        if edit == "misspell":
            text = str(key)
            at = rng.randrange(len(text) + 1)
            node[text[:at] + rng.choice("xs_") + text[at + rng.randrange(2):]] = value


@pytest.mark.parametrize("block", range(10))
def test_three_hundred_edits_are_valid_or_refused_in_one_sentence(block: int, tmp_path: Path) -> None:
    refused = 0
    for seed in range(30 * block, 30 * block + 30):
        rng = random.Random(seed)  # noqa: S311
        source = rng.choice(FILES)
        tree = yaml.safe_load(source.read_text())
        base = tree.pop("base", [])
        for _ in range(rng.randint(1, 2)):
            mutate(tree, rng)
        if base and "base" not in tree:
            tree["base"] = [str(source.parent / name) for name in base]
        path = tmp_path / f"{seed}.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        try:
            load_config(path, world_size=rng.choice([1, 8]))
        except ConfigError as error:
            refused += 1
            text = str(error)
            assert text.endswith(".") and text.isprintable() and "\n" not in text and len(text) < 1000, (seed, text)
    assert refused > 5


@pytest.mark.parametrize("seed", range(30))
def test_damaged_text_is_valid_or_refused_in_one_sentence(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)  # noqa: S311
    path = tmp_path / "damaged.yaml"
    for source in FILES:
        text = list(source.read_text())
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice("{}[]:&*!|>%@`\t\"'#,?-\x00é\n 9")
        path.write_text("".join(text), encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            assert str(error).endswith(".") and "\n" not in str(error), str(error)
