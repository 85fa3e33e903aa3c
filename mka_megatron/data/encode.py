"""Documents -> a Megatron IndexedDataset, tokenised in parallel, in the documents' order."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mka_megatron.data.batch import DataError
from mka_megatron.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

_BATCH_CHARACTERS = 256 << 10
_BATCH_DOCUMENTS = 1024

Record = tuple[str, ...]
Report = Callable[[int, int], None]
"""Called with (documents, characters) as they are written."""


@dataclass(frozen=True)
class Encoded:
    """A batch of tokenised documents, one after the other."""

    ids: np.ndarray
    """[tokens] int32."""
    loss: np.ndarray | None
    """[tokens] uint8: 1 where the token counts as a label (prompt/response records)."""
    lengths: np.ndarray
    """[documents] int64."""
    hashes: np.ndarray
    """[documents] uint64 of the documents' text."""
    characters: int


def content_hash(record: Record) -> int:
    """64 bits of the SHA-256 of a document's text: where it goes in the held-out split."""
    return int.from_bytes(hashlib.sha256("\0".join(record).encode()).digest()[:8], "little")


def encode(records: list[Record], tokenizer: Tokenizer, append_eos: bool) -> Encoded:
    """Tokenise (text,) or (prompt, response) records; the loss is on the response and the end token."""
    ids: list[int] = []
    loss: list[int] = []
    lengths: list[int] = []
    end = [tokenizer.eos_id] if append_eos else []
    fields = [tokenizer.encode([record[i] for record in records]) for i in range(len(records[0]))]
    for parts in zip(*fields, strict=True):
        *prompts, last = parts
        prompt = sum(map(len, prompts))
        for part in parts:
            ids += part
        ids += end
        loss += [0] * prompt + [1] * (len(last) + len(end))
        lengths.append(prompt + len(last) + len(end))
    return Encoded(
        ids=np.array(ids, np.int32),
        loss=np.array(loss, np.uint8) if len(fields) > 1 else None,
        lengths=np.array(lengths, np.int64),
        hashes=np.array([content_hash(record) for record in records], np.uint64),
        characters=sum(len(text) for record in records for text in record),
    )


def write_dataset(
    records: Iterable[Record],
    prefix: str,
    tokenizer: Tokenizer,
    *,
    workers: int,
    append_eos: bool = True,
    report: Report | None = None,
) -> np.ndarray:
    """Write `prefix`.bin/.idx, one sequence and one document per record; the files do not depend on `workers`.

    Records of two fields (prompt, response) get a uint8 loss mask of the same shape at `prefix`.loss.bin/.idx.

    Args:
        records: fields of each document.
        prefix: where to write.
        tokenizer: named tokenizer; worker processes load it again by its name.
        workers: processes that tokenise; 1: this one.
        append_eos: end every document with the tokenizer's end token.
        report: progress.

    Returns:
        [documents] uint64 content hashes.

    Raises:
        DataError: no documents, unreadable input, or a worker that died.
    """
    # Megatron takes seconds to import, and worker processes import this module without needing it.
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from mka_megatron.data.corpus import LOSS_SUFFIX

    tokens = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    masks = None
    hashes = []
    for encoded in _encoded(records, tokenizer, workers, append_eos):
        _append(tokens, encoded.ids, encoded.lengths)
        if encoded.loss is not None:
            if masks is None:
                masks = IndexedDatasetBuilder(prefix + LOSS_SUFFIX + ".bin", dtype=np.uint8)
            _append(masks, encoded.loss, encoded.lengths)
        hashes.append(encoded.hashes)
        if report is not None:
            report(len(encoded.lengths), encoded.characters)
    tokens.finalize(prefix + ".idx")
    if masks is not None:
        masks.finalize(prefix + LOSS_SUFFIX + ".idx")
    return np.concatenate(hashes) if hashes else np.empty(0, np.uint64)


def _append(builder: IndexedDatasetBuilder, values: np.ndarray, lengths: np.ndarray) -> None:
    for document in np.split(values, np.cumsum(lengths)[:-1]):
        builder.add_document(document, [len(document)])


def _encoded(
    records: Iterable[Record], tokenizer: Tokenizer, workers: int, append_eos: bool
) -> Iterator[Encoded]:
    """The batches of `records`, tokenised, in order; only a few of them are in memory at a time."""
    if workers == 1:
        for batch in _batches(records):
            yield encode(batch, tokenizer, append_eos)
        return
    # Not fork: the caller may run threads (Gloo, CUDA, a tokenizer's own).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.name, append_eos))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in _batches(records):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "data.workers: a tokenising process died, perhaps for lack of memory; use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += sum(map(len, record))
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker: tuple[Tokenizer, bool] | None = None


def _start_worker(name: str, append_eos: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process of a job; it is for the training
    global _worker
    _worker = load_tokenizer(name), append_eos


def _work(batch: list[Record]) -> Encoded:
    assert _worker is not None
    return encode(batch, *_worker)
