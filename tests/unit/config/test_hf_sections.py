"""The "mka" block of config.json: what it says comes back, and a run may not contradict it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from mka_megatron.config import hf_sections
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from tests.unit.config.test_from_hf import ARCHITECTURES, SMALL, save

BASES = {"qwen2": Qwen2Config(**SMALL), "qwen3": Qwen3Config(**SMALL), "llama": LlamaConfig(**SMALL)}
BLOCK = [
    "attention.variant=blockmka", "attention.block_backend=reference", "routing.mode=top2", "routing.gate_hidden_size=24",
    "routing.beta_init=0.25", "memory_hierarchy.l1.window=512", "memory_hierarchy.l1.chunk_size=64",
    "memory_hierarchy.l2.min_span=3", "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.hash_bits=128",
    "memory_hierarchy.l3.placement=ssd", "memory_hierarchy.ssd_spill_path=/some/machine", "training.segment_length=512",
    "memory_hierarchy.l3.hbm_pool_gib=0.5", "memory_hierarchy.l3.dram_pool_gib=2", "memory_hierarchy.l3.ssd_pool_gib=8",
    "memory_hierarchy.l3.when_full=evict", "data.pad_documents_to_chunks=true",
]
RUN = ["data.pad_documents_to_chunks=true"]


def convert(directory: Path, family: str = "qwen2", overrides: list[str] | None = None) -> tuple[dict[str, Any], Config]:
    """A directory of ours; the base config.json and the configuration that it was made for."""
    config = load_config((), BLOCK if overrides is None else overrides)
    raw = save(BASES[family], directory)
    (directory / "config.json").write_text(json.dumps(hf_sections.add(raw, config)))
    return raw, config


@pytest.mark.parametrize("family", BASES)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    base, config = convert(tmp_path, family)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == f"mka_{family}" and raw["architectures"] == [f"MKA{ARCHITECTURES[family]}"]
    assert "/some/machine" not in json.dumps(raw)
    assert hf_sections.remove(raw) == base
    attention, routing, memory = hf_sections.from_json(raw["mka"])
    # the keys that say where things lie, and nothing else, are back at their defaults
    assert attention == dataclasses.replace(config.attention, block_backend="auto")
    assert routing == dataclasses.replace(config.routing, beta_init=None)
    l3 = dataclasses.replace(config.memory_hierarchy.l3, placement="dram", hbm_pool_gib=0.0, dram_pool_gib=None,
                             ssd_pool_gib=None, when_full="stop")
    assert memory == dataclasses.replace(config.memory_hierarchy, l3=l3, ssd_spill_path=None)


def test_a_run_takes_the_sections_and_places_them_itself(tmp_path: Path) -> None:
    _, made_for = convert(tmp_path)
    plain = load_config((), [*RUN, f"model.init_from={tmp_path}"])
    assert (plain.attention.variant, plain.memory_hierarchy.l1.window) == ("blockmka", 512)
    assert plain.memory_hierarchy.l3.hash_bits == 128 and plain.routing.gate_hidden_size == 24
    assert plain.memory_hierarchy.l3.placement == "dram" and plain.routing.beta_init is None
    assert plain.model.num_layers == SMALL["num_hidden_layers"]
    placed = load_config((), [*BLOCK, f"model.init_from={tmp_path}"])
    assert placed.memory_hierarchy == made_for.memory_hierarchy and placed.attention == made_for.attention


@pytest.mark.parametrize(("override", "parts"), [
    ("attention.variant=fastmka", ("attention.variant is fastmka", "blockmka")),
    ("routing.gate_hidden_size=32", ("routing.gate_hidden_size is 32", "24")),
    ("memory_hierarchy.l1.window=1024", ("memory_hierarchy.l1.window is 1024", "512")),
    ("memory_hierarchy.l1.window=null", ("memory_hierarchy.l1.window is null", "512")),
    ("memory_hierarchy.l3={enabled: false}", ("memory_hierarchy.l3.enabled is false", "true")),
    ("memory_hierarchy.hbm_enabled=false", ("memory_hierarchy.l2.enabled is false", "true")),
])
def test_another_value_is_refused_by_name(override: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    convert(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config((), [*RUN, f"model.init_from={tmp_path}", override])
    text = str(caught.value)
    assert all(part in text for part in (*parts, "the command line", "config.json", "remove it")), text


@pytest.mark.parametrize(("change", "parts"), [
    ({"attention": {"variant": "gau"}}, ("attention.variant is gau",)),
    ({"attention": {"variannt": "gqa"}}, ("attention.variannt", "not a configuration key")),
    ({"routing": {"gate_hidden_size": 0}}, ("routing.gate_hidden_size is 0",)),
    ({"routing": None}, ("mka.routing is null", "convert the model again")),
    ({"memory_hierarchy": {"l1": {"window": 512}, "l2": {"max_span": 1.5}}}, ("memory_hierarchy.l2.max_span is 1.5",)),
    ({"memory_hierarchy": {"l1": {"window": 100}}}, ("memory_hierarchy.l1.window is 100",)),
    ({"memory_hierarchy": {"l3": {"hash_bits": float("nan")}}}, ("memory_hierarchy.l3.hash_bits",)),
    ({"levels": 4}, ("levels", "update mka_megatron")),
])
def test_a_wrong_block_is_one_sentence(change: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    convert(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"mka": raw["mka"] | change}))
    with pytest.raises(ConfigError) as caught:
        load_config((), [*RUN, f"model.init_from={tmp_path}"])
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and all(part in text for part in (*parts, "config.json")), text


def test_block_and_architecture_belong_together(tmp_path: Path) -> None:
    base, _ = convert(tmp_path)
    path = tmp_path / "config.json"
    ours = json.loads(path.read_text())
    for raw in ({k: v for k, v in ours.items() if k != "mka"}, base | {"mka": ours["mka"]}, ours | {"mka": []}):
        path.write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match=r"convert the model again\.$"):
            load_config((), [*RUN, f"model.init_from={tmp_path}"])


def test_a_key_of_a_later_version_has_its_default(tmp_path: Path) -> None:
    config = load_config((), ["attention.variant=mka"])
    block = hf_sections.to_json(config)
    del block["attention"]["fuse"], block["memory_hierarchy"]["l3"]
    assert hf_sections.from_json(block) == (config.attention, config.routing, config.memory_hierarchy)
