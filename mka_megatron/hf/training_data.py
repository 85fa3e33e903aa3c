"""What a fine-tuning run trains on and is evaluated on, as tensors that a transformers model takes.

Shapes: B batch, S sequence (tokens of a row).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.data.corpus import Corpus
from mka_megatron.data.loader import Prefetcher, ValidBatches, collate, train_batches, valid_batches
from mka_megatron.data.packing import Row
from mka_megatron.data.prepare import Prepared
from mka_megatron.hf.ranks import Ranks


@dataclass(frozen=True)
class Inputs:
    """A micro-batch."""

    tokens: Tensor
    """[B, S] int64; the end-of-text token in padding."""
    positions: Tensor
    """[B, S] int64: place of a token in its document; padding at a row's end is a document of its own."""
    labels: Tensor
    """[B, S] int64: the next token of the same document, IGNORE where there is none."""
    count: int
    """Tokens, padding left out."""

    @property
    def label_count(self) -> int:
        """Labels that are not IGNORE."""
        return int((self.labels != IGNORE).sum())

    @staticmethod
    def of(batch: Batch, eos_id: int) -> Inputs:
        """`batch`, in which padding only follows a row's tokens."""
        documents, tokens = batch.documents, batch.tokens
        positions = documents.positions
        if documents.padding is not None:
            slots = torch.arange(tokens.shape[1])
            first = documents.padding.long().argmax(dim=1, keepdim=True)
            positions = torch.where(documents.padding, slots - first, positions)
            tokens = tokens.masked_fill(documents.padding, eos_id)
        count = sum(end - begin for _, begin, end in documents.spans)
        return Inputs(tokens, positions, batch.labels, count)


def training_batches(
    config: FineTuneConfig, data: Prepared, ranks: Ranks, step: int
) -> Prefetcher[tuple[Batch, ...]]:
    """This replica's micro-batches of every optimizer step after the first `step`, without end."""
    return train_batches(
        data.train,
        data.weights,
        config.data,
        chunk_size=1,
        seed=config.seed,
        consumed_samples=step * global_batch_size(config, ranks),
        global_batch_size=global_batch_size(config, ranks),
        micro_batch_size=config.batch_size,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
    )


def global_batch_size(config: FineTuneConfig, ranks: Ranks) -> int:
    """Samples of an optimizer step over all replicas."""
    return config.batch_size * config.gradient_accumulation * ranks.dp_size


def steps_of_epoch(config: FineTuneConfig, data: Prepared, ranks: Ranks) -> int:
    """Optimizer steps that take every row of the training documents once; the last may begin the next epoch."""
    rows = len(_packed(config, data.train, ranks, batches=0).samples)
    return -(-rows // global_batch_size(config, ranks))


def evaluation_batches(config: FineTuneConfig, data: Prepared, ranks: Ranks) -> Iterable[Batch]:
    """This replica's part of the validation set, the same every time; as many batches on every replica."""
    if config.eval_stride is None:
        return _packed(config, data.valid, ranks, config.eval_batches)
    return Windows.of(config, data.valid, ranks)


def _packed(config: FineTuneConfig, corpora: Sequence[Corpus], ranks: Ranks, batches: int) -> ValidBatches:
    return valid_batches(
        corpora,
        config.data,
        chunk_size=1,
        eval_batches=batches,
        global_batch_size=config.batch_size * ranks.dp_size,
        micro_batch_size=config.batch_size,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
    )


@dataclass(frozen=True)
class Window:
    """One row of a sliding evaluation: tokens [begin, end) of a document, labels from `scored` on."""

    corpus: Corpus
    document: int
    begin: int
    scored: int
    end: int


@dataclass(frozen=True)
class Windows:
    """A sliding window over every document: each label counts once, with as many tokens before it as fit."""

    windows: tuple[Window, ...]
    """Of all replicas, in order."""
    length: int
    batch_size: int
    dp_rank: int
    dp_size: int

    @staticmethod
    def of(config: FineTuneConfig, corpora: Sequence[Corpus], ranks: Ranks) -> Windows:
        """The windows that `config` asks for, in an order that mixes the documents where not all of them count."""
        assert config.eval_stride is not None
        length = config.data.sequence_length
        found = [
            Window(corpus, document, max(0, end - length), scored, end)
            for corpus in corpora
            for document, tokens in enumerate(corpus.lengths.tolist())
            for scored, end in _ends(tokens - 1, length, config.eval_stride)
        ]
        if config.eval_batches:
            generator = np.random.Generator(np.random.Philox(0))
            order = generator.permutation(len(found))[: config.eval_batches * config.batch_size * ranks.dp_size]
            found = [found[index] for index in order]
        return Windows(tuple(found), length, config.batch_size, ranks.dp_rank, ranks.dp_size)

    def __len__(self) -> int:
        """Batches of this replica."""
        return -(-len(self.windows) // (self.batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.batch_size
            yield collate([self._row(first + i) for i in range(self.batch_size)])

    def _row(self, number: int) -> Row:
        """A window's row; past the last one, that without labels."""
        window = self.windows[min(number, len(self.windows) - 1)]
        count = window.end - window.begin
        tokens, labels = np.zeros(self.length, np.int64), np.full(self.length, IGNORE, np.int64)
        starts, padding = np.zeros(self.length, bool), np.ones(self.length, bool)
        read = window.corpus.read(window.document, window.begin, window.end + 1)
        tokens[:count], padding[:count], starts[0] = read[:-1], False, True
        if number < len(self.windows):
            counts = window.corpus.read_loss(window.document, window.begin, window.end + 1)[1:]
            counts[: window.scored - window.begin] = False
            labels[:count] = np.where(counts, read[1:], IGNORE)
        return Row(tokens, labels, starts, padding)


def _ends(labels: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first label that counts, past the last) of the windows over `labels` labels of a document."""
    scored, end = 0, min(labels, length)
    while scored < labels:
        yield scored, end
        scored, end = end, min(labels, end + stride)
