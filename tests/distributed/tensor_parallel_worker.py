"""Worker: train every case for some steps at this world's tensor-parallel size; rank 0 writes the losses.

python -m torch.distributed.run --nproc_per_node=N tensor_parallel_worker.py CASES.json OUT.json [key=value ...]
"""

from __future__ import annotations

import json
import sys

import torch

from mka_megatron.config.load import load_config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.training.engine import Engine, construction_context

VOCAB, BATCH, SEQUENCE, CHUNK = 192, 4, 64, 8
SHAPE = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.max_position_embeddings=64", "model.qk_norm=true",
    "attention.mla.q_lora_rank=24", "attention.mla.kv_lora_rank=16", "attention.mla.qk_nope_head_dim=16",
    "attention.mla.qk_rope_head_dim=8", "attention.mla.v_head_dim=16", "routing.gate_hidden_size=16",
    f"data.sequence_length={SEQUENCE}", "data.pad_documents_to_chunks=true", f"memory_hierarchy.l1.chunk_size={CHUNK}",
    f"training.micro_batch_size={BATCH}", "training.warmup_steps=5",
    f"training.global_batch_size={BATCH}", "training.learning_rate=1e-3", "training.steps=50",
]


def batches(count: int) -> list[Batch]:
    """Learnable packed text: arithmetic sequences with random steps, two documents a row, the cut differing by row."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
        stride = torch.randint(1, 6, (BATCH, 1), generator=generator)
        text = (start + stride * torch.arange(SEQUENCE + 1)) % VOCAB
        starts = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
        starts[:, 0] = True
        labels = text[:, 1:].clone()
        for row in range(1, BATCH):
            cut = CHUNK * int(torch.randint(1, SEQUENCE // CHUNK, (), generator=generator))
            starts[row, cut] = True
            labels[row, cut - 1] = IGNORE
        made.append(Batch(text[:, :-1].contiguous(), labels, Documents.from_starts(starts)))
    return made


def main(cases: dict[str, list[str]], out: str, overrides: list[str]) -> None:
    losses: dict[str, list[float]] = {}
    topology = None
    for name, case in cases.items():
        config = load_config([], [*SHAPE, *case, *overrides])
        topology = topology or groups.initialize(config.parallel)
        model = build_model(config, topology, VOCAB, construction_context(config, topology))
        engine = Engine(config, model, topology)
        losses[name] = [engine.train_step([batch]).loss for batch in batches(config.training.steps)]
        engine.close()
        if topology.rank == 0:
            with open(out, "w") as file:
                json.dump(losses, file)
    groups.destroy()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2], sys.argv[3:])
