"""The 13 tasks. Templates, prefixes, arguments and budgets are those of github.com/NVIDIA/RULER (Apache-2.0):
scripts/data/synthetic/constants.py and scripts/synthetic.yaml, verbatim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned "
    "in the provided text? The special magic {type_needle_v} for {query} mentioned in the provided text are"
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of variable "
    "assignment in the text above, {num_v} variables are assigned the value {query}, they are: "
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that "
    "appear most often in the list are:"
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text? Answer: According to the coded text above, the three most "
    "frequently appeared words are:"
)
QUESTIONS = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {query} Answer:"
)
DOCUMENT = "Document {i}:\n{document}"

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Niah:
    """A needle in a haystack."""

    haystack: Haystack
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    new_tokens = 128


@dataclass(frozen=True)
class VariableTracking:
    """A chain of assignments in noise."""

    hops: int = 4

    new_tokens = 30


@dataclass(frozen=True)
class CommonWords:
    """The ten common words of a numbered list."""

    common: int = 10
    repeats: int = 30
    uncommon_repeats: int = 3

    new_tokens = 120


@dataclass(frozen=True)
class FrequentWords:
    """The three commonest of coded words whose frequencies follow a zeta distribution of exponent 2."""

    word_length: int = 6

    new_tokens = 50


@dataclass(frozen=True)
class Questions:
    """A question on one of many documents."""

    file: str
    """squad.json or hotpotqa.json."""

    new_tokens = 32


Task = Niah | VariableTracking | CommonWords | FrequentWords | Questions

TASKS: dict[str, Task] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", num_values=4),
    "niah_multiquery": Niah("essay", num_queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Questions("squad.json"),
    "qa_2": Questions("hotpotqa.json"),
}
"""By their official names."""
GENERATED = tuple(name for name, task in TASKS.items() if not isinstance(task, Questions))
"""Those that need no file."""
