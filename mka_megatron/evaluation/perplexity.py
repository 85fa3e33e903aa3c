"""Perplexity of documents, each token but a document's first scored once.

A window of L inputs predicts L tokens. Full windows follow one another (stride = L); with a smaller stride every
window but a document's first predicts only its last `stride` tokens, so that each has at least L - stride before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mka_megatron.data.tokenizer import Tokenizer
from mka_megatron.evaluation.language_model import LanguageModel
from mka_megatron.evaluation.results import Record, Results, run
from mka_megatron.evaluation.tables import Cell, Report

FIRST_EDGE = 128
"""Positions of the first bucket; every further one ends at twice the one before."""


@dataclass(frozen=True)
class Document:
    """A text to score."""

    key: str
    """No other document's."""
    text: str


@dataclass(frozen=True)
class Window:
    """Inputs [first, last) of a document, which predict its tokens [begin, last]."""

    first: int
    begin: int
    last: int


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """The windows of a document of `tokens` tokens, `length` inputs at most each."""
    begin = 1
    while begin < tokens:
        last = min(tokens - 1, (begin - 1) + (length if begin == 1 else stride))
        yield Window(max(0, begin - 1 + stride - length), begin, last)
        begin = last + 1


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    results: Results,
    *,
    length: int,
    stride: int,
    batch: int,
    min_tokens: int = 2,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A record per document: its tokens that were scored, what they cost, and the bytes of text that they spell.

    Args:
        length: inputs of a window. stride: tokens that a window adds, 1 to `length`.
        batch: windows scored at a time.
        min_tokens: documents of fewer have a record without scores.
        progress: called with how many documents more are done.
    """

    def finish(group: Sequence[Document]) -> Iterator[Record]:
        encoded = tokenizer.encode([document.text for document in group])
        scored = [ids if len(ids) >= max(2, min_tokens) else [] for ids in encoded]
        every = _scores(model, scored, length, stride, batch)
        for document, ids, scores in zip(group, encoded, every, strict=True):
            yield {"key": document.key, "tokens": len(ids), **_sums(scores, document.text, ids, tokenizer)}

    run(results, documents, batch, finish, progress)


def _scores(
    model: LanguageModel, documents: Sequence[Sequence[int]], length: int, stride: int, batch: int
) -> list[torch.Tensor]:
    """Per document float64 [tokens - 1]: what every token but the first costs, nats."""
    found = [torch.empty(max(0, len(ids) - 1), dtype=torch.float64) for ids in documents]
    jobs = [(number, each) for number, ids in enumerate(documents) for each in windows(len(ids), length, stride)]
    jobs.sort(key=lambda job: job[1].first - job[1].last)  # alike ones side by side: little padding
    for at in range(0, len(jobs), batch):
        group = jobs[at : at + batch]
        rows = model.nll([documents[number][each.first : each.last + 1] for number, each in group])
        for (number, each), row in zip(group, rows, strict=True):
            found[number][each.begin - 1 : each.last] = row[each.begin - each.first - 1 :]
    return found


def _sums(scores: torch.Tensor, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> Record:
    if not len(scores):
        return {"scored": 0, "nats": 0.0, "bytes": 0, "buckets": []}
    # position of a token: tokens of its document before it
    ends = list(itertools.takewhile(lambda end: end < len(scores) + 1, (FIRST_EDGE << i for i in itertools.count())))
    cuts = [0, *(end - 1 for end in ends), len(scores)]
    buckets = [[b - a, float(scores[a:b].sum())] for a, b in itertools.pairwise(cuts)]
    return {"scored": len(scores), "nats": float(scores.sum()), "bytes": _bytes_after_first(text, ids, tokenizer),
            "buckets": buckets}  # fmt: skip


def _bytes_after_first(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of `text` without what its first token spells; all where that is no beginning of the text."""
    first = tokenizer.decode(ids[:1])
    return len(text.encode()) - (len(first.encode()) if text.startswith(first) else 0)


def report(results: Results, name: str) -> Report:
    """All documents together: a token's weight is the same wherever it stands."""
    records = [record for record in results.records.values() if record["scored"]]
    scored, nats = sum(r["scored"] for r in records), math.fsum(r["nats"] for r in records)
    spelled = sum(r["bytes"] for r in records)
    figures: Record = {
        "model": name, "settings": results.settings, "documents": len(records), "tokens": scored,
        "too_short": len(results.records) - len(records),
    }  # fmt: skip
    rows: list[list[Cell]] = []
    if scored:
        figures |= {"nats_per_token": nats / scored, "perplexity": perplexity(nats / scored),
                    "bits_per_byte": nats / math.log(2) / spelled if spelled else None, "bytes": spelled}  # fmt: skip
        rows.append(["all", scored, nats / scored, figures["perplexity"]])
    buckets = []
    for index, parts in enumerate(itertools.zip_longest(*(r["buckets"] for r in records))):
        tokens, cost = (sum(part[i] for part in parts if part is not None) for i in (0, 1))
        first, past = (0 if index == 0 else FIRST_EDGE << (index - 1)), FIRST_EDGE << index
        buckets.append({"from": first, "to": past, "tokens": tokens, "nats_per_token": cost / tokens,
                        "perplexity": perplexity(cost / tokens)})  # fmt: skip
        rows.append([f"position {first} to {past - 1}", tokens, cost / tokens, buckets[-1]["perplexity"]])
    figures["by_position"] = buckets
    bits = figures.get("bits_per_byte")
    title = f"Perplexity of {name}" + ("" if bits is None else f": {figures['perplexity']:.4f}, {bits:.4f} bits per byte")
    return Report(title, ("tokens of the document before", "tokens", "nats per token", "perplexity"), rows, figures)


def perplexity(nats: float) -> float:
    """e^nats, infinite where a float has no room for it."""
    return math.exp(nats) if nats < 709.0 else math.inf
