"""A task's samples of a length: how large a haystack fits, found and drawn in the authors' order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from mka_megatron.config.errors import ConfigError
from mka_megatron.evaluation.ruler import generators as make
from mka_megatron.evaluation.ruler import tasks
from mka_megatron.evaluation.ruler.sources import Sources

Count = Callable[[str], int]
"""Tokens of a text."""
_SHORT = 4096
"""Below this length examples and steps are smaller."""
_EXAMPLE = 500
"""Tokens of the worked example of variable tracking, at most."""
_TRIES = 64


@dataclass(frozen=True)
class Sample:
    """One question."""

    task: str
    length: int
    index: int
    prompt: str
    outputs: tuple[str, ...]
    tokens: int
    """Of the prompt and the generation budget."""
    replaced: tuple[str, ...] = ()
    """What it was made of instead of the official material, a clause each."""

    @property
    def key(self) -> str:
        """task/length/index."""
        return f"{self.task}/{self.length}/{self.index}"


@dataclass(frozen=True)
class _Haystack:
    """Samples of a task by the size of their haystack."""

    make: Callable[[int, int], make.Sample]
    """(index of the sample, size)."""
    step: int
    """Smallest size, and by how much one that is too large shrinks."""
    probe: int
    """Size by which tokens are estimated."""
    upper: Callable[[int, float], int]
    """(length, tokens of a unit) -> about the largest size to try."""
    beside: int = 0
    """Tokens that the search does not see."""


def samples(
    name: str, length: int, count: int, tokens: Count, directory: Path | None, seed: int
) -> Iterator[Sample]:
    """`count` samples of a task, each with its generation budget at most `length` tokens.

    Args:
        tokens: of a text in the tokenizer at hand.
        directory: of the user's files; None: there are none.

    Raises:
        ConfigError: nothing of the task fits into `length`.
        DataError: a file is missing or unreadable.
    """
    task, draws, sources = tasks.TASKS[name], make.Draws(seed), Sources(directory)
    if isinstance(task, tasks.FrequentWords):
        drawn = _frequent_words(task, draws, name, length, count, tokens)
    else:
        haystack = _haystack(name, task, draws, length, tokens, sources)
        drawn = _fitted(haystack, name, length, count, task.new_tokens, tokens)
    for index, (prompt, outputs, used) in enumerate(drawn):
        yield Sample(name, length, index, prompt, tuple(outputs), used, tuple(sources.notes))


def _haystack(
    name: str, task: tasks.Task, draws: make.Draws, length: int, tokens: Count, sources: Sources
) -> _Haystack:
    def thrice(length: int, unit: float) -> int:
        return int(length / unit * 3)

    if isinstance(task, tasks.Niah):
        essays = sources.essays() if task.haystack == "essay" else None
        step = 500 if essays is not None else 25 if length >= _SHORT else 5
        pairs = sources.word_pairs() if task.keys == "words" else []
        of_size = partial(make.niah, task, draws, pairs, essays)
        return _Haystack(lambda index, size: of_size(size), step, step, thrice)
    if isinstance(task, tasks.VariableTracking):
        shown = _Haystack(lambda index, size: make.variable_tracking(task, draws, size, example=True), 5, 5, thrice)
        try:
            [(text, names, _)] = _fitted(shown, name, _EXAMPLE, 1, 0, tokens)
        except ConfigError:
            raise ConfigError(f"--tasks has {name}: its worked example has to fit into {_EXAMPLE} tokens, and does not with this "
                              "tokenizer; leave the task out.") from None
        example = f"{text} {' '.join(names)}\n"

        def chain(index: int, size: int) -> make.Sample:
            text, names = make.variable_tracking(task, draws, size)
            return (text, names) if index < 0 else (f"{make.renamed(example, task.hops, draws)}\n{text}", names)

        step = 10 if length >= _SHORT else 5
        return _Haystack(chain, step, step, thrice, beside=tokens(example))
    if isinstance(task, tasks.CommonWords):
        words = draws.shuffled(sources.words())
        more = sources.more_words(wanted=_many(words, length, tokens))
        of_words = partial(make.common_words, task, draws, words, more, length < _SHORT)
        return _Haystack(lambda index, size: of_words(size), 10, min(4096, len(more or words)),
                         lambda length, unit: min(int(length // unit) * 2, len(more or words)))  # fmt: skip
    assert isinstance(task, tasks.Questions)
    questions, documents = sources.questions(task.file)

    def asked(index: int, size: int) -> make.Sample:
        if index >= len(questions):
            raise ConfigError(f"--samples is more than the {len(questions)} questions of {task.file}; give fewer.")
        return make.question(questions[max(0, index)], documents, draws, size)

    return _Haystack(asked, 10, 10, thrice)


def _many(words: list[str], length: int, tokens: Count) -> bool:
    """Whether a list of all `words`, three times each, is shorter than `length`."""
    return 3 * tokens(" ".join(f"{number}. {word}" for number, word in enumerate(words, 1))) < length


def _fitted(
    haystack: _Haystack, name: str, length: int, count: int, new_tokens: int, tokens: Count
) -> Iterator[tuple[str, list[str], int]]:
    largest, step = _largest(haystack, length, new_tokens, tokens), haystack.step
    for index in range(count):
        size = largest
        for _ in range(_TRIES):
            prompt, outputs = haystack.make(index, size)
            used = tokens(prompt) + new_tokens
            if used <= length:
                yield prompt, outputs, used
                break
            if size > step:
                size -= step
        else:
            _refuse(name, length)


def _largest(haystack: _Haystack, length: int, new_tokens: int, tokens: Count) -> int:
    """By bisection over single draws; -1 is the index of a draw that is no sample."""
    step, best = haystack.step, None
    unit = tokens(haystack.make(-1, haystack.probe)[0]) / haystack.probe
    lower, upper = step, max(haystack.upper(length, unit), 2 * step)
    while lower <= upper:
        middle = (lower + upper) // 2
        if tokens(haystack.make(-1, middle)[0]) + haystack.beside + new_tokens <= length:
            best, lower = middle, middle + 1
        else:
            upper = middle - 1
    return step if best is None else best


def _frequent_words(
    task: tasks.FrequentWords, draws: make.Draws, name: str, length: int, count: int, tokens: Count
) -> Iterator[tuple[str, list[str], int]]:
    room = length - task.new_tokens
    different, step = room // 50, room // 32
    if different < 4:
        _refuse(name, length)
    vocabulary = make.coded_vocabulary(task, draws, different)
    most = room // task.word_length
    while tokens(make.frequent_words(vocabulary, draws, most)[0]) < room:
        most += step
    most -= step
    for _ in range(count):
        vocabulary, size = make.coded_vocabulary(task, draws, different), most
        while True:
            if size <= 0:
                _refuse(name, length)
            prompt, outputs = make.frequent_words(vocabulary, draws, size)
            if (used := tokens(prompt)) <= room:
                break
            size -= step
        yield prompt, outputs, used + task.new_tokens


def _refuse(name: str, length: int) -> NoReturn:
    raise ConfigError(f"--lengths has {length}: nothing of RULER's {name} fits into so few tokens with this tokenizer; give "
                      "a longer length or leave the task out (--tasks).")
