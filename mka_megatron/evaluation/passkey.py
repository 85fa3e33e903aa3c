"""The passkey task as published (Mohtashami & Jaggi, "Landmark Attention", run_test.py of their repository).

A key in [1, 50000] is told in one line at a random place of repeated filler, and asked for at the end.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEYS = (1, 50000)
"""Smallest and largest key."""

Count = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Trial:
    """One question."""

    prompt: str
    key: int
    distance: int
    """Tokens of the prompt after the line with the key."""

    @property
    def response(self) -> str:
        """What the prompt is to be continued with."""
        return f" {self.key}"


class Passkey:
    """Trials of at most `length` tokens, the line with the key at a random place at least `distance` tokens back.

    Args:
        count: tokens of a text in the tokenizer at hand.
        length: tokens of a prompt, which falls short of it by a few, fewer digits above all.
        distance: smallest number of tokens between the line's end and the prompt's end.

    Raises ValueError when the length leaves no room for the fixed text and the distance.
    """

    def __init__(self, count: Count, length: int, distance: int = 0) -> None:
        self._count, self._length, self._distance = count, length, distance

        def long(filler: int) -> bool:
            return count(prompt(KEYS[1], filler, 0)) > length

        def far(filler: int) -> bool:
            return count(_after(filler)) >= distance

        most = len(FILLER)
        while not long(most):
            most *= 2
        self._filler = bisect_left(range(most), True, key=long) - 1
        self._nearest = bisect_left(range(most), True, key=far)
        # one repetition more than needed, so that trimming below never shortens the distance
        if self._filler < self._nearest + len(FILLER):
            raise ValueError(f"length {length} leaves no room for a key {distance} tokens back: give more tokens.")

    def trial(self, rng: Random) -> Trial:
        """The next trial of `rng`; equal states give equal trials."""
        key = rng.randint(*KEYS)
        after = rng.randint(self._nearest, self._filler)
        # a cut word may be more tokens than a whole one
        while self._count(_after(after)) < self._distance:
            after += 1
        before = max(0, self._filler - after)
        while self._count(prompt(key, before, after)) > self._length:
            before, after = (before - 1, after) if before else (before, after - 1)
        return Trial(prompt(key, before, after), key, self._count(_after(after)))


def prompt(key: int, before: int, after: int) -> str:
    """The published prompt with so many characters of filler before and after the line with the key."""
    return "\n".join((TASK, _filler(before), LINE.format(key=key))) + _after(after)


def found(continuation: str, key: int) -> bool:
    """Whether the first number of what a model says after the prompt is the key."""
    number = re.search(r"\d+", continuation)
    return number is not None and number.group() == str(key)


def _after(filler: int) -> str:
    return f"\n{_filler(filler)}\n{QUESTION}"


def _filler(characters: int) -> str:
    # sentences joined by blanks, cut anywhere
    return f"{FILLER} " * (characters // (len(FILLER) + 1)) + FILLER[: characters % (len(FILLER) + 1)]
