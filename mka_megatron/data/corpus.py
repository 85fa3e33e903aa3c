"""Documents of a Megatron IndexedDataset (.bin/.idx), checked when opened, read through memory maps."""

from __future__ import annotations

import dataclasses
import os
import struct
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from mka_megatron.data.batch import DataError

LOSS_SUFFIX = ".loss"
"""`prefix` + this is the prefix of the uint8 loss mask that belongs to the tokens at `prefix`."""

_MAGIC = b"MMIDIDX\x00\x00"
_INTEGERS = {dtype.value for dtype in DType if "int" in dtype.name}
_HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True)
class Corpus:
    """A set of tokenised documents, in storage order.

    Reads return copies: Megatron's reader unmaps the file when it is collected, under any view of it.
    """

    name: str
    """What messages call it: the .bin/.idx prefix."""
    dataset: IndexedDataset
    """The tokens."""
    loss: IndexedDataset | None
    """uint8 mask parallel to the tokens: 1 where the token counts as a label; None: all of them do."""
    begins: np.ndarray
    """[D] int64: offset of each document's first token in the .bin, in tokens."""
    lengths: np.ndarray
    """[D] int64: tokens of each document."""
    vocab_size: int
    """Ids at or above this are refused when read."""

    @property
    def tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.lengths.sum())

    def select(self, keep: np.ndarray) -> Corpus:
        """The documents where `keep` ([D] bool) holds."""
        return dataclasses.replace(self, begins=self.begins[keep], lengths=self.lengths[keep])

    def read(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of a document, int64. Raises DataError for an id outside the vocabulary."""
        ids = _read(self.dataset, int(self.begins[document]) + begin, end - begin).astype(np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids.max() if ids.max() >= self.vocab_size else ids.min()
            raise DataError(
                f"{self.name}.bin: token id {bad} is outside the vocabulary of {self.vocab_size}; "
                "it was written with another tokenizer, name that one in data.tokenizer"
            )
        return ids

    def read_loss(self, document: int, begin: int, end: int) -> np.ndarray:
        """Whether tokens [begin, end) of a document count as labels, bool."""
        if self.loss is None:
            return np.ones(end - begin, bool)
        return _read(self.loss, int(self.begins[document]) + begin, end - begin).astype(bool)


def _read(dataset: IndexedDataset, offset: int, count: int) -> np.ndarray:
    dtype = dataset.index.dtype
    return dataset.bin_reader.read(dtype=dtype, count=count, offset=offset * DType.size(dtype))


def open_corpus(prefix: str, vocab_size: int, loss: bool = False) -> Corpus:
    """Open `prefix`.bin/.idx, with the loss mask beside it when `loss`.

    Raises DataError, naming the file, where a file is missing, truncated or inconsistent, where no token
    is stored, or where the mask does not match the tokens.
    """
    begins, lengths = _check(prefix)
    dataset = IndexedDataset(prefix)
    mask = None
    if loss:
        mask_prefix = prefix + LOSS_SUFFIX
        mask_begins, mask_lengths = _check(mask_prefix)
        if not (np.array_equal(begins, mask_begins) and np.array_equal(lengths, mask_lengths)):
            raise DataError(
                f"{mask_prefix}.idx: documents differ from those of {prefix}.idx; prepare both again"
            )
        mask = IndexedDataset(mask_prefix)
    corpus = Corpus(prefix, dataset, mask, begins, lengths, vocab_size)
    for document in np.flatnonzero(lengths)[[0, -1]]:  # so that a wrong tokenizer shows before training
        corpus.read(document, 0, min(int(lengths[document]), 1 << 20))
    return corpus


def _check(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Document begins and lengths in tokens ([D] int64 each) of a consistent .bin/.idx pair."""
    index_path, data_path = prefix + ".idx", prefix + ".bin"
    for path in (index_path, data_path):
        if not os.path.isfile(path):
            raise DataError(f"{path}: there is no such file; a Megatron dataset needs both .bin and .idx")

    def damaged(what: str) -> DataError:
        return DataError(f"{index_path}: {what}; the file is damaged or not Megatron's, prepare it again")

    with open(index_path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise damaged("shorter than its header")
    magic, version, code, sequences, bounds = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1:
        raise damaged("no IndexedDataset header of version 1")
    if code not in _INTEGERS:
        raise damaged(f"type code {code} is no integer type")
    size = _HEADER.size + 12 * sequences + 8 * bounds
    if os.path.getsize(index_path) != size:
        raise damaged(f"{os.path.getsize(index_path)} bytes where its header promises {size}")
    if sequences == 0 or bounds < 2:
        raise DataError(f"{index_path}: no documents; remove the source or prepare it from a file with text")
    itemsize = DType.size(code)
    table = np.memmap(index_path, mode="r", dtype=np.uint8)
    lengths = table[34 : 34 + 4 * sequences].view(np.int32).astype(np.int64)
    pointers = table[34 + 4 * sequences : 34 + 12 * sequences].view(np.int64)
    edges = table[34 + 12 * sequences :].view(np.int64)
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * itemsize):
        raise damaged("sequence lengths and offsets disagree")
    if edges[0] != 0 or edges[-1] != sequences or (np.diff(edges) < 0).any():
        raise damaged("document bounds are not ascending over all sequences")
    if os.path.getsize(data_path) != ends[-1] * itemsize:
        raise DataError(
            f"{data_path}: {os.path.getsize(data_path)} bytes where the index promises {ends[-1] * itemsize}; "
            "the file is truncated, prepare or copy it again"
        )
    if ends[-1] == 0:
        raise DataError(f"{data_path}: no tokens; remove the source or prepare it from a file with text")
    bounds_in_tokens = np.concatenate([[0], ends])[edges]
    return bounds_in_tokens[:-1], np.diff(bounds_in_tokens)
