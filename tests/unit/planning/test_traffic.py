"""Bytes of a step: one case worked out by hand, and every kind of group against what the real model and engine issue.

Context-parallel bytes are held to the layers' own counters on real ranks in tests/distributed/test_context_parallel.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.planning.parameters import rank_parameters
from mka_megatron.planning.steps import Layout
from mka_megatron.planning.traffic import flows, ring
from tests.unit.planning.dry_traffic import RANKS

SHAPE = [
    "model.num_layers=2", "model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=64", "model.vocab_size=512", "model.tie_embeddings=false", "model.qkv_bias=false",
    "data.sequence_length=32", "training.micro_batch_size=2", "training.global_batch_size=16", "training.precision=bf16",
    "memory_hierarchy.l1.chunk_size=8", "data.pad_documents_to_chunks=true",
]
GQA, TP, SP = ["attention.variant=gqa"], ["parallel.tensor_parallel=2"], ["parallel.sequence_parallel=true"]
FULL, CP = ["training.recompute=full"], ["parallel.context_parallel=2"]
TILES = ["training.logits_tile=32", "training.mlp_tile=32"]
BLOCK = ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", "memory_hierarchy.l3.enabled=true"]
SCALARS = 256
"""More bytes than the sums of a step's losses, labels and norms send, which the plan leaves out."""


def sent(layout: Layout, *overrides: str) -> dict[str, int]:
    config = load_config([], [*SHAPE, *overrides])
    return {f"{flow.group}: {flow.what}": flow.bytes for flow in flows(config, layout, 512)}


def test_a_ring() -> None:
    assert ring("gather", 800, 4) == ring("scatter", 800, 4) == 600
    assert ring("all-reduce", 800, 4) == 1200


def test_tensor_parallel_by_hand() -> None:
    """Two passes of 2 x 32 tokens of 256 bf16 numbers: 32,768 B, of which 2 ranks send half in a gather or a scatter."""
    half = 32_768 // 2
    found = sent(Layout(2, 1, 4), *GQA, *TP, *SP)
    # a layer: 2 inputs gathered, again in the backward pass, gradients scattered; 2 outputs scattered, gradients gathered
    assert found["tensor: activations of the layers"] == 2 * 2 * (2 * 3 + 2 * 2) * half
    # embedding: scattered, gathered; output layer: gathered twice, scattered; loss: 3 sums of 64 fp32 numbers
    assert found["tensor: embedding, output layer, loss"] == 2 * (5 * half + 3 * 64 * 4)
    # 5 norms of 256 weights, bf16
    assert found["tensor: gradients of replicated weights"] == 2 * 5 * 256 * 2
    # recomputed: 2 gathers and 2 scatters of a layer more
    full = sent(Layout(2, 1, 4), *GQA, *TP, *SP, *FULL)
    assert full["tensor: activations of the layers"] == 2 * 2 * (2 * 3 + 2 * 2 + 4) * half
    # without sequence parallelism: 4 all-reduces of a layer, which send twice a half
    plain = sent(Layout(2, 1, 4), *GQA, *TP)
    assert plain["tensor: activations of the layers"] == 2 * 2 * 4 * 2 * half
    assert "tensor: gradients of replicated weights" not in plain


