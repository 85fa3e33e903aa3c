"""Training and evaluation of a contender, step by step on the training engine."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mka_megatron.benchmark.data import TrainRows
from mka_megatron.benchmark.model import BenchmarkModel
from mka_megatron.config.validate import validate
from mka_megatron.data.batch import Batch
from mka_megatron.data.loader import ValidBatches
from mka_megatron.training.records import perplexity

LAST_STEPS = 10
"""Steps at the end of training whose mean loss is reported."""


@dataclass(frozen=True)
class Training:
    """What training did; equal on every rank, times aside."""

    losses: tuple[float, ...]
    """Nats per token of every step."""
    tokens: int
    """Slots of all ranks."""
    seconds: float
    """In steps, waiting for batches included."""
    tokens_per_second: float
    """Of all ranks, the first step left out where there are others."""
    data_sha256: str
    """Of every token, label and document start that all ranks were given, in order."""

    @property
    def loss(self) -> float:
        """Mean over the last steps."""
        last = self.losses[-LAST_STEPS:]
        return sum(last) / len(last)


def train_model(
    model: BenchmarkModel,
    loader: TrainRows,
    epochs: int = 1,
    learning_rate: float | None = None,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> Training:
    """Train `model` with warm-up and decay over `epochs` passes over `loader`.

    Args:
        learning_rate: its peak; None: as configured. The end of the schedule moves with it.
        progress: called after every step with its number and loss.

    Raises ConfigError, and NonFiniteError where the loss stays infinite.
    """
    engine, steps = model.engine, epochs * len(loader)
    training = engine.config.training
    rate = training.learning_rate if learning_rate is None else learning_rate
    training = dataclasses.replace(
        training, steps=steps, learning_rate=rate, warmup_steps=min(training.warmup_steps, steps),
        min_learning_rate=rate * training.min_learning_rate / training.learning_rate,
    )  # fmt: skip
    config = dataclasses.replace(engine.config, training=training)
    validate(config)
    engine.config, engine.step = config, 0
    losses, seconds, seen = [], [], hashlib.sha256()
    for _ in range(epochs):
        began = time.perf_counter()
        for batches in loader:
            result = engine.train_step(batches)
            seconds.append(time.perf_counter() - began)
            losses.append(result.loss)
            _digest(seen, batches)
            progress(len(losses), result.loss)
            began = time.perf_counter()
    per_step = training.global_batch_size * config.data.sequence_length
    timed = seconds[1:] or seconds
    return Training(
        tuple(losses), steps * per_step, sum(seconds), per_step * len(timed) / sum(timed), _of_all_ranks(seen.digest())
    )


def evaluate_model(model: BenchmarkModel, loader: ValidBatches) -> float:
    """Perplexity of `model` on held-out rows."""
    return perplexity(model.engine.evaluate(loader).loss)


def _digest(seen: hashlib._Hash, batches: Sequence[Batch]) -> None:
    for batch in batches:
        for tensor in (batch.tokens, batch.labels, batch.documents.positions):
            seen.update(tensor.numpy().tobytes())


def _of_all_ranks(digest: bytes) -> str:
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        mine, found = mine.to(device), [each.to(device) for each in found]
    dist.all_gather(found, mine)
    return hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in found)).hexdigest()
