"""Worker: gradients and training runs of the cases of every layout of this world's ranks; rank 0 writes them.

python -m torch.distributed.run --nproc_per_node=N context_parallel_worker.py OUT PLAN.json

PLAN.json: {layout: {case: overrides}}. Writes OUT.json {layout: {case: what the steps returned}} and
OUT.safetensors: layout/case/kind of batch/parameter, the gradients of layouts that share rows only, whose results have
"sent" too: per context-parallel rank and layer the bytes by purpose of forward and backward over whole rows.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.norms import parameter_norm

VOCAB, ROWS, SEQUENCE, CHUNK, STEPS = 192, 4, 64, 8, 12
KINDS = ("whole", "packed", "padded")
SHAPE = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.max_position_embeddings=64", "routing.gate_hidden_size=16",
    f"memory_hierarchy.l1.chunk_size={CHUNK}", "data.pad_documents_to_chunks=true",
    f"data.sequence_length={SEQUENCE}", "training.micro_batch_size=2", f"training.global_batch_size={ROWS}",
    "training.warmup_steps=3", "training.learning_rate=2e-3", f"training.steps={STEPS}",
]
LAYOUTS = {
    "one": [],
    "cp2": ["parallel.context_parallel=2"],
    "cp4": ["parallel.context_parallel=4"],
    "cp2-dp2": ["parallel.context_parallel=2"],
    "tp2-cp2": ["parallel.context_parallel=2", "parallel.tensor_parallel=2"],
    "tp2-cp2-sp": ["parallel.context_parallel=2", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
}


def rows(step: int) -> list[Batch]:
    """The step's rows: learnable sequences; packed: documents on chunk boundaries with padded tails; padded: tokens in
    the first quarter of the slots only, so that later ranks hold nothing. Labels are spread unevenly."""
    generator = torch.Generator().manual_seed(step)
    kind = KINDS[step % len(KINDS)]
    made = []
    for row in range(ROWS):
        start, stride = (int(torch.randint(high, (), generator=generator)) for high in (VOCAB, 5))
        text = (start + (stride + 1) * torch.arange(SEQUENCE + 1)) % VOCAB
        starts = torch.zeros(1, SEQUENCE, dtype=torch.bool)
        starts[0, 0] = True
        padding = torch.zeros(1, SEQUENCE, dtype=torch.bool)
        labels = text[None, 1:].clone()
        if kind == "packed":
            cuts = (torch.randperm(SEQUENCE // CHUNK - 1, generator=generator)[: row + 1] + 1) * CHUNK
            starts[0, cuts] = True
            for cut in cuts.tolist():
                padding[0, cut - row : cut] = True
                labels[0, cut - 1] = IGNORE
        if kind == "padded":
            padding[0, SEQUENCE // 4 - row :] = True
        labels[0, : 7 * row] = IGNORE
        labels[padding] = IGNORE
        tokens = text[None, :-1].masked_fill(padding, 0)
        made.append(Batch(tokens, labels, Documents.from_starts(starts, padding)))
    return made


def stack(some: list[Batch]) -> Batch:
    padding = [torch.zeros_like(b.tokens, dtype=torch.bool) if b.documents.padding is None else b.documents.padding
               for b in some]  # fmt: skip
    documents = Documents.from_starts(torch.cat([b.documents.starts for b in some]), torch.cat(padding))
    return Batch(torch.cat([b.tokens for b in some]), torch.cat([b.labels for b in some]), documents)


def micro_batches(step: int, config: Config, topology: Topology) -> list[Batch]:
    size = config.training.micro_batch_size
    made = rows(step)
    blocks = [stack(made[first : first + size]) for first in range(0, ROWS, size)]
    return blocks[topology.dp_rank :: topology.dp_size]


def gradients(config: Config, topology: Topology) -> tuple[dict[str, Tensor], list]:
    """Per kind of batch and parameter: the gradient of the summed loss of all rows, without an engine; and per rank and
    layer the bytes that went to other ranks for the first kind."""
    model = build_model(config, topology, VOCAB)
    found = {}
    sent: list = [None] * topology.cp_size
    for step, kind in enumerate(KINDS):
        batch = stack(rows(step))
        slots = SEQUENCE // topology.cp_size
        batch = batch.part(topology.cp_rank * slots, (topology.cp_rank + 1) * slots)
        model(batch.tokens, batch.documents, batch.labels).sum().backward()
        if step == 0:
            dist.all_gather_object(sent, [dict(each.sent) for each in model.traffic], group=topology.cp_group)
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=topology.cp_group)
            found[f"{kind}/{name}"] = grad
            parameter.grad = None
    return found, sent


def run(config: Config, topology: Topology) -> dict:
    """Steps of the engine, an evaluation, and what the layers sent."""
    engine = Engine(config, build_model(config, topology, VOCAB, construction_context(config, topology)), topology)
    done = [vars(engine.train_step(micro_batches(step, config, topology))) for step in range(STEPS)]
    held_out = [batch for step in (100, 101, 102) for batch in micro_batches(step, config, topology)]
    found = {key: [step[key] for step in done] for key in ("loss", "grad_norm", "tokens", "skipped")}
    evaluation = engine.evaluate(held_out)
    found |= {"evaluation": evaluation.loss, "labels": evaluation.tokens,
              "parameter_norm": parameter_norm(engine.model, topology)}
    engine.close()
    every: list = [None] * topology.world_size
    dist.all_gather_object(every, found)
    return found | {"ranks_agree": all(each == every[0] for each in every)}


def main(out: str, plan: dict[str, dict[str, list[str]]]) -> None:
    results: dict[str, dict] = {}
    tensors: dict[str, Tensor] = {}
    began = time.monotonic()
    rank = 0
    for layout, cases in plan.items():
        results[layout] = {}
        topology = groups.initialize(load_config([], [*SHAPE, *LAYOUTS[layout]]).parallel)
        rank = topology.rank
        for name, case in cases.items():
            config = load_config([], [*SHAPE, *case, *LAYOUTS[layout]])
            sent = None
            if topology.tp_size == topology.dp_size == 1 and config.engine.zero_stage < 2:
                grads, sent = gradients(config, topology)
                tensors |= {f"{layout}/{name}/{key}": grad for key, grad in grads.items()}
            results[layout][name] = run(config, topology) | {"sent": sent}
            if rank == 0:
                print(f"{time.monotonic() - began:6.1f} s  {layout} {name}", flush=True)
        del topology
        parallel_state.destroy_model_parallel()
    if rank == 0:
        with open(f"{out}.json", "w") as file:
            json.dump(results, file)
        save_file(tensors, f"{out}.safetensors")
    groups.destroy()


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        main(sys.argv[1], json.load(file))
