"""Which token comes next. Shapes: B rows, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError for values that no choice can be made with."""

    temperature: float = 0.0
    """0: the likeliest token; else the logits are divided by it."""
    top_k: int | None = None
    """Choose among so many of the likeliest tokens only."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that together are as probable as this."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature is {self.temperature}; give 0 for the likeliest token, or a positive number."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k is {self.top_k}; give at least 1, or leave it out.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p is {self.top_p}; give a number above 0 and at most 1.")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """[B, V] logits -> [B] int64, equal for equal logits and states of `generator`, of the logits' device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(distribution(logits, sampling), 1, generator=generator).squeeze(1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] fp32 probabilities of a positive temperature; ties at the border of top-k are all kept."""
    scaled = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p == 1:
        return probabilities
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    # a token stays if those likelier than it do not reach the share
    kept = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0)
    kept = torch.zeros_like(probabilities).scatter(-1, places, kept)
    return kept / kept.sum(dim=-1, keepdim=True)
