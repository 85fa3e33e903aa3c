"""What the README's commands take for granted, in small: `DIR`, a Hugging Face model with random weights and its tokenizer,
`corpus.jsonl` and `question.txt`, made in the current directory.

    python tests/newcomer/material.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path


def main() -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    rng = random.Random(0)  # noqa: S311
    words = ["memory", "gate", "chunk", "the", "a", "recalls", "forgets", "window", "of", "past", "token", "and"]
    documents = [" ".join(rng.choice(words) for _ in range(200)) for _ in range(400)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    Path("question.txt").write_text("the gate recalls a chunk of the past and")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    english = [path.read_text(encoding="utf-8") for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]]
    tokenizer.train_from_iterator([*documents, *english], trainer)  # of so many entries that RULER's fixed budgets suffice
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("DIR")  # noqa: S106

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=4224, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                 max_position_embeddings=8192, eos_token_id=0, bos_token_id=None)).save_pretrained("DIR")  # fmt: skip


if __name__ == "__main__":
    main()
