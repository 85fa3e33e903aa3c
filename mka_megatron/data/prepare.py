"""Sources -> tokenised, cached, memory-mapped corpora, with a fixed held-out split.

Cache layout: cache_dir/tokenizers/<key>/ (a Hugging Face tokenizer directory) and cache_dir/datasets/<key>/
(tokens.bin, tokens.idx, hashes.npy, about.json, and tokens.loss.* for sft). A key is a hash of everything the
content depends on, so nothing in the cache is ever stale, and a directory is complete if it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mka_megatron.config.schema import DataConfig, SourceConfig
from mka_megatron.data.batch import DataError
from mka_megatron.data.cache import publish
from mka_megatron.data.corpus import Corpus, open_corpus
from mka_megatron.data.encode import Report, content_hash, write_dataset
from mka_megatron.data.shuffle import uniform
from mka_megatron.data.sources import Source, document_fields, open_source
from mka_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

_VERSION = 1  # of what the cache holds
_TOKENIZER_SAMPLE = 64 << 20  # characters of training text that the BPE is trained on
_WORTH_WORKERS = 4 << 20  # bytes below which starting processes takes longer than tokenising


@dataclass(frozen=True)
class Prepared:
    """Everything the loader needs."""

    tokenizer: Tokenizer | None
    """None where all sources are tokenised already and data.tokenizer is null."""
    vocab_size: int
    """Ids are below this: model.vocab_size if given, else the tokenizer's."""
    train: tuple[Corpus, ...]
    """One per data.train entry."""
    weights: tuple[float, ...]
    """Of the training corpora."""
    valid: tuple[Corpus, ...]
    """Explicit validation sources, or what is held out of each training source (none where nothing is)."""


def prepare(
    data: DataConfig,
    *,
    vocab_size: int | None = None,
    progress: bool = True,
    note: Callable[[str], None] = lambda doing: None,
) -> Prepared:
    """Open the data of a run, tokenising what the cache does not hold yet.

    Call it on every rank: one process does the work under a file lock while the others wait.

    Args:
        data: the configuration.
        vocab_size: model.vocab_size; null: the tokenizer's.
        progress: show a bar on stderr.
        note: told what is being read, again and again while that gets on.

    Raises:
        DataError: a source, tokenizer or the cache cannot be used; the message names it and the fix.
    """
    train = [open_source(source, f"data.train[{i}].path") for i, source in enumerate(data.train)]
    valid = [open_source(source, f"data.valid[{i}].path") for i, source in enumerate(data.valid)]
    if not train:
        raise DataError("data.train: there are no sources; name at least one")
    fraction = 0.0 if valid else data.valid_fraction
    if not 0 <= fraction < 1:
        raise DataError(
            f"data.valid_fraction: {fraction} is not in [0, 1); give the share of documents to hold out"
        )
    raw = any(source.prefix is None for source in train + valid)
    tokenizer = _tokenizer(data, train, fraction, progress, note) if raw or data.tokenizer else None
    size = vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if size is None:
        raise DataError("data.tokenizer: null, and the sources are tokenised already; name their tokenizer")
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise DataError(
            f"model.vocab_size: {size} is less than the {tokenizer.vocab_size} entries of tokenizer "
            f"'{tokenizer.name}'; set it to null or at least that"
        )

    def opened(source: Source, entry: SourceConfig) -> tuple[Corpus, np.ndarray]:
        return _open(source, entry, data, tokenizer, size, progress, note)

    parts = [opened(source, entry) for source, entry in zip(train, data.train, strict=True)]
    corpora = [corpus for corpus, _ in parts]
    weights = tuple(entry.weight for entry in data.train)
    if valid:
        held = tuple(opened(source, entry)[0] for source, entry in zip(valid, data.valid, strict=True))
        return Prepared(tokenizer, size, tuple(corpora), weights, held)
    if not fraction:
        return Prepared(tokenizer, size, tuple(corpora), weights, ())
    out = held_out([hashes for _, hashes in parts], fraction)
    for i, (corpus, mask) in enumerate(zip(corpora, out, strict=True)):
        if not corpus.lengths[~mask].any():
            raise DataError(
                f"data.train[{i}].path: '{train[i].path}' has too few documents ({len(mask)}) to hold some out for "
                "validation; name validation files in data.valid or set data.valid_fraction to 0"
            )
    return Prepared(
        tokenizer,
        size,
        tuple(corpus.select(~mask) for corpus, mask in zip(corpora, out, strict=True)),
        weights,
        tuple(
            corpus.select(mask)
            for corpus, mask in zip(corpora, out, strict=True)
            if corpus.lengths[mask].any()
        ),
    )


