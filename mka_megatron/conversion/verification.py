"""Do two directories hold the same function? Their logits on the same prompts, through transformers.

Shapes: S tokens of a prompt, V vocabulary entries.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.conversion import families

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1905 Albert Einstein published four papers that changed physics. The first of them",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Der Mond ist aufgegangen, die goldnen Sternlein prangen am Himmel hell und klar.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765",
)
RANDOM_LENGTH = 64
"""Tokens of each prompt drawn at random, for a model without a tokenizer."""
_ROWS = 64  # positions whose distributions are compared at a time


@dataclass(frozen=True)
class Parity:
    """How far the second model's logits are from the first's, over all positions of all prompts."""

    positions: int
    largest: float
    """Largest logit of the first model, by magnitude."""
    max_error: float
    """Largest difference of two logits."""
    mean_kl: float
    """KL divergence from the first to the second, in nats per position."""
    max_kl: float
    top1: float
    """Share of positions where both prefer the same token."""

    def within(self, tolerance: float) -> bool:
        """The largest difference is at most `tolerance` times the largest logit."""
        return self.max_error <= tolerance * self.largest


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Parity:
    """Logits [S, V] per prompt of two models. Raises ConfigError where shapes differ or a value is not finite."""
    positions, largest, error, kl, worst, agree = 0, 0.0, 0.0, 0.0, 0.0, 0
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one.shape != other.shape:
            raise ConfigError(f"prompt {index + 1} gives logits {list(one.shape)} and {list(other.shape)}; give two "
                              "directories of the same model.")
        for rows in range(0, len(one), _ROWS):
            a, b = (logits[rows : rows + _ROWS].double() for logits in (one, other))
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ConfigError(f"prompt {index + 1} gives logits that are not finite; use another --dtype.")
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            each = (log_a.exp() * (log_a - log_b)).sum(-1).clamp_min(0)
            positions += len(a)
            largest = max(largest, a.abs().max().item())
            error = max(error, (a - b).abs().max().item())
            kl += each.sum().item()
            worst = max(worst, each.max().item())
            agree += int((a.argmax(-1) == b.argmax(-1)).sum())
    return Parity(positions, largest, error, kl / positions, worst, agree / positions)


def prompts_of(directory: Path, texts: Sequence[str] | None, vocabulary: int, seed: int = 0) -> list[Tensor]:
    """Prompts as token ids [S]: `texts`, or the built-in ones, by the tokenizer of `directory`.

    Without a tokenizer, and without `texts`, tokens are drawn at random. Raises ConfigError.
    """
    tokenizer = _tokenizer(directory)
    if tokenizer is None:
        if texts is not None:
            raise ConfigError(f"{directory} has no tokenizer for the given prompts; leave them out to compare on random tokens.")
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocabulary, (RANDOM_LENGTH,), generator=generator) for _ in PROMPTS]
    found = [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in (PROMPTS if texts is None else texts)]
    if not all(map(len, found)):
        raise ConfigError("A prompt has no tokens; give one that is not empty.")
    return found


def logits_of(directory: Path, prompts: Sequence[Tensor], dtype: torch.dtype,
              exact: bool = False) -> list[Tensor]:
    """Logits [S, V] of every prompt [S], each by itself, from the model in `directory` on the CPU.

    Args:
        directory: a plain model, or one of ours where its classes are registered (`import mka_megatron.hf`).
        prompts: token ids.
        dtype: of the arithmetic.
        exact: a model of ours attends to the plain tokens only (:func:`exact_mode`).

    Raises:
        ConfigError: transformers cannot load it, or tensors are missing or too many.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    plain_only = False
    try:
        config = AutoConfig.from_pretrained(directory)
        if exact:
            plain_only = exact_mode(config, max(map(len, prompts)))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, low_cpu_mem_usage=True, output_loading_info=True
        )
    except Exception as error:  # whatever its classes raise
        raise ConfigError(f"{directory} cannot be loaded by transformers: {_first_line(error)}") from None
    model, info = loaded
    wrong = [*info["missing_keys"], *(n for n in info["unexpected_keys"] if not (plain_only and families.is_added(n)))]
    if wrong:
        raise ConfigError(f"{directory} and its model do not agree about the tensor {min(wrong)}; copy or convert it again.")
    with torch.no_grad():
        found = [model.eval()(input_ids=tokens[None], use_cache=False).logits[0].clone() for tokens in prompts]
    del model, loaded
    gc.collect()
    return found


def exact_mode(config: Any, longest: int) -> bool:
    """Set a model of ours so that only the plain tokens are attended to: a window over `longest` tokens, no L2 and L3.

    Then there is nothing to route, and the logits are the base model's whatever the route has learned.

    Returns:
        Whether it is one of ours; a plain model's configuration is left alone.
    """
    block = getattr(config, "mka", None)
    if block is None:
        return False
    memory = block["memory_hierarchy"]
    chunk = memory["l1"]["chunk_size"]
    if memory["l1"]["window"] is not None:
        memory["l1"]["window"] = math.ceil(longest / chunk) * chunk
    memory["l2"]["enabled"] = memory["l3"]["enabled"] = False
    return True


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever its class raises
        raise ConfigError(f"{directory} has a tokenizer that cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
