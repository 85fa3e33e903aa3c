"""From sources to corpora: what is stored, reused, held out and refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mka_megatron.config.schema import DataConfig, SourceConfig
from mka_megatron.data import prepare as module
from mka_megatron.data.batch import IGNORE, DataError
from mka_megatron.data.corpus import Corpus
from mka_megatron.data.encode import write_dataset
from mka_megatron.data.loader import train_batches
from mka_megatron.data.prepare import Prepared, held_out, prepare
from mka_megatron.data.tokenizer import load_tokenizer, train_bpe
from tests.helpers import corpora, tokenizers

DOCUMENTS = [f"document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(60)) + "\n" for i in range(200)]


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def config(tmp_path: Path, *paths: object, **options: object) -> DataConfig:
    sources = tuple(SourceConfig(str(path)) for path in paths)
    defaults = {"valid_fraction": 0.1, "tokenizer_vocab_size": 300, "cache_dir": str(tmp_path / "cache"), "workers": 1}
    return DataConfig(train=sources, **(defaults | options))  # type: ignore[arg-type]


def decoded(prepared: Prepared, corpora: tuple[Corpus, ...]) -> list[str]:
    end = prepared.tokenizer.eos_id
    documents = []
    for corpus in corpora:
        for d, n in enumerate(corpus.lengths):
            ids = corpus.read(d, 0, int(n))
            assert ids[-1] == end and end not in ids[:-1]
            documents.append(prepared.tokenizer.decode(ids[:-1]))
    return documents


def test_every_document_is_on_one_side_and_megatron_reads_the_files(tmp_path: Path) -> None:
    prepared = prepare(config(tmp_path, jsonl(tmp_path / "x.jsonl", DOCUMENTS)), progress=False)
    train, valid = decoded(prepared, prepared.train), decoded(prepared, prepared.valid)
    assert sorted(train + valid) == sorted(DOCUMENTS)
    assert 5 <= len(valid) <= 40
    (prefix,) = tmp_path.glob("cache/datasets/*/tokens.idx")
    theirs = IndexedDataset(str(prefix.with_suffix("")))
    assert theirs.index.dtype == np.uint16
    assert [prepared.tokenizer.decode(theirs[i][:-1]) for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


def test_the_split_depends_on_the_text_only(tmp_path: Path) -> None:
    def held(documents: list[str], **options: object) -> set[str]:
        prepared = prepare(config(tmp_path, jsonl(tmp_path / "x.jsonl", documents), **options), progress=False)
        return set(decoded(prepared, prepared.valid))

    reference = held(DOCUMENTS)
    assert held(DOCUMENTS[::-1]) == reference
    assert held(DOCUMENTS[:100]) == reference & set(DOCUMENTS[:100])
    assert held(DOCUMENTS, valid_fraction=0.3) > reference
    tokenizer = tokenizers.sentencepiece_model(tmp_path / "t.model")
    again = prepare(config(tmp_path, tmp_path / "x.jsonl", tokenizer=tokenizer), progress=False)
    assert len(again.valid[0].lengths) == len(reference)


def test_the_tokenizer_never_sees_held_out_documents(tmp_path: Path) -> None:
    prepared = prepare(config(tmp_path, jsonl(tmp_path / "x.jsonl", DOCUMENTS), tokenizer_vocab_size=500), progress=False)
    held = set(decoded(prepared, prepared.valid))
    for name, documents in (("train", [d for d in DOCUMENTS if d not in held]), ("all", DOCUMENTS)):
        (tmp_path / name).mkdir()
        train_bpe(documents, 500, str(tmp_path / name))
    used = load_tokenizer(str(tmp_path / "train")).fingerprint
    assert prepared.tokenizer.fingerprint == used != load_tokenizer(str(tmp_path / "all")).fingerprint


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizers.sentencepiece_model(tmp_path / "t.model"))
    records = [(text * (1 + i % 50),) for i, text in enumerate(DOCUMENTS)]
    written, hashes = [], []
    for workers in (1, 2, 3):
        prefix = str(tmp_path / f"w{workers}")
        hashes.append(write_dataset(iter(records), prefix, tokenizer, workers=workers))
        written.append(Path(prefix + ".bin").read_bytes() + Path(prefix + ".idx").read_bytes())
    assert written[0] == written[1] == written[2]
    assert all(np.array_equal(hashes[0], other) for other in hashes)
    expected = [tokenizer.encode([text])[0] + [tokenizer.eos_id] for (text,) in records]
    theirs = IndexedDataset(str(tmp_path / "w2"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected


def test_a_worker_that_dies_is_a_sentence(tmp_path: Path) -> None:
    class Fatal(str):
        def __reduce__(self) -> tuple:
            import os

            return os._exit, (9,)

    tokenizer = load_tokenizer(tokenizers.sentencepiece_model(tmp_path / "t.model"))
    with pytest.raises(DataError, match=r"data\.workers: a tokenising process died"):
        write_dataset([(Fatal("x"),)], str(tmp_path / "x"), tokenizer, workers=2)


def signalled(text: str) -> str:
    signal.raise_signal(signal.SIGUSR1)
    return text


class Signalled(str):
    def __reduce__(self) -> tuple:
        return signalled, (str(self),)


def test_a_warning_to_all_processes_of_a_job_ends_no_worker(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizers.sentencepiece_model(tmp_path / "t.model"))
    assert len(write_dataset([(Signalled("x"),)], str(tmp_path / "x"), tokenizer, workers=2)) == 1


def test_a_second_start_reuses_and_a_changed_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    first = prepare(config(tmp_path, path), progress=False)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module, "write_dataset", never)
    monkeypatch.setattr(module, "train_bpe", never)
    again = prepare(config(tmp_path, path), progress=False)
    assert decoded(again, again.valid) == decoded(first, first.valid)
    monkeypatch.undo()
    jsonl(path, DOCUMENTS[:150])
    changed = prepare(config(tmp_path, path), progress=False)
    assert sum(len(c.lengths) for c in changed.train + changed.valid) == 150


def test_explicit_validation_sources_leave_the_training_documents_alone(tmp_path: Path) -> None:
    train, valid = jsonl(tmp_path / "t.jsonl", DOCUMENTS), jsonl(tmp_path / "v.jsonl", DOCUMENTS[:3])
    prepared = prepare(config(tmp_path, train, valid=(SourceConfig(str(valid)),)), progress=False)
    assert decoded(prepared, prepared.train) == DOCUMENTS
    assert decoded(prepared, prepared.valid) == DOCUMENTS[:3]


def test_a_few_documents_still_hold_one_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", DOCUMENTS[:5])
    prepared = prepare(config(tmp_path, path, valid_fraction=1e-9), progress=False)
    (held,) = decoded(prepared, prepared.valid)
    assert sorted([held, *decoded(prepared, prepared.train)]) == sorted(DOCUMENTS[:5])
    jsonl(path, DOCUMENTS[4::-1])
    again = prepare(config(tmp_path, path, valid_fraction=1e-9), progress=False)
    assert decoded(again, again.valid) == [held]
    with pytest.raises(DataError, match=r"too few documents \(1\).*data\.valid"):
        prepare(config(tmp_path, jsonl(path, DOCUMENTS[:1])), progress=False)


def test_held_out_shares_follow_the_fraction() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64 - 1, 100_000, dtype=np.uint64)
    assert abs(held_out([hashes], 0.02)[0].mean() - 0.02) < 0.002


def test_megatron_prefixes_need_no_tokenizer(tmp_path: Path) -> None:
    prefix = corpora.write(tmp_path / "x", [[i, i + 1, i + 2] for i in range(300)])
    prepared = prepare(config(tmp_path, prefix), vocab_size=400, progress=False)
    assert prepared.tokenizer is None and prepared.vocab_size == 400
    counts = len(prepared.train[0].lengths), len(prepared.valid[0].lengths)
    assert sum(counts) == 300 and 10 < counts[1] < 60
    firsts = {int(c.read(d, 0, 1)[0]) for c in prepared.train + prepared.valid for d in range(len(c.lengths))}
    assert firsts == set(range(300))
    with pytest.raises(DataError, match=r"data\.tokenizer: null, and the sources are tokenised already"):
        prepare(config(tmp_path, prefix), progress=False)
    with pytest.raises(DataError, match="token id"):
        prepare(config(tmp_path, prefix), vocab_size=200, progress=False)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size: 299 is less than the 300"):
        prepare(config(tmp_path, jsonl(tmp_path / "x.jsonl", DOCUMENTS)), vocab_size=299, progress=False)


def test_fine_tuning_labels_are_the_response_and_the_end(tmp_path: Path) -> None:
    name = tokenizers.words(tmp_path / "w", ["?", *(f"p{i}" for i in range(50)), *(f"r{i}" for i in range(50))])
    records = [{"prompt": " ".join(f"p{j}" for j in range(i % 7)) or "p0", "response": " ".join(f"r{j}" for j in range(1 + i % 5))}
               for i in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = config(tmp_path, tmp_path / "x.jsonl", format="sft", tokenizer=name, sequence_length=16)
    prepared = prepare(data, progress=False)
    end = prepared.tokenizer.eos_id
    rows = train_batches(
        prepared.train, prepared.weights, data, chunk_size=4, seed=0, consumed_samples=0, global_batch_size=4,
        micro_batch_size=4, dp_rank=0, dp_size=1,
    )
    labels = 0
    with rows:
        for _ in range(5):
            (batch,) = next(rows)
            for row, begin, stop in batch.documents.spans:
                words = prepared.tokenizer.decode(batch.tokens[row, begin:stop]).split()
                prompt = sum(word.startswith("p") for word in words)
                assert batch.tokens[row, stop - 1] == end, "whole samples only"
                expected = [IGNORE] * (prompt - 1) + batch.tokens[row, begin + prompt : stop].tolist() + [IGNORE]
                assert batch.labels[row, begin:stop].tolist() == expected
                labels += stop - begin - prompt
    assert labels > 50
    assert (tmp_path / "x.jsonl").exists()
    with pytest.raises(DataError, match="field 'response' is missing"):
        (tmp_path / "x.jsonl").write_text('{"prompt": "p1"}\n')
        prepare(data, progress=False)


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    data = config(tmp_path, jsonl(tmp_path / "x.jsonl", DOCUMENTS))
    prepare(data, progress=False)
    (directory,) = tmp_path.glob("cache/datasets/*/")
    for file in ("tokens.bin", "tokens.idx", "hashes.npy"):
        whole = (directory / file).read_bytes()
        (directory / file).write_bytes(whole[:-3])
        with pytest.raises(DataError, match=f"{directory.name} is damaged .*; delete that directory") as caught:
            prepare(data, progress=False)
        assert "\n" not in str(caught.value)
        (directory / file).write_bytes(whole)
    shutil.rmtree(directory)
    prepare(data, progress=False)


def test_empty_and_unreadable_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"x\.jsonl' holds no text"):
        prepare(config(tmp_path, tmp_path / "x.jsonl"), progress=False)
    with pytest.raises(DataError, match=r"x\.jsonl: holds no documents"):
        prepare(config(tmp_path, tmp_path / "x.jsonl", tokenizer=tokenizers.sentencepiece_model(tmp_path / "t.model")), progress=False)
    good = config(tmp_path, jsonl(tmp_path / "y.jsonl", DOCUMENTS))
    with pytest.raises(DataError, match=r"data\.valid\[0\]\.path: '/no'"):
        prepare(replace(good, valid=(SourceConfig("/no"),)), progress=False)
    assert not list(tmp_path.glob("cache/*/.*.tmp-*"))
