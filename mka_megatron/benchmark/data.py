"""The benchmark's rows: a budget of training rows in one order, and two fixed halves of the held-out documents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from mka_megatron.benchmark.settings import contender
from mka_megatron.benchmark.world import world, world_size
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch, DataError
from mka_megatron.data.corpus import Corpus
from mka_megatron.data.loader import ValidBatches, train_batches, valid_batches
from mka_megatron.data.prepare import Prepared, prepare
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.start import PeerFailedError, rank_0_first

TOKENS = 409_600
"""Slots of training rows, where nothing else is said."""

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class TrainRows:
    """The first rows of the training order, in steps of one rank's micro-batches; iterate it as often as wanted."""

    config: Config
    data: Prepared
    steps: int
    dp_rank: int
    dp_size: int

    def __len__(self) -> int:
        """Optimizer steps of one pass."""
        return self.steps

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        training = self.config.training
        with train_batches(
            self.data.train, self.data.weights, self.config.data,
            chunk_size=self.config.memory_hierarchy.l1.chunk_size, seed=training.seed, consumed_samples=0,
            global_batch_size=training.global_batch_size, micro_batch_size=training.micro_batch_size,
            dp_rank=self.dp_rank, dp_size=self.dp_size,
        ) as batches:  # fmt: skip
            yield from islice(batches, self.steps)


def prepared(config: Config, topology: Topology) -> Prepared:
    """The tokenised data: rank 0 makes what the cache does not hold, the others open it.

    Raises DataError; on the other ranks too where rank 0 raised it.
    """
    bars = topology.rank == 0 and sys.stderr.isatty()
    try:
        return rank_0_first(lambda: prepare(config.data, vocab_size=config.model.vocab_size, progress=bars), topology)
    except PeerFailedError:
        raise DataError("rank 0 could not prepare the data; it says why.") from None


def get_dataloader(
    split: Split = "train", *, config: Config | None = None, tokens: int = TOKENS, topology: Topology | None = None
) -> TrainRows | ValidBatches:
    """Rows of a split for this rank.

    Args:
        split: train, valid or test.
        config: of the model that they are for; None: any of the default ones, for they all see the same rows.
        tokens: train: slots of a pass, rounded down to whole steps.
        topology: process groups; None: those of this process.

    Raises DataError where there are too few tokens or documents.
    """
    config = config or contender("gqa", world_size=world_size())
    topology = topology or world(config.parallel, config.engine.timeout_seconds)
    data = prepared(config, topology)
    return train_rows(config, data, topology, tokens) if split == "train" else held_out(config, data, topology, split)


def train_rows(config: Config, data: Prepared, topology: Topology, tokens: int) -> TrainRows:
    """The first `tokens` slots of the training order. Raises DataError where they make no step."""
    steps = tokens // (config.training.global_batch_size * config.data.sequence_length)
    if not steps:
        raise DataError(
            f"tokens: {tokens} are less than a step of {config.training.global_batch_size} rows of "
            f"{config.data.sequence_length}; give more"
        )
    return TrainRows(config, data, steps, topology.dp_rank, topology.dp_size)


def held_out(config: Config, data: Prepared, topology: Topology, split: Literal["valid", "test"]) -> ValidBatches:
    """A half of the held-out documents: of each source the even ones (valid), on which choices are made, or the odd.

    Raises DataError where there are none.
    """
    corpora = tuple(half for corpus in data.valid if (half := _half(corpus, split)).lengths.any())
    if not corpora:
        raise DataError(f"data.valid_fraction: {config.data.valid_fraction} holds out too few documents for a {split} set; raise it")
    training = config.training
    return valid_batches(
        corpora, config.data, chunk_size=config.memory_hierarchy.l1.chunk_size, eval_batches=training.eval_batches,
        global_batch_size=training.global_batch_size, micro_batch_size=training.micro_batch_size,
        dp_rank=topology.dp_rank, dp_size=topology.dp_size,
    )  # fmt: skip


def _half(corpus: Corpus, split: Literal["valid", "test"]) -> Corpus:
    odd = np.arange(len(corpus.lengths)) % 2 == 1
    return corpus.select(odd if split == "test" else ~odd)
