"""Micro-batches of one data-parallel rank: a pure function of (seed, number of consumed samples).

Global sample n is `Samples.row(n)` whatever the number of replicas: a global batch of samples
[n, n + global_batch_size) is dealt out as micro-batches, micro-batch m of rank r holding the samples
n + (m * dp_size + r) * micro_batch_size + [0, micro_batch_size).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from mka_megatron.config.schema import DataConfig
from mka_megatron.data.batch import IGNORE, Batch, DataError
from mka_megatron.data.blend import Blend
from mka_megatron.data.corpus import Corpus
from mka_megatron.data.packing import Packing, Row
from mka_megatron.memory.documents import Documents

_VALIDATION_SEED = 0  # the validation order is the same whatever training.seed is
_PREFETCHED_STEPS = 4
_PREFETCHED_SLOTS = 1 << 18  # of one rank: longer samples are prepared one step ahead

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """The endless, blended sequence of training rows."""

    packings: tuple[Packing, ...]
    """One per source."""
    blend: Blend
    """Their interleaving."""

    def row(self, sample: int) -> Row:
        """Global sample number -> its row."""
        source, number = self.blend.locate(sample)
        return self.packings[source].row(number)


def _pack(corpus: Corpus, data: DataConfig, chunk_size: int, seed: int, count_prompts: bool = False) -> Packing:
    return Packing(
        corpus,
        sequence_length=data.sequence_length,
        chunk_size=chunk_size if data.pad_documents_to_chunks else None,
        reset_at_documents=data.reset_at_documents,
        split_documents=data.format == "pretrain",
        count_prompts=count_prompts,
        seed=seed,
    )


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows to a batch on the CPU; padding is None where no row has any."""
    padding = torch.from_numpy(np.stack([row.padding for row in rows]))
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        documents=Documents.from_starts(
            torch.from_numpy(np.stack([row.starts for row in rows])), padding if bool(padding.any()) else None
        ),
    )


def _micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    if global_batch_size % (micro_batch_size * dp_size):
        raise DataError(
            f"training.global_batch_size: {global_batch_size} is no multiple of micro_batch_size x data parallel "
            f"size = {micro_batch_size} x {dp_size}; round it to a multiple of {micro_batch_size * dp_size}"
        )
    return global_batch_size // (micro_batch_size * dp_size)


def train_batches(
    corpora: Sequence[Corpus],
    weights: Sequence[float],
    data: DataConfig,
    *,
    chunk_size: int,
    seed: int,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Prefetcher[tuple[Batch, ...]]:
    """The training steps from `consumed_samples` on, without end.

    Args:
        corpora: training documents, one corpus per source.
        weights: their shares.
        data: sequence_length, format and the packing options are read.
        chunk_size: memory_hierarchy.l1.chunk_size, used when data.pad_documents_to_chunks.
        seed: training.seed.
        consumed_samples: samples of the global order that earlier steps took.
        global_batch_size: samples per step over all replicas.
        micro_batch_size: rows of a Batch.
        dp_rank: this replica.
        dp_size: replicas.

    Returns:
        an iterator over steps, each the rank's micro-batches in order, prepared ahead by a background
        thread; close it (or use it as a context manager) to stop the thread.

    Raises:
        DataError: batch sizes that do not divide, or packing options that do not fit together.
    """
    count = _micro_batches(global_batch_size, micro_batch_size, dp_size)
    packings = tuple(_pack(corpus, data, chunk_size, seed, data.train_on_prompts) for corpus in corpora)
    samples = Samples(packings, Blend.of(weights))

    def steps() -> Iterator[tuple[Batch, ...]]:
        first = consumed_samples
        while True:
            begins = [first + (m * dp_size + dp_rank) * micro_batch_size for m in range(count)]
            yield tuple(
                collate([samples.row(begin + i) for i in range(micro_batch_size)]) for begin in begins
            )
            first += global_batch_size

    slots = count * micro_batch_size * data.sequence_length
    return Prefetcher(steps, max(1, min(_PREFETCHED_STEPS, _PREFETCHED_SLOTS // slots)))


@dataclass(frozen=True)
class ValidBatches:
    """The fixed validation set of one rank; iterate it as often as needed.

    Every rank has the same number of batches of the same shape: where samples run out, a batch repeats the
    last one with every label IGNORE, so that each label is counted once over all ranks.
    """

    packings: tuple[Packing, ...]
    """One per validation corpus."""
    samples: tuple[tuple[int, int], ...]
    """(packing, row) of every sample, in global order."""
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return -(-len(self.samples) // (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for m in range(len(self)):
            begin = (m * self.dp_size + self.dp_rank) * self.micro_batch_size
            yield collate([self._row(begin + i) for i in range(self.micro_batch_size)])

    def _row(self, sample: int) -> Row:
        packing, number = self.samples[min(sample, len(self.samples) - 1)]
        row = self.packings[packing].row(number)
        return row if sample < len(self.samples) else replace(row, labels=np.full_like(row.labels, IGNORE))


def valid_batches(
    corpora: Sequence[Corpus],
    data: DataConfig,
    *,
    chunk_size: int,
    eval_batches: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> ValidBatches:
    """The validation set: all rows of `corpora`, each once, in one fixed shuffled order.

    Args:
        corpora: validation documents; weights do not apply, every row counts alike.
        eval_batches: only the first eval_batches * global_batch_size rows; 0: all of them.
        data, chunk_size, global_batch_size, micro_batch_size, dp_rank, dp_size: as in `train_batches`.

    Raises:
        DataError: as in `train_batches`.
    """
    packings = tuple(_pack(corpus, data, chunk_size, _VALIDATION_SEED) for corpus in corpora)
    sizes = [len(packing) for packing in packings]
    wanted = sum(sizes) if eval_batches == 0 else min(sum(sizes), eval_batches * global_batch_size)
    # By size, not by weight: the loss over the first rows estimates the loss over all of them.
    order = Blend(tuple(sizes))
    samples = tuple(order.locate(n) for n in range(wanted))
    return ValidBatches(packings, samples, micro_batch_size, dp_rank, dp_size)


class Prefetcher(Generic[T]):
    """Runs a generator in a background thread, at most `depth` items ahead.

    An exception of the generator is raised by `next`. `close` stops the thread and waits for it; it is
    idempotent, and a closed prefetcher is exhausted.
    """

    def __init__(self, generate: Callable[[], Iterator[T]], depth: int) -> None:
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(generate,), name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        while not self._stop.is_set():
            try:
                item, error = self._items.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is not None:
                return item
            self.close()
            if error is not None:
                raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, generate: Callable[[], Iterator[T]]) -> None:
        try:
            for item in generate():
                if not self._put(item, None):
                    return
            self._put(None, None)
        except BaseException as error:  # raised again in the consumer
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
