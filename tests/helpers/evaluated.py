"""What evaluations are tried on: a tiny model of transformers, a language model that counts, and stand-ins for RULER's files."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from mka_megatron.data.tokenizer import train_bpe
from mka_megatron.evaluation.passkey import LINE, QUESTION, TASK
from mka_megatron.evaluation.ruler import tasks

POSITIONS = 2048
_WORDS = (
    "the of startups ideas work people make good things money users company founders think problem write code hackers painters"
).split()


def tiny_directory(directory: Path) -> str:
    """A random Qwen2 with a tokenizer that knows the benchmarks' own words."""
    directory.mkdir()
    texts = [TASK, LINE.format(key=1), QUESTION, tasks.NOISE, tasks.VARIABLES, tasks.NIAH, tasks.FREQUENT_WORDS]
    train_bpe(texts * 2, 768, str(directory))
    config = Qwen2Config(
        vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return str(directory)


class Counting:
    """Knows that token t + 1 follows token t: probability 1/2, and the other half for all together, of `size` tokens."""

    def __init__(self, size: int, positions: int = 10**6) -> None:
        self.size, self.positions, self.rows = size, positions, list[list[int]]()

    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        self.rows += [list(row) for row in rows]
        assert all(2 <= len(row) <= self.positions + 1 for row in rows)
        return [
            torch.tensor([math.log(2) if b == a + 1 else math.log(2 * self.size) for a, b in pairwise(row)],
                         dtype=torch.float64) for row in rows
        ]  # fmt: skip

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        self.rows += [list(prompt) for prompt in prompts]
        return [[prompt[-1] + 1 + i for i in range(max_new_tokens)] for prompt in prompts]


class Characters:
    """Every character is a token."""

    name, vocab_size, eos_id, fingerprint = "characters", 0x110000, 0, "characters"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(char) for char in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def write_ruler_files(directory: Path) -> Path:
    """Essays, questions and words of the same shape as RULER's, always the same."""
    directory.mkdir(exist_ok=True)
    rng = Random(7)  # noqa: S311

    def words(count: int) -> str:
        return " ".join(rng.choices(_WORDS, k=count))

    lines = [words(rng.randint(4, 14)).capitalize() + rng.choice(".?!") for _ in range(400)]
    essays = {"text": "\n\n".join(" ".join(lines[i : i + 8]) for i in range(0, 400, 8))}
    squad = {"data": [
        {"title": f"t{a}", "paragraphs": [{"context": f"Paragraph {a}.{p}: {words(20)}", "qas": [
            {"question": f"q {a} {p} {q}?", "is_impossible": q == 2,
             "answers": [] if q == 2 else [{"text": f"ans {a}{p}{q}"}, {"text": "other"}]} for q in range(3)
        ]} for p in range(4)]} for a in range(12)
    ]}  # fmt: skip
    hotpot = [{"question": f"hq {i}?", "answer": f"ha {i}",
               "context": [[f"Title {i} {k}", [f"{words(8)}.", " more."]] for k in range(10)]} for i in range(8)]  # fmt: skip
    english = {str(i): f"word{i}" for i in range(30000)}
    for name, content in (("PaulGrahamEssays", essays), ("squad", squad), ("hotpotqa", hotpot), ("english_words", english)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


class Plain:
    """A model of transformers asked in the plainest way: whole rows one by one, without a cache."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.model, self.positions = model, model.config.max_position_embeddings

    @torch.no_grad()
    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        logits = [self.model(torch.tensor([row]), use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows]
        return [-each[range(len(row) - 1), row[1:]] for each, row in zip(logits, rows, strict=True)]

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        continued = []
        for prompt in prompts:
            new: list[int] = []
            while len(new) < max_new_tokens:
                logits = self.model(torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1]
                if len(new) < at_least:
                    logits[list(stop)] = -math.inf
                if (token := int(logits.argmax())) in stop:
                    break
                new.append(token)
            continued.append(new)
        return continued
