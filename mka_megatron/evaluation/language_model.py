"""What evaluation needs of a model, whatever computes it: scores of given tokens, and greedy continuations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor


class LanguageModel(Protocol):
    """A causal language model over token ids."""

    positions: int
    """Tokens that it has seen at most when it chooses the next one."""

    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """What every token of a row but the first costs, given those before it.

        Args:
            rows: of 2 to `positions` + 1 tokens each, of any lengths; each is one document from its beginning.

        Returns:
            Per row of n tokens float64 [n - 1] on the host: nats, the negative log-probabilities of tokens 1 to n - 1.
        """
        ...

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        """The likeliest token again and again.

        Args:
            prompts: of one token each at least, of any lengths; with the new tokens at most `positions` + 1.
            max_new_tokens: of each prompt.
            stop: tokens that end a continuation and are left out of it.
            at_least: tokens before which none of `stop` is chosen.
        """
        ...


class Begun:
    """A model that gets the same tokens before every row: those of the beginning, which some models were trained with.

    Args:
        model: has so many positions more than this one.
        beginning: at least one token.
    """

    def __init__(self, model: LanguageModel, beginning: Sequence[int]) -> None:
        self._model, self._beginning = model, list(beginning)
        self.positions = model.positions - len(beginning)

    def nll(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """See LanguageModel."""
        begun = self._model.nll([[*self._beginning, *row] for row in rows])
        return [costs[len(self._beginning) :] for costs in begun]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = (), at_least: int = 0
    ) -> list[list[int]]:
        """See LanguageModel."""
        return self._model.greedy([[*self._beginning, *prompt] for prompt in prompts], max_new_tokens, stop, at_least)
