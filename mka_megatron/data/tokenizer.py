"""Tokenizers behind one small interface: Hugging Face, SentencePiece, or a byte-level BPE trained here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mka_megatron.data.batch import DataError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text <-> ids."""

    name: str
    """What `load_tokenizer` loads it from."""
    vocab_size: int
    """Largest id + 1 (the model pads its embedding by itself)."""
    eos_id: int
    """Ends every document."""
    fingerprint: str
    """Changes with anything that changes the ids."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A `transformers` tokenizer from a directory or a name; code of a repository is never run."""

    def __init__(self, name: str, field: str = "data.tokenizer") -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_config(name))
        except Exception as error:  # transformers raises errors of many libraries here
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{field}: '{name}' is no Hugging Face tokenizer directory or name that can be loaded ({reason}), "
                "nor a SentencePiece .model; correct it"
            ) from None
        if self._tokenizer.eos_token_id is None:
            raise DataError(
                f"{field}: '{name}' has no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        self.name = name
        self.eos_id: int = self._tokenizer.eos_token_id
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size: int = max(len(self._tokenizer), max(vocabulary.values()) + 1)
        rules = self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else ""
        described = json.dumps(
            [type(self._tokenizer).__name__, self.eos_id, sorted(vocabulary.items()), rules]
        )
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _config(name: str) -> dict[str, Any]:
    """What keeps transformers from a warning about our own model types, which a tokenizer has nothing to do with."""
    from transformers import PreTrainedConfig

    try:
        kind = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"config": PreTrainedConfig()} if str(kind).startswith("mka_") else {}


class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    def __init__(self, path: str, field: str = "data.tokenizer") -> None:
        import sentencepiece

        if not os.path.isfile(path):
            raise DataError(f"{field}: there is no SentencePiece model '{path}'; correct the path")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromFile(path)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{field}: '{path}' is no SentencePiece model ({reason}); copy it again"
            ) from None
        if self._model.eos_id() < 0:
            raise DataError(f"{field}: '{path}' has no end-of-text piece; train it with an eos_id")
        self.name = path
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.vocab_size()
        with open(path, "rb") as stream:
            self.fingerprint = hashlib.sha256(stream.read()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return [self._model.EncodeAsIds(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._model.DecodeIds(list(ids))


def load_tokenizer(name: str, field: str = "data.tokenizer") -> Tokenizer:
    """SentencePiece where `name` ends in .model, else Hugging Face.

    Raises DataError, naming `field`, where it cannot be loaded or has no end-of-text token.
    """
    return (
        SentencePieceTokenizer(name, field) if name.endswith(".model") else HuggingFaceTokenizer(name, field)
    )


def train_bpe(texts: Iterable[str], vocab_size: int, directory: str) -> None:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer directory; equal texts, equal files.

    Args:
        texts: training text, in any number of pieces.
        vocab_size: entries, at least 257: the bytes and END_OF_TEXT (id 0), then merges.
        directory: an existing directory.

    Raises:
        DataError: vocab_size is too small.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise DataError(
            f"data.tokenizer_vocab_size: {vocab_size} is less than the {len(alphabet) + 1} of bytes alone"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(directory)
