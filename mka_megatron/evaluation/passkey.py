"""The passkey task as published (Mohtashami & Jaggi, "Landmark Attention", run_test.py of their repository).

A key in [1, 50000] is told in one line at a random place of repeated filler, and asked for at the end.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.tokenizer import Tokenizer
from mka_megatron.evaluation.language_model import LanguageModel
from mka_megatron.evaluation.results import Record, Results, run
from mka_megatron.evaluation.tables import Cell, HeatMap, Report, percent

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

    Raises ConfigError when the length leaves no room for the fixed text and the distance.
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
            raise ConfigError(f"length {length} leaves no room for a key {distance} tokens back: give more tokens.")

    def trial(self, rng: Random, depth: float | None = None) -> Trial:
        """The next trial of `rng`; equal states give equal trials.

        Args:
            depth: share of the filler before the line with the key, 0 to 1; None: any.
        """
        key = rng.randint(*KEYS)
        after = rng.randint(self._nearest, self._filler)
        if depth is not None:
            after = max(self._nearest, round((1 - depth) * self._filler))
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


@dataclass(frozen=True)
class Question:
    """A cell's trial."""

    length: int
    depth: float
    number: int

    @property
    def key(self) -> str:
        """length/depth/number."""
        return f"{self.length}/{self.depth:g}/{self.number}"


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    results: Results,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    max_new_tokens: int,
    seed: int,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A record per trial: what the model said after the prompt, and whether that is the key.

    Where `max_new_tokens` are fewer than the answer's, what was said has to be its beginning; blanks before the digits
    are then given with the prompt.

    Args:
        lengths: tokens of a prompt. depths: share of the filler before the key, 0 to 1.
        trials: of every length and depth.
    """
    tasks = {length: Passkey(lambda text: len(tokenizer.encode([text])[0]), length) for length in lengths}

    def finish(group: Sequence[Question]) -> Iterator[Record]:
        asked, whole, prompts = [], [], []
        for each in group:
            rng = Random(f"{seed} {each.key}")  # noqa: S311
            trial = tasks[each.length].trial(rng, each.depth)
            prompt_ids, answer = tokenizer.encode([trial.prompt, trial.response])
            asked.append(trial)
            whole.append(max_new_tokens >= len(answer))
            blanks = takewhile(lambda token: not tokenizer.decode([token]).strip(), answer)
            prompts.append([*prompt_ids, *([] if whole[-1] else blanks)])
        for each, trial, all_of_it, new in zip(group, asked, whole, model.greedy(prompts, max_new_tokens), strict=True):
            said = tokenizer.decode(new)
            right = found(said, trial.key) if all_of_it else _begins(said, trial.key)
            yield {"key": each.key, "length": each.length, "depth": each.depth, "pass_key": trial.key, "said": said,
                   "score": 100.0 * right}  # fmt: skip

    questions = (Question(n, depth, i) for n in lengths for depth in depths for i in range(trials))
    run(results, questions, batch, finish, progress)


def report(results: Results, name: str, lengths: Sequence[int], depths: Sequence[float]) -> Report:
    """Answered trials by length and depth, in percent."""

    def mean(length: int | None, depth: float | None) -> float | None:
        scores = [r["score"] for r in results.records.values()
                  if length in (None, r["length"]) and depth in (None, r["depth"])]  # fmt: skip
        return sum(scores) / len(scores) if scores else None

    grid = [[mean(length, depth) for length in lengths] for depth in depths]
    rows: list[list[Cell]] = [[f"{depth:.0%}", *map(percent, line)] for depth, line in zip(depths, grid, strict=True)]
    rows.append(["all", *(percent(mean(length, None)) for length in lengths)])
    figures = {"model": name, "settings": results.settings, "all": mean(None, None), "by_depth_and_length": grid,
               "lengths": list(lengths), "depths": list(depths)}  # fmt: skip
    title = f"Passkey, % answered by {name}"
    heat = HeatMap("passkey", title, "tokens", "depth of the key", lengths, [f"{depth:.0%}" for depth in depths], grid)
    return Report(title, ("depth", *(f"{length:,}" for length in lengths)), rows, figures, (heat,))


def _begins(said: str, key: int) -> bool:
    """Whether what a model said is the key's beginning."""
    return bool(said.strip()) and str(key).startswith(said.strip())


def _after(filler: int) -> str:
    return f"\n{_filler(filler)}\n{QUESTION}"


def _filler(characters: int) -> str:
    # sentences joined by blanks, cut anywhere
    return f"{FILLER} " * (characters // (len(FILLER) + 1)) + FILLER[: characters % (len(FILLER) + 1)]
