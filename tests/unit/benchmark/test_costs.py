"""Costs of published shapes, worked out by hand, and the cache against what generation holds."""

from __future__ import annotations

import json

import pytest

from mka_megatron.benchmark.costs import cache_bytes, costs
from mka_megatron.benchmark.settings import contender
from mka_megatron.config.load import load_config
from mka_megatron.inference.footprint import footprint
from mka_megatron.inference.generate import remember
from mka_megatron.model.build import build_model
from tests.helpers.benchmarks import overrides
from tools import shapes

CONTEXT = 131_072
# per token: 2 (key and value) x 4 KV heads x 128 channels x 2 bytes x 28 layers
QWEN_7B = 57_344


def of(model: str, attention: str) -> dict:
    return shapes.row(shapes.MODELS / f"{model}.yaml", attention, CONTEXT)


def test_cache_of_qwen25_7b() -> None:
    assert of("qwen2.5-7b", "gqa")["device_bytes"] == QWEN_7B * CONTEXT == 7_516_192_768
    assert of("qwen2.5-7b", "mha")["device_bytes"] == 7 * QWEN_7B * CONTEXT
    assert of("qwen2.5-7b", "mqa")["device_bytes"] == QWEN_7B * CONTEXT // 4
    assert of("qwen2.5-7b", "mla")["device_bytes"] == (512 + 64) * 2 * 28 * CONTEXT
    assert of("qwen2.5-7b", "mka")["device_bytes"] == 3 * QWEN_7B * CONTEXT + QWEN_7B * 1024
    assert of("qwen2.5-7b", "fastmka")["device_bytes"] == QWEN_7B * (CONTEXT + 1024)
    block = of("qwen2.5-7b", "blockmka")
    # 16 chunks in the window, 1008 before it, 8 recalled
    assert block["device_bytes"] == QWEN_7B * (16 * 128 + 1008 + 8 * 128)
    assert block["paged_bytes"] == QWEN_7B * 1008 * 128


def test_flops_of_attention() -> None:
    pairs = CONTEXT * (CONTEXT + 1) // 2
    found = of("llama-3.1-8b", "gqa")
    assert found["prompt_attention_flops"] == 32 * 4 * 4096 * pairs  # two products of 2 FLOPs, 32 heads of 128
    assert found["decode_attention_flops"] == 32 * 4 * 4096 * (CONTEXT + 1)
    assert of("llama-3.1-8b", "mka")["prompt_attention_flops"] == 3 * found["prompt_attention_flops"]
    # scores over 128 + 64 channels, values over 128, 128 heads, 61 layers
    assert of("deepseek-v3", "mla")["prompt_attention_flops"] == 61 * 2 * 128 * (192 + 128) * pairs


def test_kernels_as_the_paper_counts_them() -> None:
    assert [of("qwen2.5-14b", name)["unfused_kernels"] for name in ("gqa", "mka", "fastmka")] == [3, 9, 3]


def test_deepseek_v3_has_its_37_billion_active_weights() -> None:
    config = load_config(shapes.MODELS / "deepseek-v3.yaml")
    assert costs(config, 129_280, 4096).weights + 129_280 * 7168 == pytest.approx(37.5e9, rel=0.01)  # with the embedding


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa", "mla", "mka", "fastmka"])
def test_cache_is_what_generation_holds(name: str, topology, tmp_path) -> None:
    config = contender(name, overrides=overrides(tmp_path))
    model = build_model(config, topology, 384).eval()
    memory = remember(model, config, topology, 1, None)
    import torch

    model.extend(torch.arange(100)[None], memory)
    assert footprint(memory, None).device["tokens"] == cache_bytes(config, 100, 4)[0]


def test_the_tool_prints_every_type_and_writes_json(tmp_path, capsys) -> None:
    path = tmp_path / "out.json"
    assert shapes.main(["--model", str(shapes.MODELS / "qwen2.5-7b.yaml"), "--context", "4096,8192", "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(path.read_text())
    assert len(printed) == 2 + len(rows) == 2 + 2 * 7
    assert f"| qwen2.5-7b | gqa | 8,192 | 7.07 | {rows[9]['training_flops'] / 1e9:.1f} |" in printed[2 + 9]
