"""Worker: one optimizer step of every case, first without data in a process of its own, then on the real ranks.

python -m torch.distributed.run --nproc_per_node=N dry_run_worker.py OUT

Writes OUT-<rank>.json: {case: {"dry": ..., "real": ...}}, each with the collectives in order, what the rank holds of the
model and how ZeRO cut it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch
from mka_megatron.dry_run.rank import held_by, prepared, record_step, run_rank
from mka_megatron.dry_run.recorder import Collective, Recorder
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.partitions import partitions

RANKS = 4
SHAPE = [
    "model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.max_position_embeddings=64", "model.vocab_size=190",
    "routing.gate_hidden_size=16", "memory_hierarchy.l1.chunk_size=8", "data.pad_documents_to_chunks=true",
    "data.sequence_length=64", "training.micro_batch_size=2", "training.precision=bf16",
]  # fmt: skip
L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=8"]  # every chunk of a row
BLOCK = ["attention.core=block", "memory_hierarchy.l1.window=16", *L3]
TENSOR, CONTEXT = ["parallel.tensor_parallel=2"], ["parallel.context_parallel=2"]
SEQUENCE = ["parallel.sequence_parallel=true", "training.recompute=full"]
CASES = {
    "tensor x context, block core": [
        *TENSOR, *CONTEXT, *SEQUENCE, *BLOCK, "training.global_batch_size=6",
        "model.num_layers=2", "training.logits_tile=16", "training.mlp_tile=16",
    ],
    "context 4, block core, fewer recalled": [
        "parallel.context_parallel=4", *BLOCK, "memory_hierarchy.l3.recalled_chunks=1", "training.global_batch_size=2",
        "model.num_layers=2",
    ],
    "context x data, dense core, zero 2": [
        *CONTEXT, *L3, "training.recompute=selective", "engine.zero_stage=2", "training.global_batch_size=12",
    ],
    "tensor x data, gqa, zero 2, offloaded": [
        *TENSOR, "attention.variant=gqa", "model.qk_norm=true", "engine.zero_stage=2", "engine.offload_optimizer=cpu",
        "training.global_batch_size=4",
    ],
    "tensor x context, block core, zero 3": [
        *TENSOR, *CONTEXT, *BLOCK, "engine.zero_stage=3", "training.global_batch_size=4",
    ],
    "tensor x data, fp32, zero 0": [
        *TENSOR, "parallel.sequence_parallel=true", "training.precision=fp32", "engine.zero_stage=0",
        "training.global_batch_size=8",
    ],
}  # fmt: skip


def real(config: Config, accumulation: int) -> tuple[list[Collective], list, Any]:
    """The same of this rank, with data: a whole step."""
    topology = groups.initialize(config.parallel)
    with Recorder() as recorder:
        construction = construction_context(config, topology) or nullcontext()
        model = build_model(config, topology, config.model.vocab_size or 0, construction)
        held = held_by(model)
        engine = Engine(config, model, topology)
        cut = partitions(engine)
        rows, slots = config.training.micro_batch_size, config.data.sequence_length
        text = torch.randint(config.model.vocab_size or 0, (rows, slots + 1), generator=torch.Generator().manual_seed(1))
        batch = Batch(text[:, :-1], text[:, 1:], Documents.unpacked(rows, slots))
        step, _ = record_step(engine, recorder, [batch] * accumulation, accumulation)
        engine.close()
    del topology
    parallel_state.destroy_model_parallel()
    return list(step), held, cut


def whole_step(run: Any) -> list[Collective]:
    """The collectives of all micro-batches: the first's in place of those that were not run."""
    repeated = [each for each, times in zip(run.step, run.counts, strict=True) if times > 1]
    begin = next((number for number, times in enumerate(run.counts) if times > 1), 0)
    return [*run.step[:begin], *repeated * max(0, run.accumulation - 2), *run.step[begin:]]


def main(out: str) -> None:
    rank = int(os.environ["RANK"])
    configs = {name: prepared(load_config([], [*SHAPE, *case], world_size=RANKS)) for name, case in CASES.items()}
    found: dict[str, dict[str, Any]] = {}
    accumulation = {}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, config in configs.items():
            run = pool.apply(run_rank, (config, rank, RANKS, RANKS))
            accumulation[name] = run.accumulation
            found[name] = {"dry": plain(whole_step(run), run.held, run.partitions)}
    for name, config in configs.items():
        found[name]["real"] = plain(*real(config, accumulation[name]))
    with open(f"{out}-{rank}.json", "w") as file:
        json.dump(found, file)
    groups.destroy()


def plain(step: list[Collective], held: Any, cut: Any) -> dict[str, Any]:
    return {
        "step": [dataclasses.asdict(each) for each in step],
        "held": [dataclasses.asdict(each) for each in held],
        "partitions": None if cut is None else [dataclasses.asdict(each) for each in cut],
    }


if __name__ == "__main__":
    main(sys.argv[1])
