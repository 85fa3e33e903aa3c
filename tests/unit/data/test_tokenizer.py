"""Round trips, determinism and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mka_megatron.data.batch import DataError
from mka_megatron.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from tests.helpers import tokenizers

SOURCE = Path(__file__).read_text()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe([SOURCE] * 4, 600, str(directory))
    return load_tokenizer(str(directory))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_from_the_trained_bpe(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode([text])[0]
    assert bpe.decode(ids) == text or END_OF_TEXT in text
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_the_trained_bpe_is_a_hugging_face_tokenizer(bpe: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(bpe.name)
    assert theirs(SOURCE)["input_ids"] == bpe.encode([SOURCE])[0]
    assert (theirs.eos_token_id, len(theirs)) == (bpe.eos_id, 600) and bpe.vocab_size == 600
    assert bpe.decode([bpe.eos_id]) == END_OF_TEXT
    assert len(bpe.encode([SOURCE])[0]) < len(SOURCE) / 2, "it learned merges"


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train_bpe(iter(texts), 1000, str(tmp_path / name))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "a")).fingerprint == load_tokenizer(str(tmp_path / "b")).fingerprint
    train_bpe(iter(texts), 999, str(tmp_path / "b"))
    assert load_tokenizer(str(tmp_path / "a")).fingerprint != load_tokenizer(str(tmp_path / "b")).fingerprint


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size: 256"):
        train_bpe(["x"], 256, str(tmp_path))


def test_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    path = tokenizers.sentencepiece_model(tmp_path / "t.model")
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=path)
    for text in (*tokenizers.TEXT, "unseen ζ"):
        assert ours.encode([text]) == [theirs.encode(text)]
        assert ours.decode(ours.encode([text])[0]) == text
    assert (ours.eos_id, ours.vocab_size) == (2, 320)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    def refused(name: Path | str, message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(str(name))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "no.model", "no SentencePiece model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    refused(tmp_path / "bad.model", r"bad\.model")
    refused(tokenizers.sentencepiece_model(tmp_path / "endless.model", eos=False), "no end-of-text piece")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no Hugging Face tokenizer")
    refused(tokenizers.words(tmp_path / "words", ["a"], eos=None), "no end-of-text token")


def test_hugging_face_adds_nothing_and_counts_added_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizers.words(tmp_path / "w", ["zero", "one", "two"]))
    assert tokenizer.encode(["one two one", "two"]) == [[1, 2, 1], [2]]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (3, 4)


def test_a_directory_of_ours_is_read_without_a_warning_about_its_model(tmp_path: Path, capfd) -> None:
    path = tokenizers.words(tmp_path / "w", ["zero", "one"])
    (tmp_path / "w/config.json").write_text('{"model_type": "mka_qwen2"}')
    assert load_tokenizer(path).encode(["one"]) == [[1]]
    assert "mka_qwen2" not in capfd.readouterr().err
