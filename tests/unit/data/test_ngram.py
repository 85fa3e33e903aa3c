"""The bigram baseline against the textbook's formulas, pair by pair."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mka_megatron.config.schema import DataConfig
from mka_megatron.data import ngram
from mka_megatron.data.batch import DataError
from mka_megatron.data.corpus import open_corpus
from mka_megatron.data.loader import valid_batches
from mka_megatron.data.ngram import Bigram, bigram_nll
from tests.helpers import corpora

V = 90


def documents(seed: int, count: int = 40) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [(draw.zipf(1.5, draw.integers(1, 60)) % (V - 3)).tolist() for _ in range(count)]  # three ids are never seen


def slow(texts: list[list[int]]) -> dict[tuple[int, int], float]:
    """p(w|u) for all u, w by dictionaries."""
    count = Counter((u, w) for text in texts for u, w in pairwise(text))

    def discount(counts: list[int]) -> float:
        return counts.count(1) / (counts.count(1) + 2 * counts.count(2))

    d = discount(list(count.values()))
    before = {w: sum((u, w) in count for u in range(V)) for w in range(V)}
    d1 = discount(list(before.values()))
    types = sum(before.values())
    lower = {w: max(n - d1, 0) / types + d1 * sum(n > 0 for n in before.values()) / types / V for w, n in before.items()}
    out = {}
    for u in range(V):
        total = sum(count[u, w] for w in range(V))
        followers = sum((u, w) in count for w in range(V))
        for w in range(V):
            if total:
                out[u, w] = max(count[u, w] - d, 0) / total + d * followers / total * lower[w]
            else:
                out[u, w] = lower[w]
    return out


@pytest.mark.parametrize("chunk", [1 << 22, 16])
def test_probabilities_are_the_textbooks_and_sum_to_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    texts = documents(0)
    model, expected = Bigram.fit((np.array(text) for text in texts), V), slow(texts)
    u, w = np.meshgrid(np.arange(V), np.arange(V), indexing="ij")
    table = model.probability(u, w)
    assert (table > 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(table, [[expected[a, b] for b in range(V)] for a in range(V)], rtol=1e-12)


@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_the_loss_is_over_exactly_the_validation_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    train = [documents(1), documents(2)]
    held = documents(3)
    expected = slow(train[0] + train[1])
    corpora_ = [open_corpus(corpora.write(tmp_path / str(i), texts), V) for i, texts in enumerate(train)]
    valid = open_corpus(corpora.write(tmp_path / "v", held), V)
    batches = valid_batches(
        [valid], DataConfig(sequence_length=8), chunk_size=4, eval_batches=0, global_batch_size=4, micro_batch_size=4,
        dp_rank=0, dp_size=1,
    )
    pairs = [pair for text in held for pair in pairwise(text)]
    assert bigram_nll(corpora_, batches, V) == pytest.approx(
        -sum(math.log(expected[pair]) for pair in pairs) / len(pairs), rel=1e-12
    )


def test_degenerate_corpora() -> None:
    always = Bigram.fit([np.array([1, 2] * 50)], 4)  # no pair occurs once
    table = always.probability(*np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))
    assert (table > 0).all() and table[1, 2] > 0.98
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-12)
    with pytest.raises(DataError, match="no two tokens"):
        Bigram.fit([np.array([1]), np.array([], np.int64)], 4)
