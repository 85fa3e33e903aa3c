"""What the samples are made of: words, essays, questions with their documents. Files are the user's, under their official
names (scripts/data/synthetic/json of github.com/NVIDIA/RULER)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from mka_megatron.data.batch import DataError

ESSAYS, ENGLISH = "PaulGrahamEssays.json", "english_words.json"
_LARGEST = 1 << 30

# a small stand-in for wonderwords' lists, which make the official samples
_NOUNS = (
    "anchor apple arrow basket beacon blanket bottle bridge bucket button cabin candle canyon carpet castle cedar chapter "
    "circle clock cloud copper corner cotton cousin cradle crystal desert diamond dragon eagle engine falcon feather field "
    "finger forest fountain garden glacier guitar hammer harbor helmet island jacket jungle kettle kitten ladder lantern "
    "lemon letter library lizard magnet maple marble meadow mirror monkey mountain needle ocean orchard paddle palace parrot "
    "pencil pepper piano pillow planet pocket puzzle rabbit ribbon river rocket saddle sailor shadow shoulder silver spider "
    "spoon station summer temple thunder ticket tiger timber tower tunnel turtle valley velvet village violin wagon walnut "
    "whistle window winter wizard"
).split()
_ADJECTIVES = (
    "able ancient angry bitter bold brave bright broken busy calm careful cheap clever cold cruel curious dark deep distant "
    "dusty eager early empty famous fierce fresh gentle golden grand happy heavy hidden hollow honest hungry icy jolly kind "
    "lazy little lonely loud lucky mighty narrow nervous noisy odd pale patient plain polite proud quick quiet rare rough "
    "rusty sharp shiny silent simple sleepy slow small smooth soft solid steep strange sturdy sweet swift tall tame tender "
    "thick thin tiny tired tough ugly vast warm weak wild wise witty young"
).split()
_VERBS = (
    "accept argue arrive bake borrow build carry catch chase choose climb collect cook count dance decide deliver draw dream "
    "drive enter escape explain fetch find follow forget gather give greet grow guess help hunt imagine jump laugh learn "
    "listen measure mend move notice open paint plant play polish promise push read repair rescue row sail search send share "
    "sing sleep solve speak spend stand study swim teach throw travel visit wait walk wander watch write"
).split()


@dataclass
class Sources:
    """Lazily read.

    Args:
        directory: of the user's files; None: there are none.
    """

    directory: Path | None = None
    notes: dict[str, None] = field(default_factory=dict)
    """What was used instead of the official material, a clause each, in the order of use."""

    def word_pairs(self) -> list[str]:
        """adjective-noun, every one, sorted."""
        nouns, adjectives, _ = self._lists()
        return _pairs(tuple(adjectives), tuple(nouns))

    def words(self) -> list[str]:
        """Nouns, adjectives and verbs, sorted."""
        return sorted({word for words in self._lists() for word in words})

    def more_words(self, wanted: bool) -> list[str] | None:
        """For lists longer than `words`; None: there is no file of them, and they are not `wanted`."""
        path = self._file(ENGLISH)
        if path is None and not wanted:
            return None
        if path is None:
            self._note(f"pairs of words for want of {ENGLISH}")
            return self.word_pairs()
        found = _json(path)
        if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
            raise DataError(f"{path}: an object of words is expected; copy RULER's file again.")
        return list(found.values())

    def essays(self) -> list[str] | None:
        """The essays' words; None: there is no file, and the haystack is noise."""
        path = self._file(ESSAYS)
        if path is None:
            self._note(f"repeated noise for want of {ESSAYS}")
            return None
        found = _json(path)
        text = found.get("text") if isinstance(found, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}: an object with the essays as 'text' is expected; make it with RULER's script.")
        return re.sub(r"\s+", " ", text).split(" ")

    def questions(self, name: str) -> tuple[list[Question], list[str]]:
        """Questions of squad.json or hotpotqa.json, and all documents, sorted."""
        path = self._file(name)
        if path is None:
            where = "name its folder with --data" if self.directory is None else f"put it into {self.directory}"
            raise DataError(f"RULER's {'qa_1' if name == 'squad.json' else 'qa_2'} needs {name}, which is not here: {where}, "
                            "or leave the task out (--tasks generated).")
        try:
            return (_squad if name == "squad.json" else _hotpotqa)(_json(path))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path} has not the fields of {name}: copy the file that RULER's script fetches.") from None

    def _lists(self) -> tuple[list[str], list[str], list[str]]:
        if find_spec("wonderwords") is None:
            self._note("a short list of words for want of the package wonderwords")
            return _NOUNS, _ADJECTIVES, _VERBS
        assets = files("wonderwords.assets")
        names = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
        nouns, adjectives, verbs = (
            [line.rstrip() for line in (assets / name).read_text(encoding="utf-8").splitlines()] for name in names
        )
        return nouns, adjectives, verbs

    def _file(self, name: str) -> Path | None:
        path = None if self.directory is None else self.directory / name
        return path if path is not None and path.is_file() else None

    def _note(self, clause: str) -> None:
        self.notes[clause] = None


@dataclass(frozen=True)
class Question:
    """Of one document of many."""

    query: str
    outputs: list[str]
    context: list[int]
    """Documents that hold the answer, by number."""
    more: list[int]
    """Documents of the same article."""


def sentences(text: str) -> list[str]:
    """Cut after . ! or ? and a blank."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


@cache
def _pairs(adjectives: tuple[str, ...], nouns: tuple[str, ...]) -> list[str]:
    # millions with wonderwords' lists
    return sorted({f"{adjective}-{noun}" for adjective, noun in product(adjectives, nouns)})


def _squad(data: Any) -> tuple[list[Question], list[str]]:
    documents = sorted({part["context"] for article in data["data"] for part in article["paragraphs"]})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in data["data"]:
        same = [number[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            own = number[part["context"]]
            for each in part["qas"]:
                if not each["is_impossible"]:
                    answers = [answer["text"] for answer in each["answers"]]
                    questions.append(Question(each["question"], answers, [own], [i for i in same if i != own]))
    return questions, documents


def _hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    def text(title: str, lines: list[str]) -> str:
        return f"{title}\n{''.join(lines)}"

    documents = sorted({text(*part) for each in data for part in each["context"]})
    number = {document: i for i, document in enumerate(documents)}
    return [
        Question(each["question"], [each["answer"]], [number[text(*part)] for part in each["context"]], [])
        for each in data
    ], documents


def _json(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path} has more than {_LARGEST >> 30} GiB: that is not RULER's file.")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON ({error}): copy it again.") from None
