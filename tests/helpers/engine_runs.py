"""A tiny model, its batches and its engine, for the workers that train under DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import Engine, construction_context

# Large enough that, over two replicas, both the optimizer's sub-group and the embedding pass DeepSpeed's
# 1 MiB threshold for swapping to NVMe, while norms and biases stay below it.
VOCAB, SEQUENCE, MICRO, GLOBAL = 4608, 32, 2, 8
BASE = [
    f"model.vocab_size={VOCAB}", "model.num_layers=2", "model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=32", "model.max_position_embeddings=64", "routing.gate_hidden_size=16",
    f"data.sequence_length={SEQUENCE}", f"training.micro_batch_size={MICRO}",
    f"training.global_batch_size={GLOBAL}", "training.learning_rate=2e-3", "training.min_learning_rate=2e-4",
    "training.warmup_steps=3", "training.steps=20",
]


def config_of(case: Sequence[str]) -> Config:
    """The base configuration with a case's overrides."""
    return load_config([], [*BASE, *case])


def global_batch(step: int) -> list[Batch]:
    """The step's rows, one Batch each: learnable sequences, two documents a row, a varying share of labels off."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(GLOBAL):
        start, stride, cut, off = (int(torch.randint(low, high, (), generator=generator))
                                   for low, high in ((0, 64), (1, 4), (4, SEQUENCE - 4), (0, SEQUENCE // 2)))
        text = (start + stride * torch.arange(SEQUENCE + 1)) % 64
        starts = torch.zeros(1, SEQUENCE, dtype=torch.bool)
        starts[:, [0, cut]] = True
        labels = text[None, 1:].clone()
        labels[:, cut - 1] = IGNORE
        labels[:, :off] = IGNORE
        rows.append(Batch(text[None, :-1].clone(), labels, Documents.from_starts(starts)))
    return rows


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch."""
    starts = torch.cat([row.documents.starts for row in rows])
    return Batch(torch.cat([row.tokens for row in rows]), torch.cat([row.labels for row in rows]),
                 Documents.from_starts(starts))


def micro_batches(step: int, config: Config, topology: Topology) -> list[Batch]:
    """This replica's micro-batches: the rows are dealt round-robin to (micro-batch, replica)."""
    rows, size = global_batch(step), config.training.micro_batch_size
    blocks = [stack(rows[first : first + size]) for first in range(0, GLOBAL, size)]
    return blocks[topology.dp_rank :: topology.dp_size]


def model_of(config: Config, topology: Topology) -> GPT:
    """The model, built as the training loop builds it."""
    return build_model(config, topology, VOCAB, construction_context(config, topology))


def engine_of(config: Config, topology: Topology) -> Engine:
    """A fresh engine."""
    return Engine(config, model_of(config, topology), topology)


def train(engine: Engine, first: int, last: int) -> list[dict[str, float]]:
    """Steps first..last-1 on their batches; what each returned."""
    config, topology = engine.config, engine.topology
    return [vars(engine.train_step(micro_batches(step, config, topology))) for step in range(first, last)]
