"""The bigram baseline that a language model has to beat: interpolated Kneser-Ney.

With c(u,w) the number of times w follows u in the training documents, and D = n1 / (n1 + 2 n2) from the
numbers of pairs seen once and twice:

    p(w|u)  = (max(c(u,w) - D, 0) + D N(u,.) p1(w)) / c(u)         c(u) = sum_w c(u,w), N(u,.) = |{w: c(u,w) > 0}|
    p1(w)   = (max(N(.,w) - D1, 0) + D1 N1 / V) / sum_w N(.,w)     N(.,w) = |{u: c(u,w) > 0}|, N1 = |{w: N(.,w) > 0}|

(Kneser & Ney 1995, interpolated form of Chen & Goodman 1999); an unseen u gives p1. D1 is the same estimate
over N(.,w); the last term keeps words that were never seen from having probability zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mka_megatron.data.batch import IGNORE, Batch, DataError
from mka_megatron.data.corpus import Corpus

_CHUNK = 1 << 22  # pairs counted at once


@dataclass(frozen=True)
class Bigram:
    """An interpolated Kneser-Ney bigram model over ids in [0, V)."""

    pairs: np.ndarray
    """[P] int64, ascending: u * V + w of every pair seen."""
    discounted: np.ndarray
    """[P] float64: max(c(u,w) - D, 0) / c(u)."""
    backoff: np.ndarray
    """[V] float64: D N(u,.) / c(u); 1 where u was never seen."""
    unigram: np.ndarray
    """[V] float64: p1."""

    @staticmethod
    def fit(documents: Iterable[np.ndarray], vocab_size: int) -> Bigram:
        """Count the pairs inside every document ([tokens] ids below `vocab_size`) and smooth.

        Raises DataError where there is not one pair.
        """
        pairs, counts = _count(documents, vocab_size)
        if not len(pairs):
            raise DataError(
                "the training documents hold no two tokens in a row: no bigram baseline; add text"
            )
        before, after = np.divmod(pairs, vocab_size)
        discount = _discount(counts)
        totals = np.bincount(before, weights=counts, minlength=vocab_size)
        followers = np.bincount(before, minlength=vocab_size)
        preceded = np.bincount(after, minlength=vocab_size)
        discount1 = _discount(preceded)
        unigram = np.maximum(preceded - discount1, 0) + discount1 * np.count_nonzero(preceded) / vocab_size
        return Bigram(
            pairs=pairs,
            discounted=(counts - discount) / totals[before],
            backoff=np.where(totals > 0, discount * followers / np.maximum(totals, 1), 1.0),
            unigram=unigram / preceded.sum(),
        )

    def probability(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """p(after | before) of int64 ids of equal shape, float64."""
        wanted = before * len(self.unigram) + after
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[place] == wanted, self.discounted[place], 0.0)
        return seen + self.backoff[before] * self.unigram[after]


def bigram_nll(corpora: Sequence[Corpus], batches: Iterable[Batch], vocab_size: int) -> float:
    """Mean nats per label of a bigram model of all of `corpora` on the labels of `batches`.

    Args:
        corpora: training documents, each counted once, whatever its weight in the blend.
        batches: validation batches; the context of a label is the token in its slot.
        vocab_size: V.

    Raises:
        DataError: there is nothing to train on, or no label.
    """
    model = Bigram.fit(_documents(corpora), vocab_size)
    total, labels = 0.0, 0
    for batch in batches:
        keep = batch.labels != IGNORE
        before, after = batch.tokens[keep].cpu().numpy(), batch.labels[keep].cpu().numpy()
        total -= float(np.log(model.probability(before, after)).sum())
        labels += len(after)
    if not labels:
        raise DataError("the validation batches hold no labels; add validation documents")
    return total / labels


def _documents(corpora: Sequence[Corpus]) -> Iterator[np.ndarray]:
    for corpus in corpora:
        for document, length in enumerate(corpus.lengths.tolist()):
            # One token of overlap, so that no pair is lost where a long document is read in pieces.
            for begin in range(0, length - 1, _CHUNK):
                yield corpus.read(document, begin, min(length, begin + _CHUNK + 1))


def _count(documents: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs u * V + w, ascending, and how often each occurs."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[np.ndarray] = []
    size = 0

    def merge() -> None:
        nonlocal pairs, counts, size
        found, times = np.unique(np.concatenate(waiting), return_counts=True)
        pairs, inverse = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate([counts, times])).astype(np.int64)
        waiting.clear()
        size = 0

    for ids in documents:
        waiting.append(ids[:-1].astype(np.int64) * vocab_size + ids[1:])
        size += len(waiting[-1])
        if size >= _CHUNK:
            merge()
    if waiting:
        merge()
    return pairs, counts


def _discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2); one half where nothing was seen once, which that rule would not discount at all."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5
