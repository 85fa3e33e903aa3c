"""tools/preprocess_data.py: its files are Megatron's, and sources of a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mka_megatron.config.schema import DataConfig, SourceConfig
from mka_megatron.data.prepare import prepare
from mka_megatron.data.tokenizer import load_tokenizer
from tests.helpers import tokenizers

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools/preprocess_data.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

WORDS = ["?", "a", "b", "c", "d"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    records = [{"text": "a b", "title": "c"}, {"text": "b b c", "title": "d d"}, {"text": "d", "title": "a"}] * 4
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "x.jsonl"


def run(*arguments: object) -> int:
    return tool.main([str(argument) for argument in arguments])


def stored(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_one_dataset_per_key_as_megatron_names_them(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    name = tokenizers.words(tmp_path / "w", WORDS)
    common = ("--input", corpus, "--tokenizer-model", name, "--json-keys", "text", "title", "--workers", 1)
    assert run(*common, "--output-prefix", tmp_path / "out/o", "--append-eod", "--log-interval", 4) == 0
    assert stored(tmp_path / "out/o_text_document") == [[1, 2, 5], [2, 2, 3, 5], [4, 5]] * 4
    assert stored(tmp_path / "out/o_title_document") == [[3, 5], [4, 4, 5], [1, 5]] * 4
    assert "processed 12 documents" in capsys.readouterr().out
    assert run(*common, "--output-prefix", tmp_path / "out/bare") == 0
    assert stored(tmp_path / "out/bare_text_document") == [[1, 2], [2, 2, 3], [4]] * 4
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".bin"] * 4 + [".idx"] * 4
    data = DataConfig(train=(SourceConfig(str(tmp_path / "out/o_text_document")),), valid_fraction=0.2, tokenizer=name)
    prepared = prepare(data, progress=False)
    assert sum(len(c.lengths) for c in prepared.train + prepared.valid) == 12


def test_fine_tuning_data(tmp_path: Path) -> None:
    name = tokenizers.words(tmp_path / "w", WORDS)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a b", "response": "c"}\n{"prompt": "b", "response": "d d"}\n')
    assert run("--input", tmp_path / "x.jsonl", "--sft", "--tokenizer-model", name, "--workers", 1, "--output-prefix", tmp_path / "o") == 0
    assert stored(tmp_path / "o_sft_document") == [[1, 2, 3, 5], [2, 4, 4, 5]]
    assert stored(tmp_path / "o_sft_document.loss") == [[0, 0, 1, 1], [0, 1, 1, 1]]
    data = DataConfig(train=(SourceConfig(str(tmp_path / "o_sft_document")),), valid_fraction=0, tokenizer=name, format="sft")
    (train,) = prepare(data, progress=False).train
    assert train.read_loss(1, 0, 4).tolist() == [False, True, True, True]


def test_other_tokenizers(tmp_path: Path, corpus: Path) -> None:
    model = tokenizers.sentencepiece_model(tmp_path / "t.model")
    assert run("--input", corpus, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", 1,
               "--output-prefix", tmp_path / "sp") == 0
    assert stored(tmp_path / "sp_text_document")[0] == load_tokenizer(model).encode(["a b"])[0]
    assert run("--input", corpus, "--tokenizer-type", "ByteLevelBPE", "--vocab-size", 300, "--append-eod", "--workers", 1,
               "--output-prefix", tmp_path / "bpe") == 0
    bpe = load_tokenizer(str(tmp_path / "bpe_tokenizer"))
    assert bpe.decode(stored(tmp_path / "bpe_text_document")[1]) == "b b c<|endoftext|>"


def test_errors_are_one_line_and_leave_no_files(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    name = tokenizers.words(tmp_path / "w", WORDS)
    before = sorted(tmp_path.iterdir())

    def refused(message: str, *arguments: object) -> None:
        assert run("--output-prefix", tmp_path / "o", "--workers", 1, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
        assert sorted(tmp_path.iterdir()) == before

    refused("--input: '/no' is no file", "--input", "/no", "--tokenizer-model", name)
    refused("--tokenizer-model: missing", "--input", corpus)
    refused("--tokenizer-model: '/no'", "--input", corpus, "--tokenizer-model", "/no")
    refused("x.jsonl:1: field 'body' is missing", "--input", corpus, "--tokenizer-model", name, "--json-keys", "body")
    refused("--vocab-size: 5 is less", "--input", corpus, "--tokenizer-model", name, "--vocab-size", 5)
    refused("give at least 1", "--input", corpus, "--tokenizer-model", name, "--log-interval", 0)
