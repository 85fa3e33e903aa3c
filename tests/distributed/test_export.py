"""Training checkpoints of every ZeRO stage and layout become Hugging Face directories: bit for bit what the live model held.

The checkpoints come from real runs (tests/distributed/export_worker.py); the exports run in this process, without a
process group. What they should give is put together from the live parameters by plain tensor operations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mka_megatron.conversion.exporting import export
from mka_megatron.conversion.stripping import strip_model
from mka_megatron.files import manifest
from tests.helpers.launch import torchrun
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same

WORKER = Path(__file__).with_name("export_worker.py")
VOCAB, HIDDEN, FFN, HEADS, GROUPS, DIM, LAYERS = 200, 64, 96, 8, 4, 16, 2  # the vocabulary is padded to 256
MODEL = ["data.cache_dir=no-cache", "model.vocab_size=200", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=8",
         "model.num_kv_heads=4", "model.head_dim=16", "model.num_layers=2", "model.max_position_embeddings=64",
         "routing.gate_hidden_size=6"]
L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l1.chunk_size=4", "memory_hierarchy.l3.recalled_chunks=2",
      "data.pad_documents_to_chunks=true"]
QWEN3 = ["model.qkv_bias=false", "model.qk_norm=true", "model.tie_embeddings=false"]
LLAMA = ["model.qkv_bias=false", "model.tie_embeddings=false"]
FAST, GQA = ["attention.variant=fastmka"], ["attention.variant=gqa"]
BLOCK = ["attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.window=8", "routing.scope=group", *L3]
LARGE = ["model.vocab_size=4608", "model.hidden_size=128", "model.ffn_hidden_size=256"]  # above DeepSpeed's swapping threshold
TP2, CP2 = ["parallel.tensor_parallel=2"], ["parallel.context_parallel=2"]
ZERO = [[f"engine.zero_stage={stage}"] for stage in range(4)]
BF16, FP16 = ["training.precision=bf16"], ["training.precision=fp16"]
NVME = [*LARGE, *ZERO[3], "engine.offload_optimizer=nvme", "engine.nvme_path={nvme}"]

TWO_RANKS = {
    "zero0": [*FAST, *ZERO[0]],
    "zero1": [*QWEN3, *BLOCK, *ZERO[1]],
    "zero2": [*FAST, *LLAMA, *ZERO[2]],
    "zero3": [*BLOCK, *ZERO[3]],
    "tp2-zero0": [*GQA, *TP2, "parallel.sequence_parallel=true", *ZERO[0]],
    "tp2-zero1": [*FAST, *QWEN3, "routing.gate_input=x", *TP2, *ZERO[1]],
    "tp2-zero2": [*BLOCK, *TP2, *ZERO[2]],
    "tp2-zero3": [*GQA, *QWEN3, *TP2, *ZERO[3]],
    "cp2-zero1": [*FAST, *CP2, *ZERO[1]],
    "cp2-zero3": [*BLOCK, *CP2, *ZERO[3]],
    "zero0-bf16": [*FAST, *ZERO[0], *BF16],
    "zero1-bf16": [*GQA, *LLAMA, *ZERO[1], *BF16],
    "zero2-fp16": [*FAST, *ZERO[2], *FP16, "engine.initial_loss_scale_power=8"],
    "zero3-bf16": [*FAST, *ZERO[3], *BF16],
    "zero2-cpu": [*FAST, *ZERO[2], "engine.offload_optimizer=cpu"],
    "zero3-cpu": [*FAST, *ZERO[3], "engine.offload_optimizer=cpu", "engine.offload_param=cpu"],
    "zero3-nvme": [*NVME, *FAST],
    "zero3-nvme-params-bf16": [*NVME, "engine.offload_param=nvme", *BLOCK, *BF16],
}
FOUR_RANKS = {
    "tp2-dp2-zero1-bf16": [*FAST, *QWEN3, *TP2, *ZERO[1], *BF16],
    "tp2-dp2-zero3": [*BLOCK, *TP2, *ZERO[3]],
    "tp2-cp2-zero2": [*FAST, *TP2, *CP2, *ZERO[2]],
    "tp2-dp2-zero3-nvme": [*NVME, *GQA, *TP2],
    "cp2-dp2-zero3-nvme": [*NVME, *FAST, *CP2],
    "tp4-zero1": [*FAST, "routing.scope=group", "parallel.tensor_parallel=4", *ZERO[1]],
}
CASES = TWO_RANKS | FOUR_RANKS
HALF = {name: torch.bfloat16 if BF16[0] in case else torch.float16 for name, case in CASES.items()
        if {BF16[0], FP16[0]} & set(case)}
RELOADED = ("zero1", "zero2", "tp2-zero1", "tp2-zero2", "tp2-zero3", "tp2-dp2-zero3")


def launch(mode: str, cases: dict[str, list[str]], directory: Path, ranks: int) -> None:
    path = directory / f"{mode}-{ranks}.json"
    path.write_text(json.dumps(cases))
    torchrun(WORKER, mode, path, directory, ranks=ranks, timeout=1200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, async_io: bool) -> Path:
    """The folder with a trained run per case."""
    directory = tmp_path_factory.mktemp("export")
    for ranks, cases in ((2, TWO_RANKS), (4, FOUR_RANKS)):
        chosen = {name: [*MODEL, *(part.format(nvme=directory / "nvme") for part in case)] for name, case in cases.items()
                  if async_io or "nvme" not in name}
        launch("train", chosen, directory, ranks)
    return directory


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    """The folder with every case exported in the training's dtype, in small files."""
    folder = runs / "exported"
    for case in CASES:
        if (runs / case).exists():
            export(checkpoint_of(runs, case), folder / case, shard_bytes=60_000)
    return folder


