"""LongBench's metrics, 0 to 1, as LongBench/metrics.py of github.com/THUDM/LongBench defines them.

ROUGE is the package `rouge`'s and Chinese words are `jieba`'s (the extra `evaluation`). Edit similarity is fuzzywuzzy's
`ratio` without python-Levenshtein, which is difflib's, rounded to percent: that package is not needed.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from importlib import import_module
from typing import Any

from mka_megatron.config.errors import ConfigError

Metric = Callable[[str, str, Sequence[str]], float]
"""(what was said, a reference, all classes) -> score."""

_CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def qa_f1(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, cases, punctuation and articles aside."""
    return _f1(_normalized(said).split(), _normalized(answer).split())


def qa_f1_zh(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words."""
    words, wanted = ([token for token in map(_normalized_zh, _cut(text)) if token] for text in (said, answer))
    return _f1(words, wanted)


def rouge(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of ROUGE-L; 0 where there is none, of an empty text for one."""
    scorer = _package("rouge").Rouge()
    try:
        return float(scorer.get_scores([said], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an empty text; a sentence too long for it
        return 0.0


def rouge_zh(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words."""
    return rouge(" ".join(_cut(said)), " ".join(_cut(answer)))


def classification(said: str, answer: str, classes: Sequence[str]) -> float:
    """One over the classes that were named, if the right one is among them; parts of its name do not count."""
    named = [name for name in classes if name in said]
    at = 0
    while at < len(named):  # after one that is dropped the next is passed over, as in the original
        if named[at] in answer and named[at] != answer:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the paragraph's ("Paragraph 7")."""
    return _numbers(said, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese ones."""
    return _numbers(said, re.findall(r"段落(\d+)", answer)[0])


def count(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the answer."""
    return _numbers(said, answer)


def code_similarity(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line without ` # or //."""
    lines = said.lstrip("\n").split("\n")
    line = next((each for each in lines if "`" not in each and "#" not in each and "//" not in each), "")
    if line == answer:
        return 1.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def choice(said: str) -> str | None:
    """The letter of v2's answer."""
    said = said.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(r"The correct answer is ([A-D])", said)
    return found.group(1) if found else None


def _numbers(said: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", said)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(words) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(words), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _normalized(text: str) -> str:
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _normalized_zh(text: str) -> str:
    return "".join("".join(char for char in text.lower() if char not in set(string.punctuation + _CHINESE)).split())


def _cut(text: str) -> list[str]:
    return list(_package("jieba").cut(text, cut_all=False))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"LongBench's scores need the package {name}: pip install 'mka-megatron[evaluation]'.") from None
