"""Megatron files as they are, and damaged ones."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from mka_megatron.data.batch import DataError
from mka_megatron.data.corpus import open_corpus
from tests.helpers import corpora

DOCUMENTS = [[5, 6, 7], [1], [2, 3], [], [9, 8, 7, 6]]


def test_documents_are_megatrons(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int32, np.int64, np.uint8):
        prefix = corpora.write(tmp_path / np.dtype(dtype).name, DOCUMENTS, dtype)
        corpus, theirs = open_corpus(prefix, 10), IndexedDataset(prefix)
        assert [corpus.read(d, 0, int(n)).tolist() for d, n in enumerate(corpus.lengths)] == DOCUMENTS
        assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
        assert corpus.tokens == 10
        assert corpus.read(4, 1, 3).tolist() == [8, 7]


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    prefix = str(tmp_path / "x")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    builder.add_document(np.array([1, 2, 3]), [2, 1])
    builder.add_document(np.array([4, 5]), [1, 1])
    builder.finalize(prefix + ".idx")
    corpus = open_corpus(prefix, 10)
    assert [corpus.read(d, 0, int(n)).tolist() for d, n in enumerate(corpus.lengths)] == [[1, 2, 3], [4, 5]]


def test_reads_outlive_the_dataset(tmp_path: Path) -> None:
    corpus = open_corpus(corpora.write(tmp_path / "x", DOCUMENTS), 10)
    ids = corpus.read(0, 0, 3)
    del corpus
    assert ids.tolist() == [5, 6, 7]


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", DOCUMENTS)
    with pytest.raises(DataError, match=r"x\.bin: token id 9 is outside the vocabulary of 9"):
        open_corpus(prefix, 9)
    middle = open_corpus(corpora.write(tmp_path / "y", [[1], [50], [1]]), 10)
    with pytest.raises(DataError, match="token id 50"):
        middle.read(1, 0, 1)
    with pytest.raises(DataError, match="token id -1"):
        open_corpus(corpora.write(tmp_path / "z", [[-1]]), 10)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", DOCUMENTS)
    with pytest.raises(DataError, match=r"nothing\.idx: there is no such file"):
        open_corpus(str(tmp_path / "nothing"), 10)
    os.remove(prefix + ".bin")
    with pytest.raises(DataError, match=r"x\.bin: there is no such file"):
        open_corpus(prefix, 10)
    with pytest.raises(DataError, match="no documents"):
        open_corpus(corpora.write(tmp_path / "none", []), 10)
    with pytest.raises(DataError, match="no tokens"):
        open_corpus(corpora.write(tmp_path / "empty", [[], []]), 10)
    with pytest.raises(DataError, match=r"x\.loss\.idx: there is no such file"):
        open_corpus(corpora.write(tmp_path / "x", DOCUMENTS), 10, loss=True)
    corpora.write(tmp_path / "x.loss", [[1, 1]], np.uint8)
    with pytest.raises(DataError, match="documents differ"):
        open_corpus(prefix, 10, loss=True)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_truncation_is_found(tmp_path: Path, suffix: str) -> None:
    prefix = corpora.write(tmp_path / "x", DOCUMENTS)
    whole = Path(prefix + suffix).read_bytes()
    for size in range(len(whole)):
        Path(prefix + suffix).write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"x\.(bin|idx): "):
            open_corpus(prefix, 10)


def test_flipped_bits_give_a_sentence_or_a_readable_dataset(tmp_path: Path) -> None:
    """Never another exception, a crash or a read past the file (a moved document bound cannot be seen)."""
    prefix = corpora.write(tmp_path / "x", DOCUMENTS)
    whole = Path(prefix + ".idx").read_bytes()
    draw = random.Random(0)  # noqa: S311
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        for flip in {bit, *([draw.randrange(8 * len(whole))] if bit % 3 == 0 else [])}:
            damaged[flip // 8] ^= 1 << flip % 8
        Path(prefix + ".idx").write_bytes(damaged)
        try:
            corpus = open_corpus(prefix, 1 << 40)
        except DataError as error:
            refused += 1
            assert str(error).startswith(prefix) and "\n" not in str(error)
        else:
            assert sum(len(corpus.read(d, 0, int(n))) for d, n in enumerate(corpus.lengths)) == corpus.tokens
    assert refused > 0.95 * 8 * len(whole)


def test_a_float_dataset_is_refused(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", [[1, 2]])
    data = bytearray(Path(prefix + ".idx").read_bytes())
    struct.pack_into("<B", data, 17, 7)  # float32, of the same size
    Path(prefix + ".idx").write_bytes(data)
    with pytest.raises(DataError, match="type code 7"):
        open_corpus(prefix, 10)
