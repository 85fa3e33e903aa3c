"""Windows, sums and resumption of perplexity, on a model whose costs are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.evaluation import perplexity
from mka_megatron.evaluation.language_model import Begun
from mka_megatron.evaluation.perplexity import Document, Window, windows
from mka_megatron.evaluation.results import Results
from tests.helpers.evaluated import Characters, Counting

SIZE = 64


def test_full_windows_and_sliding_ones() -> None:
    assert list(windows(10, 4, 4)) == [Window(0, 1, 4), Window(4, 5, 8), Window(8, 9, 9)]
    assert list(windows(8, 4, 2)) == [Window(0, 1, 4), Window(2, 5, 6), Window(4, 7, 7)]
    assert list(windows(1, 4, 4)) == [] and list(windows(3, 8, 8)) == [Window(0, 1, 2)]


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 1, 1), (50, 7, 7), (50, 7, 3), (51, 8, 1), (9, 64, 16)])
def test_every_token_but_the_first_is_scored_once(tokens: int, length: int, stride: int) -> None:
    every = list(windows(tokens, length, stride))
    assert [t for each in every for t in range(each.begin, each.last + 1)] == list(range(1, tokens))
    for each in every:
        assert each.last - each.first <= length and each.first < each.begin
        # at least length - stride tokens before each, but for the first window's
        assert each.first == 0 or each.begin - each.first > length - stride


DOCUMENTS = [Document("a", "".join(map(chr, range(97, 117)))), Document("b", "xxyz"), Document("c", "é"), Document("d", "hello")]


def evaluated(out: Path, model: Counting, documents: list[Document] = DOCUMENTS, **changed: int) -> Results:
    settings = {"length": 6, "stride": 3, "min_tokens": 2} | changed
    results = Results(out, settings)
    perplexity.evaluate(model, Characters(), documents, results, batch=2, **settings)
    return results


def test_sums_by_hand(tmp_path: Path) -> None:
    """a: 19 tokens follow. b: x is dear, y and z follow. c: nothing to score. d: all four are dear."""
    report = perplexity.report(evaluated(tmp_path, Counting(SIZE, 6)), "counting")
    nats = (19 + 2) * math.log(2) + 5 * math.log(2 * SIZE)
    assert report.figures["tokens"] == 26 and report.figures["too_short"] == 1
    assert report.figures["nats_per_token"] == pytest.approx(nats / 26, rel=1e-12)
    assert report.figures["perplexity"] == pytest.approx(math.exp(nats / 26), rel=1e-12)
    # first characters are not scored, and their bytes not counted
    assert report.figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / 26, rel=1e-12)


def test_bytes_are_the_texts(tmp_path: Path) -> None:
    """é is two bytes: of aéé four are scored."""
    results = evaluated(tmp_path, Counting(SIZE), [Document("a", "aéé")])
    assert results.records["a"]["bytes"] == 4 and results.records["a"]["scored"] == 2


def test_buckets_by_position(tmp_path: Path) -> None:
    """Token t has t before it: 1 to 127 in the first bucket, 128 to 255 in the second, the rest in the third."""
    text = "".join(map(chr, range(1000, 1300)))
    figures = perplexity.report(evaluated(tmp_path, Counting(SIZE), [Document("a", text)]), "m").figures
    assert [(b["from"], b["to"], b["tokens"]) for b in figures["by_position"]] == [(0, 128, 127), (128, 256, 128), (256, 512, 44)]
    assert all(b["perplexity"] == pytest.approx(2) for b in figures["by_position"])


def test_a_resumed_run_scores_what_is_left(tmp_path: Path) -> None:
    whole = evaluated(tmp_path / "whole", Counting(SIZE))
    evaluated(tmp_path / "cut", Counting(SIZE), DOCUMENTS[:2])
    with (tmp_path / "cut" / "examples.jsonl").open("a") as file:
        file.write('{"key": "c", "tok')  # killed while it wrote
    model = Counting(SIZE)
    resumed = evaluated(tmp_path / "cut", model)
    assert resumed.records == whole.records and [len(row) for row in model.rows] == [5]
    lines = (tmp_path / "cut" / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c", "d"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    evaluated(tmp_path, Counting(SIZE))
    with pytest.raises(ConfigError, match=r"other settings \(stride was 3 and is 2 now\)"):
        evaluated(tmp_path, Counting(SIZE), stride=2)


def test_a_beginning_is_given_and_not_scored() -> None:
    inner = Counting(SIZE, 6)
    model = Begun(inner, [500, 501])
    assert model.positions == 4
    [costs] = model.nll([[10, 11, 20]])
    assert costs.tolist() == pytest.approx([math.log(2), math.log(2 * SIZE)])
    assert model.greedy([[7]], 2) == [[8, 9]] and inner.rows == [[500, 501, 10, 11, 20], [500, 501, 7]]
