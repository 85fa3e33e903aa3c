"""One sample of a task at a given size of its haystack: (prompt, what is to be answered).

Every generator takes what it draws from: `rng` as Python's module-level generator is used by the authors, `numbers` as
numpy's is, and `seed` for the shuffles that are the same in every sample.
"""

from __future__ import annotations

import math
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from mka_megatron.evaluation.ruler import tasks
from mka_megatron.evaluation.ruler.sources import Question, sentences

Sample = tuple[str, list[str]]
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
"""Where needles go in essays, percent."""
EXAMPLE_VALUE = "12345"


@dataclass
class Draws:
    """What one data set is drawn from."""

    seed: int

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)  # noqa: S311
        self.numbers = np.random.RandomState(self.seed)

    def shuffled(self, items: Sequence[str]) -> list[str]:
        """In an order that depends on the seed and the number of items only."""
        out = list(items)
        Random(self.seed).shuffle(out)  # noqa: S311
        return out


def niah(task: tasks.Niah, draws: Draws, pairs: Sequence[str], essays: Sequence[str] | None, size: int) -> Sample:
    """Needles in `size` words of essays, lines of noise, or other needles.

    Args:
        pairs: keys and values of the kind `words`.
        essays: their words, for the haystack `essay`.
    """
    rng = draws.rng

    def drawn(kind: tasks.Kind) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "words":
            return rng.choice(pairs)
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def needle(key: str, value: str) -> str:
        return tasks.NEEDLE.format(type_needle_v=task.values, key=key, value=value)

    keys, values = list[str](), list[list[str]]()
    needles = []
    for _ in range(max(task.num_keys, task.num_queries)):
        keys.append(drawn(task.keys))
        values.append([])
        for _ in range(task.num_values):
            values[-1].append(drawn(task.values))
            needles.append(needle(keys[-1], values[-1][-1]))
    needles = draws.shuffled(needles)

    if task.haystack == "essay" and essays is not None:
        context = _in_sentences(" ".join((list(essays) * -(-size // len(essays)))[:size]), needles, rng)
    else:
        if task.haystack == "needle":
            lines = [needle(drawn(task.keys), drawn(task.values)) for _ in range(size)]
        else:
            lines = [tasks.NOISE] * size
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, line in zip(places, needles, strict=True):
            lines.insert(place, line)
        context = "\n".join(lines)

    asked = rng.sample(range(len(keys)), task.num_queries)
    queries = [keys[i] for i in asked]
    query = queries[0] if len(queries) == 1 else ", ".join(queries[:-1]) + ", and " + queries[-1]
    template, kind = tasks.NIAH, str(task.values)
    if task.num_queries * task.num_values == 1:  # the singular, in the authors' way
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
            template = template.replace(old, new)
        kind = kind[:-1]
    text = template.format(type_needle_v=kind, context=context, query=query)
    return text, [value for i in asked for value in values[i]]


def _in_sentences(text: str, needles: Sequence[str], rng: Random) -> str:
    found = sentences(text)
    places = sorted(int(len(found) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
    parts = []
    for first, last, needle in zip([0, *places], places, needles, strict=False):
        parts += [" ".join(found[first:last]), needle]
    return " ".join([*parts, " ".join(found[places[-1] :])])


def variable_tracking(task: tasks.VariableTracking, draws: Draws, size: int, example: bool = False) -> Sample:
    """A chain of assignments in `size` lines of noise; `example`: one to be shown, of shorter names."""
    rng = draws.rng
    names = ["".join(rng.choices(string.ascii_uppercase, k=3 if example else 5)) for _ in range(task.hops + 1)]
    value = EXAMPLE_VALUE if example else str(draws.numbers.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(task.hops))]
    lines = [tasks.NOISE] * size
    for done, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
        lines.insert(place + done, chain[done])
    context = "\n".join(lines).replace(". \n", ".\n")
    return tasks.VARIABLES.format(context=context, query=value, num_v=task.hops + 1), names


def renamed(example: str, hops: int, draws: Draws) -> str:
    """A shown example with other names and another value."""
    for name in example.strip().split()[-hops - 1 :]:
        example = example.replace(name, "".join(draws.rng.choices(string.ascii_uppercase, k=len(name))))
    return example.replace(EXAMPLE_VALUE, str(draws.numbers.randint(10000, 99999)))


def common_words(
    task: tasks.CommonWords, draws: Draws, words: Sequence[str], more: Sequence[str] | None, short: bool, size: int
) -> Sample:
    """A solved list, and one of `size` different words.

    Args:
        words: in the order to draw from. more: for lists of more words than those; None: they are not needed.
        short: the repetitions for lengths below 4096.
    """

    def listed(size: int, repeats: int, uncommon_repeats: int) -> Sample:
        chosen = draws.rng.sample(words if size <= len(words) or more is None else more, size)
        common, uncommon = chosen[: task.common], chosen[task.common :]
        every = draws.shuffled(common * repeats + uncommon * uncommon_repeats)
        return _numbered(every), common

    shown, answer = listed(20, 3, 1) if short else listed(40, 10, 3)
    context, outputs = listed(size, 6, 1) if short else listed(size, task.repeats, task.uncommon_repeats)
    template = tasks.COMMON_WORDS
    return f"{template.format(context=shown)} {_numbered(answer)}\n{template.format(context=context)}", outputs


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def coded_vocabulary(task: tasks.FrequentWords, draws: Draws, size: int) -> list[str]:
    """`size` different coded words by rank, of which the first is noise."""
    found: list[str] = []
    while len(set(found)) < size:
        for _ in range(max(1, size - len(found))):
            found.append("".join(draws.rng.choices(string.ascii_lowercase, k=task.word_length)))
    return ["...", *draws.shuffled(sorted(set(found)))[1:]]


def frequent_words(vocabulary: Sequence[str], draws: Draws, size: int) -> Sample:
    """About `size` coded words, the k-th of the vocabulary size/(k^2 zeta(2)) times."""
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (size * (ranks**-2.0) / (math.pi**2 / 6)).astype(int)
    every = [word for word, count in zip(vocabulary, counts.tolist(), strict=True) for _ in range(count)]
    return tasks.FREQUENT_WORDS.format(context=" ".join(draws.shuffled(every))), list(vocabulary[1:4])


def question(asked: Question, documents: Sequence[str], draws: Draws, size: int) -> Sample:
    """A question and `size` documents; raises ValueError where they are fewer than those that hold the answer."""
    if size < len(documents):
        others = size - len(asked.context)
        if others > len(asked.more):
            related = {*asked.context, *asked.more}
            additions = [i for i in range(len(documents)) if i not in related]
            chosen = [*asked.context, *asked.more, *draws.rng.sample(additions, max(0, others - len(asked.more)))]
        else:
            chosen = [*asked.context, *draws.rng.sample(asked.more, others)]
        texts = [documents[i] for i in chosen]
    else:
        texts = (list(documents) * -(-size // len(documents)))[:size]
    texts = draws.shuffled(texts)
    context = "\n\n".join(tasks.DOCUMENT.format(i=i, document=text) for i, text in enumerate(texts, 1))
    return tasks.QUESTIONS.format(context=context, query=asked.query), asked.outputs
