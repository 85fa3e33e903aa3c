"""The order of samples: one for all replica counts, found again by the number of consumed samples."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mka_megatron.config.schema import DataConfig
from mka_megatron.data import loader
from mka_megatron.data.batch import IGNORE, Batch, DataError
from mka_megatron.data.corpus import Corpus, open_corpus
from mka_megatron.data.loader import Prefetcher, train_batches, valid_batches
from tests.helpers import corpora
from tests.helpers.corpora import STRIDE

DATA = DataConfig(sequence_length=16)
LENGTHS = ([40, 3, 17, 90, 5] * 4, [8] * 30)


@pytest.fixture
def pair(tmp_path: Path) -> list[Corpus]:
    """Two corpora; the ids of the second are 10**6 higher."""
    out = []
    for i, lengths in enumerate(LENGTHS):
        documents = [[token + i * 10**6 for token in document] for document in corpora.numbered(lengths)]
        out.append(open_corpus(corpora.write(tmp_path / str(i), documents), 10**8))
    return out


def take(pair: list[Corpus], steps: int, consumed: int = 0, micro: int = 2, rank: int = 0, size: int = 1, seed: int = 1,
         data: DataConfig = DATA, total: int = 8) -> list[tuple[Batch, ...]]:
    with train_batches(pair, [3.0, 1.0], data, chunk_size=4, seed=seed, consumed_samples=consumed, global_batch_size=total,
                       micro_batch_size=micro, dp_rank=rank, dp_size=size) as batches:
        return [next(batches) for _ in range(steps)]


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        and torch.equal(a.documents.starts, b.documents.starts) and a.documents.spans == b.documents.spans
    )


def rows(steps: list[tuple[Batch, ...]]) -> list[list[int]]:
    return [row for step in steps for batch in step for row in batch.tokens.tolist()]


def test_shapes_and_dtypes(pair: list[Corpus]) -> None:
    (step,) = take(pair, 1)
    assert len(step) == 4
    for batch in step:
        assert batch.tokens.shape == batch.labels.shape == batch.documents.starts.shape == (2, 16)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        moved = batch.to("cpu")
        assert same(batch, moved)


@pytest.mark.parametrize("done", [1, 7, 40])
def test_resuming_gives_the_rest_of_the_same_sequence(pair: list[Corpus], done: int) -> None:
    """40 steps of 8 samples are past the end of several epochs of both sources."""
    whole, rest = take(pair, done + 5), take(pair, 5, consumed=8 * done)
    assert all(same(a, b) for one, two in zip(whole[done:], rest, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("size", "micro"), [(1, 8), (2, 2), (4, 1), (2, 4)])
def test_the_global_order_does_not_depend_on_the_replicas(pair: list[Corpus], size: int, micro: int) -> None:
    reference = rows(take(pair, 6, micro=1))
    ranks = [take(pair, 6, micro=micro, rank=rank, size=size) for rank in range(size)]
    dealt = [
        row
        for step in range(6)
        for m in range(len(ranks[0][0]))
        for rank in range(size)
        for row in ranks[rank][step][m].tokens.tolist()
    ]
    assert dealt == reference


def test_seeds_differ_and_sources_come_by_weight(pair: list[Corpus]) -> None:
    assert rows(take(pair, 3)) == rows(take(pair, 3)) != rows(take(pair, 3, seed=2))
    second = sum(row[0] >= 10**6 for row in rows(take(pair, 25)))
    assert abs(second - 50) <= 2, "one in four of 200 samples"


def test_every_epoch_of_a_source_is_complete(tmp_path: Path) -> None:
    corpus = open_corpus(corpora.write(tmp_path / "x", corpora.numbered([20] * 8)), 10**8)
    steps = take([corpus, corpus], 5, total=4)  # both sources: 10 rows an epoch; 3 : 1
    first = [token for row in rows(steps[:4]) for token in row]
    assert len(first) == 16 * 16
    assert set(first) == {(d + 1) * STRIDE + p for d in range(8) for p in range(20)}


def test_labels_never_cross_documents_padded_or_not(pair: list[Corpus]) -> None:
    for chunks in (False, True):
        data = DataConfig(sequence_length=16, pad_documents_to_chunks=chunks)
        for step in take(pair, 10, data=data):
            for batch in step:
                real = batch.labels != IGNORE
                assert torch.equal(batch.labels[real], batch.tokens[real] + 1)
                assert bool(((batch.labels // STRIDE) == (batch.tokens // STRIDE))[real].all())
                if chunks:
                    assert all(begin % 4 == 0 for _, begin, _ in batch.documents.spans)
                if not chunks and batch.documents.padding is None:
                    assert sum(end - begin for _, begin, end in batch.documents.spans) == batch.tokens.numel()


@pytest.mark.parametrize(("size", "micro", "evaluations"), [(1, 4, 0), (2, 4, 0), (3, 2, 0), (1, 8, 2), (2, 4, 2)])
def test_validation_counts_every_label_once(pair: list[Corpus], size: int, micro: int, evaluations: int) -> None:
    ranks = [
        valid_batches(pair, DATA, chunk_size=4, eval_batches=evaluations, global_batch_size=8, micro_batch_size=micro,
                      dp_rank=rank, dp_size=size)
        for rank in range(size)
    ]
    batches = [list(rank) for rank in ranks]
    assert len({len(rank) for rank in batches}) == 1 and len(batches[0]) == len(ranks[0])
    labels = [label for rank in batches for batch in rank for label in batch.labels.flatten().tolist() if label != IGNORE]
    assert len(labels) == len(set(labels))
    every = {
        token + i * 10**6 for i, lengths in enumerate(LENGTHS) for document in corpora.numbered(lengths) for token in document[1:]
    }
    if evaluations == 0:
        assert set(labels) == every
    else:
        assert set(labels) < every
        assert 0.9 * evaluations * 8 * 16 - 60 < len(labels) <= evaluations * 8 * 16
        share = sum(label >= 10**6 for label in labels) / len(labels)
        assert abs(share - sum(t >= 10**6 for t in every) / len(every)) < 0.1
    assert all(same(a, b) for a, b in zip(batches[0], ranks[0], strict=True)), "iterating again gives the same"


def test_validation_sets_of_all_replica_counts_are_equal(pair: list[Corpus]) -> None:
    def labels(size: int) -> list[int]:
        return sorted(
            label
            for rank in range(size)
            for batch in valid_batches(pair, DATA, chunk_size=4, eval_batches=1, global_batch_size=8, micro_batch_size=2,
                                       dp_rank=rank, dp_size=size)
            for label in batch.labels.flatten().tolist()
            if label != IGNORE
        )

    assert labels(1) == labels(2) == labels(4)


def test_batch_sizes_that_do_not_divide_are_refused(pair: list[Corpus]) -> None:
    with pytest.raises(DataError, match=r"training\.global_batch_size: 8 is no multiple"):
        take(pair, 1, micro=3)


def test_the_prefetcher_stops_its_thread_and_works_ahead_of_time(pair: list[Corpus]) -> None:
    before = threading.active_count()
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = Prefetcher(numbers, 3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    deadline = time.monotonic() + 10
    while len(made) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 9, "three waiting and one in hand"
    items.close()
    items.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(items)


def test_the_prefetcher_ends_and_fails_as_its_generator() -> None:
    assert list(Prefetcher(lambda: iter([1, 2]), 1)) == [1, 2]

    def fails() -> Iterator[int]:
        yield 1
        raise DataError("no")

    items = Prefetcher(fails, 2)
    assert next(items) == 1
    with pytest.raises(DataError, match="no"):
        next(items)
    assert list(items) == []


@pytest.mark.parametrize(("sequence", "micro", "ahead"), [(512, 4, 4), (1 << 16, 1, 4), (1 << 17, 1, 2), (1 << 18, 1, 1), (1 << 20, 2, 1)])
def test_long_samples_are_prepared_fewer_steps_ahead(
    pair: list[Corpus], monkeypatch: pytest.MonkeyPatch, sequence: int, micro: int, ahead: int
) -> None:
    depths: list[int] = []
    monkeypatch.setattr(loader, "Prefetcher", lambda steps, depth: depths.append(depth))
    train_batches(
        pair, [1.0, 1.0], DataConfig(sequence_length=sequence), chunk_size=4, seed=0, consumed_samples=0,
        global_batch_size=micro, micro_batch_size=micro, dp_rank=0, dp_size=1,
    )  # fmt: skip
    assert depths == [ahead]


def test_prompts_count_in_training_only(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", corpora.numbered([8, 8]))
    corpora.write(tmp_path / "x.loss", [[0, 0, 0, 0, 0, 0, 1, 1]] * 2, np.uint8)
    corpus = open_corpus(prefix, 10**8, loss=True)
    data = DataConfig(sequence_length=8, format="sft", train_on_prompts=True)
    with train_batches(
        [corpus], [1.0], data, chunk_size=4, seed=0, consumed_samples=0, global_batch_size=1, micro_batch_size=1,
        dp_rank=0, dp_size=1,
    ) as steps:  # fmt: skip
        (batch,) = next(steps)
    assert int((batch.labels != IGNORE).sum()) == 7
    batches = valid_batches([corpus], data, chunk_size=4, eval_batches=0, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
    assert [int((batch.labels != IGNORE).sum()) for batch in batches] == [2, 2]
