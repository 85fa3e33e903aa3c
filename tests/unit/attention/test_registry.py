from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import mka_megatron
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import AttentionConfig, Config, L2Config, MemoryConfig, ModelConfig


def test_every_variant_of_the_schema_is_registered() -> None:
    assert set(VARIANTS) == set(get_args(get_type_hints(AttentionConfig)["variant"]))


@pytest.mark.parametrize(
    ("name", "expected"), [("mha", 12), ("mqa", 1), ("gqa", 3), ("mla", 12), ("mka", 3), ("fastmka", 3)]
)
def test_kv_heads(name: str, expected: int) -> None:
    assert VARIANTS[name].kv_heads(ModelConfig(num_attention_heads=12, num_kv_heads=3)) == expected


def test_levels_are_routed_only_by_gated_variants_with_more_than_one() -> None:
    alone = replace(Config(), memory_hierarchy=MemoryConfig(l2=L2Config(enabled=False)))
    gated = {name for name, variant in VARIANTS.items() if variant.levels(Config()) > 1}
    assert gated == {"mka", "fastmka"}
    assert all(variant.levels(alone) == 1 for variant in VARIANTS.values())


def test_nothing_else_in_attention_or_model_compares_variant_names() -> None:
    """A variant is one file and one registry entry."""
    package = Path(mka_megatron.__file__).parent
    for path in [*package.glob("attention/*.py"), *package.glob("model/*.py"), *package.glob("memory/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not constants & set(VARIANTS), f"{path}:{node.lineno} compares a variant's name"
