"""Texts to score: whatever data.train may name, or the embedded corpus's held-out files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mka_megatron.config.schema import SourceConfig
from mka_megatron.data.batch import DataError
from mka_megatron.data.encode import content_hash
from mka_megatron.data.prepare import held_out
from mka_megatron.data.readers import JSON_LINES, PARQUET
from mka_megatron.data.sources import open_source
from mka_megatron.evaluation.perplexity import Document

EMBEDDED = "stdlib"
_LARGEST = 1 << 30


def documents(path: str | None, text_key: str, valid_fraction: float) -> tuple[str, Iterator[Document]]:
    """What identifies the texts, and the texts, in a fixed order.

    Args:
        path: a source as data.train names it, but that a text file is one document; None: of Python's sources the files
            that training with this `valid_fraction` holds out.
        text_key: field of JSONL, Parquet and Hugging Face data.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    source = open_source(SourceConfig(path or EMBEDDED), "--text")
    if source.prefix is not None:
        raise DataError(f"--text {path} holds token ids of some tokenizer: name the texts that they were made of.")
    if path is not None and Path(path).is_file() and not path.lower().endswith((*JSON_LINES, *PARQUET)):
        return source.fingerprint, iter([Document(Path(path).name, _whole(Path(path)))])
    texts = (text for (text,) in source.records((text_key,)))
    if path is not None:
        return source.fingerprint, (Document(f"{number}", text) for number, text in enumerate(texts))
    known = list(texts)
    [mask] = held_out([np.array([content_hash((text,)) for text in known], np.uint64)], valid_fraction)
    chosen = [text for text, held in zip(known, mask, strict=True) if held]
    fingerprint = hashlib.sha256("\0".join(chosen).encode()).hexdigest()
    return fingerprint, (Document(f"{number}", text) for number, text in enumerate(chosen))


def _whole(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise DataError(f"--text {path} has more than {_LARGEST >> 30} GiB: cut it into several files.")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"--text {path} is not UTF-8 text ({error.reason}): convert it.") from None
    except OSError as error:
        raise DataError(f"--text {path}: {error.strerror or error}; make it readable.") from None
