"""Tiny tokenizers of each kind, trained where they are needed."""

from __future__ import annotations

import io
from pathlib import Path

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "def f(x): return x + 1"]


def sentencepiece_model(path: Path, eos: bool = True) -> str:
    """A SentencePiece .model with byte fallback at `path`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT * 20), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        eos_id=2 if eos else -1, minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def words(directory: Path, vocabulary: list[str], eos: str | None = "<eos>") -> str:
    """A Hugging Face tokenizer that gives word i of `vocabulary` the id i, and puts word 0 before a whole text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{vocabulary[0]} $A", special_tokens=[(vocabulary[0], 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(directory)
    return str(directory)