def test_zero_by_hand() -> None:
    """722,176 parameters on each of 2 tensor-parallel ranks, over 4 replicas.

    embedding, output: 512 x 256 / 2 each; a layer: qkv (4 + 2 x 2) x 64 x 256 / 2, proj 256 x 256 / 2, fc1 2 x 512 x 256 / 2,
    fc2 512 x 256 / 2, two norms; a last norm.
    """
    layer = 65_536 + 32_768 + 131_072 + 65_536 + 2 * 256
    elements = 2 * 65_536 + 2 * layer + 256
    assert elements == 722_176
    quarter = elements * 2 * 3 // 4  # what a gather of the bf16 numbers sends
    layout = Layout(2, 1, 4)
    assert sent(layout, *GQA, *TP, "engine.zero_stage=0")["data: gradients"] == 2 * quarter
    one, two, three = (sent(layout, *GQA, *TP, f"engine.zero_stage={stage}") for stage in (1, 2, 3))
    assert (one["data: gradients"], one["data: updated weights"]) == (2 * quarter, quarter)
    assert (two["data: gradients"], two["data: updated weights"]) == (2 * 2 * quarter, quarter)  # in both passes
    assert three["data: gradients"] == 2 * quarter  # scattered in both
    # fc1 alone has more than 100,000 elements: gathered in each of two passes, the others once in the step
    assert three["data: weights of ZeRO-3"] == 2 * (2 * 131_072 * 2 * 3 // 4)
    assert three["data: small weights of ZeRO-3"] == (elements - 2 * 131_072) * 2 * 3 // 4


def test_zero_3_gathers_again_what_is_used_again_late() -> None:
    """Qwen2.5-7B on 8 ranks: all but the last 5e8 elements, whose way to the loss and back is 1e9; recomputed a third of it."""
    large = load_config("configs/run/qwen2.5-7b.yaml", ["engine.zero_stage=3", "parallel.tensor_parallel=1",
                                                        "parallel.sequence_parallel=false"])
    layout = Layout(1, 1, 8)
    parameters = rank_parameters(large, 152_064, 1)
    whole = sum(each.elements for each in parameters if each.elements > 100_000)
    for recompute, kept in (("none", 500_000_000), ("full", 333_333_333)):
        config = replace(large, training=replace(large.training, recompute=recompute))
        (found,) = (flow.bytes for flow in flows(config, layout, 152_064) if flow.what == "weights of ZeRO-3")
        assert found == 16 * ((2 * whole - kept) * 2 * 7 // 8)


def test_one_rank_sends_nothing() -> None:
    assert sent(Layout(1, 1, 1), *GQA) == {}


DRY = {
    "gqa": [*GQA, *TP, "engine.zero_stage=0"],
    "gqa, sequence parallel": [*GQA, *TP, *SP, "model.qk_norm=true"],
    "gqa, recomputed tiles": [*GQA, *TP, *SP, *FULL, *TILES],
    "gqa, tiles": [*GQA, *TP, *TILES],
    "gqa, one tile of all": [*GQA, *TP, *SP, *FULL, "training.logits_tile=64", "training.mlp_tile=64"],
    "mqa, fp32": ["attention.variant=mqa", *TP, *FULL, "training.precision=fp32", "engine.zero_stage=2"],
    "mla": ["attention.variant=mla", *TP],
    "mla, sequence parallel": ["attention.variant=mla", *TP, *SP, *FULL, "attention.mla.q_lora_rank=32"],
    "fastmka": [*TP, *SP, *FULL],
    "fastmka, gate of the input": [*TP, *SP, "routing.gate_input=x", "engine.zero_stage=2"],
    "fastmka, gate of the input per head": [*TP, "routing.gate_input=x", "routing.scope=group"],
    "fastmka, gate per head": [*TP, "routing.scope=group"],
    "fastmka, fixed routes": [*TP, *SP, "routing.mode=fixed"],
    "ZeRO-0 over shared rows": [*GQA, *CP, "engine.zero_stage=0"],
    "ZeRO-3": [*GQA, "engine.zero_stage=3"],
    "ZeRO-3, recomputed, over shared rows": [*GQA, *CP, *FULL, "engine.zero_stage=3"],
    "blockmka over ranks": [*BLOCK, *TP, *SP, *CP, "engine.zero_stage=2", "training.recompute=selective"],
}


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    directory = tmp_path_factory.mktemp("dry")
    cases, out = directory / "cases.json", directory / "out.json"
    cases.write_text(json.dumps({name: [*SHAPE, *overrides] for name, overrides in DRY.items()}))
    root = Path(__file__).resolve().parents[3]
    env = os.environ | {"PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("dry_traffic.py")), str(out), str(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", DRY)
def test_bytes_are_those_of_the_collectives_of_a_step(case: str, issued) -> None:
    config = load_config([], [*SHAPE, *DRY[case]])
    planned: Counter[str] = Counter()
    for flow in flows(config, layout_of(config), 512):
        planned[{"data": "replicas"}.get(flow.group, flow.group)] += flow.bytes
    for group in ("tensor", "replicas"):
        assert 0 <= issued[case].get(group, 0) - planned[group] <= SCALARS, group


def layout_of(config: Config) -> Layout:
    tensor, context = config.parallel.tensor_parallel, config.parallel.context_parallel
    return Layout(tensor, context, RANKS // (tensor * context))