def checkpoint_of(runs: Path, case: str) -> Path:
    return runs / case / "checkpoints" / "step-00000003"


def skip_without(runs: Path, case: str) -> None:
    if not (runs / case).exists():
        pytest.skip("DeepSpeed's async I/O is not there")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(runs: Path, case: str) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of the live model, by hand."""
    paths = sorted((runs / case).glob("live-*.safetensors"))
    shards = [load_file(path) for path in paths]
    for name, first in shards[0].items():
        parts = [shard[name] for shard in shards]
        layer, inner = "", name
        if name.startswith("decoder.layers."):
            _, _, number, inner = name.split(".", 3)
            layer = f"model.layers.{number}."
        if inner in ("embedding.word_embeddings.weight", "output_layer.weight"):
            theirs = "model.embed_tokens.weight" if "embedding" in inner else "lm_head.weight"
            yield theirs, torch.cat(parts)[: 4608 if len(torch.cat(parts)) > 256 else VOCAB]
        elif inner.startswith("self_attention.linear_qkv."):
            kind = inner.rpartition(".")[2]
            q, k, v = torch.cat(parts).view(GROUPS, -1, *first.shape[1:]).split([HEADS // GROUPS * DIM, DIM, DIM], dim=1)
            for letter, each in (("q", q), ("k", k), ("v", v)):
                yield f"{layer}self_attn.{letter}_proj.{kind}", each.reshape(-1, *first.shape[1:])
        elif inner == "mlp.linear_fc1.weight":
            halves = [part.chunk(2) for part in parts]
            yield f"{layer}mlp.gate_proj.weight", torch.cat([gate for gate, _ in halves])
            yield f"{layer}mlp.up_proj.weight", torch.cat([up for _, up in halves])
        elif inner in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
            theirs = "self_attn.o_proj.weight" if "proj" in inner else "mlp.down_proj.weight"
            yield layer + theirs, torch.cat(parts, dim=1)
        elif ".route." in inner or inner.endswith(".planes"):
            own = inner.removeprefix("self_attention.core_attention.")
            split = ("group" in runs_config(runs, case)["routing"]["scope"] and "gate." in own) or "decay" in own
            by_rows = runs_config(runs, case)["routing"]["gate_input"] == "q"
            if "decay" in own or (split and by_rows):
                yield f"{layer}self_attn.{own}", torch.cat(parts)
            elif own.endswith("gate.fc1") and by_rows:
                yield f"{layer}self_attn.{own}", torch.cat(parts, dim=1)
            else:
                assert all(torch.equal(first, part) for part in parts), name
                yield f"{layer}self_attn.{own}", first
        else:
            assert all(torch.equal(first, part) for part in parts), name
            names = {"input_layernorm.weight": "input_layernorm.weight", "decoder.final_layernorm.weight": "model.norm.weight",
                     "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
                     "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
                     "self_attention.k_layernorm.weight": "self_attn.k_norm.weight"}
            yield layer + names[inner], first


def runs_config(runs: Path, case: str) -> dict:
    return json.loads((checkpoint_of(runs, case) / "manifest.json").read_text())["body"]["config"]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_live_models(case: str, runs: Path, exported: Path) -> None:
    skip_without(runs, case)
    found, wanted = tensors_of(exported / case), dict(expected(runs, case))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        if tensor.dtype == torch.int8:
            assert torch.equal(found[name], tensor), name
        else:
            assert_bitwise(found[name], tensor)
    assert manifest.verify(exported / case) is not None
    for path in (exported / case).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = [file.get_slice(name).get_shape() for name in file.keys()]
        assert path.stat().st_size < 70_000 or len(held) == 1


@pytest.mark.parametrize("case", HALF)
def test_masters_round_to_the_live_weights(case: str, runs: Path, tmp_path: Path) -> None:
    skip_without(runs, case)
    done = export(checkpoint_of(runs, case), tmp_path / "fp32", dtype="fp32")
    found = tensors_of(tmp_path / "fp32")
    assert done.dtype == "fp32" and json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    finer = 0
    for name, tensor in expected(runs, case):
        if tensor.is_floating_point():
            assert found[name].dtype == torch.float32
            assert_bitwise(found[name].to(HALF[case]), tensor)
            finer += int((found[name] != tensor.float()).sum())
    assert finer > 10_000  # they are the masters, not the weights widened


def test_another_precision_is_rounded_from_fp32(runs: Path, tmp_path: Path) -> None:
    export(checkpoint_of(runs, "tp2-zero2"), tmp_path / "bf16", dtype="bf16")
    found = tensors_of(tmp_path / "bf16")
    for name, tensor in expected(runs, "tp2-zero2"):
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], wanted) and found[name].dtype == wanted.dtype


@pytest.fixture(scope="module")
def reloaded(runs: Path, exported: Path) -> Path:
    """The folder with the logits of exported models at other tensor-parallel sizes."""
    folder = runs / "reloaded"
    folder.mkdir()
    cases = {}
    for case in RELOADED:
        overrides = ["model.vocab_multiple=64", "data.pad_documents_to_chunks=true", f"model.init_from={exported / case}",
                     "memory_hierarchy.l1.chunk_size=4" if L3[1] in CASES[case] else "data.workers=2"]
        if L3[1] not in CASES[case]:
            overrides.remove("data.pad_documents_to_chunks=true")
        for size in (1, 2, 4):
            stage = 3 if size == 2 else 1
            cases[f"{case}-at-{size}"] = [*overrides, f"parallel.tensor_parallel={size}", f"engine.zero_stage={stage}"]
    launch("load", cases, folder, 4)
    return folder


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", RELOADED)
def test_the_directory_gives_the_same_logits_at_any_tensor_parallel_size(case: str, size: int, runs: Path, reloaded: Path) -> None:
    live = load_file(runs / case / "logits.safetensors")["logits"]
    again = load_file(reloaded / f"{case}-at-{size}.safetensors")["logits"]
    assert_same(again, live, terms=FFN)


@pytest.mark.parametrize("case", ["tp2-zero0", "tp2-zero3"])
def test_transformers_computes_the_same_from_the_stripped_model(case: str, runs: Path, exported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    strip_model(exported / case, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        theirs, exact = model(tokens).logits, model.double()(tokens).logits
    assert_as_accurate(load_file(runs / case / "logits.safetensors")["logits"], theirs, exact)