def held_out(hashes: Sequence[np.ndarray], fraction: float) -> list[np.ndarray]:
    """[documents] bool per source: hash below `fraction` of its range, or the least one where none is.

    A document's side depends on its text only: not on its place, the other documents or the worker count
    (the least-hash rule aside, which lets a corpus of a few documents have a validation set at all).
    """
    bound = np.uint64(int(fraction * 2**64))
    out = [values < bound for values in hashes]
    if not any(mask.any() for mask in out):
        least = min(values.min() for values in hashes)
        out = [values == least for values in hashes]
    return out


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_VERSION, *parts]).encode()).hexdigest()[:20]


def _tokenizer(
    data: DataConfig, train: Sequence[Source], fraction: float, progress: bool, note: Callable[[str], None]
) -> Tokenizer:
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer)
    texts = [
        (source, document_fields(data.format, entry.text_key))
        for source, entry in zip(train, data.train, strict=True)
        if source.prefix is None
    ]
    if not texts:
        raise DataError(
            "data.tokenizer: null, and data.train holds no text to train one on; name a tokenizer"
        )
    prints = [(source.fingerprint, keys) for source, keys in texts]
    final = Path(data.cache_dir) / "tokenizers" / _key(prints, fraction, data.tokenizer_vocab_size)

    def build(directory: Path) -> None:
        note("the reading of text for the tokenizer")
        records = [r for source, keys in texts for r in _head(source, keys, _TOKENIZER_SAMPLE // len(texts))]
        note("the training of the tokenizer")
        if not records:
            raise DataError(f"data.train: '{texts[0][0].path}' holds no text; name files with text in them")
        if fraction:
            out = held_out([np.array([content_hash(record) for record in records], np.uint64)], fraction)[0]
            records = [record for record, held in zip(records, out, strict=True) if not held]
        with _bar("training the tokenizer", None, progress):
            train_bpe(
                (text for record in records for text in record), data.tokenizer_vocab_size, str(directory)
            )

    publish(final, build, lambda: note(f"the wait for another process that prepares {final}"))
    return load_tokenizer(str(final))


def _head(source: Source, keys: Sequence[str], characters: int) -> Iterator[tuple[str, ...]]:
    for record in source.sample(keys):
        if characters <= 0:
            return
        characters -= sum(map(len, record))
        yield record


def _open(
    source: Source,
    entry: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    progress: bool,
    note: Callable[[str], None],
) -> tuple[Corpus, np.ndarray]:
    """A source's corpus and the uint64 hash of each of its documents."""
    sft = data.format == "sft"
    if source.prefix is not None:
        corpus = open_corpus(source.prefix, vocab_size, loss=sft)
        # Reading a large dataset only to split it would take hours: its documents are known by number.
        return corpus, uniform(len(corpus.lengths), "indexed", Path(source.prefix).name)
    assert tokenizer is not None
    keys = document_fields(data.format, entry.text_key)
    final = Path(data.cache_dir) / "datasets" / _key(source.fingerprint, keys, tokenizer.fingerprint)

    def build(directory: Path) -> None:
        workers = data.workers if source.size > _WORTH_WORKERS else 1
        doing = f"the tokenising of {source.path}"
        note(doing)
        with _bar(f"tokenising {source.path}", source.size, progress) as bar:

            def report(documents: int, characters: int) -> None:
                note(doing)
                bar(documents, characters)

            hashes = write_dataset(
                source.records(keys), str(directory / "tokens"), tokenizer, workers=workers, report=report
            )
        if not len(hashes):
            raise DataError(f"{source.path}: holds no documents; name files with text in them")
        np.save(directory / "hashes.npy", hashes, allow_pickle=False)
        about = {"source": source.path, "tokenizer": tokenizer.name, "documents": len(hashes), "fields": keys}
        (directory / "about.json").write_text(json.dumps(about, indent=1) + "\n")

    publish(final, build, lambda: note(f"the wait for another process that prepares {final}"))
    try:
        corpus = open_corpus(str(final / "tokens"), vocab_size, loss=sft)
        hashes = np.load(final / "hashes.npy", allow_pickle=False)
        if hashes.dtype != np.uint64 or hashes.shape != corpus.lengths.shape:
            raise ValueError("as many hashes as documents are expected")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError) and "token id" in str(error):
            raise
        raise DataError(f"data.cache_dir: {final} is damaged ({error}); delete that directory") from None
    return corpus, hashes


@contextlib.contextmanager
def _bar(title: str, size: int | None, progress: bool) -> Iterator[Report]:
    with tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=not progress, leave=False) as bar:

        def report(documents: int, characters: int) -> None:
            bar.update(characters)

        yield report
