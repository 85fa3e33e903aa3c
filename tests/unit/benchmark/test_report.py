"""Means, errors and tables against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mka_megatron.benchmark.report import table
from mka_megatron.benchmark.statistics import Mean, paired


def test_mean_and_sample_deviation() -> None:
    found = Mean.of([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert found.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert found.text(2) == "3.00 ± 2.65"
    assert Mean.of([1234.5]).text(1) == "1,234.5" and Mean.of([1234.5]).standard_error is None


def test_a_difference_needs_two_standard_errors() -> None:
    assert Mean.of([1.0, 1.1, 0.9]).differs()  # 1 against an error of 0.058
    assert not Mean.of([1.0, -0.6, 0.9]).differs()  # 0.43 against 0.52
    assert not Mean.of([1.0]).differs()


def test_differences_are_taken_seed_by_seed() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 7.0}, {1: 4.0, 0: 0.5})
    assert found == Mean.of([0.5, 1.0])
    assert paired({0: 1.0}, {1: 1.0}) is None


def row(name: str, seed: int, loss: float, **more: object) -> dict:
    return {"name": name, "seed": seed, "sequence_length": 512, "parameters": 1000, "eval_loss": loss} | more


def test_table_of_two_seeds() -> None:
    rows = [row("gqa", 0, 2.0), row("gqa", 1, 3.0), row("mka", 0, 2.5), row("mka", 1, 3.5), row("mla", 0, 1.0),
            {"name": "mha", "seed": 0, "sequence_length": 512, "error": "no memory"}]  # fmt: skip
    lines = table(rows, "gqa").splitlines()
    assert lines[0] == "| | parameters | eval loss | loss − gqa |"
    assert lines[2] == "| gqa | 1,000 | 2.5000 ± 0.7071 |  |"
    assert lines[3] == "| mka | 1,000 | 3.0000 ± 0.7071 | **+0.5000 ± 0.0000** |"
    assert lines[4] == "| mla | 1,000 | 1.0000 | -1.0000 |"
    assert lines[5] == "| mha | no memory | | |"


def test_table_of_lengths() -> None:
    rows = [{"name": name, "seed": 0, "sequence_length": n, "tokens_per_second": speed} if speed else
            {"name": name, "seed": 0, "sequence_length": n, "error": "no memory"}
            for name, n, speed in (("gqa", 512, 1000), ("gqa", 4096, 250), ("mla", 512, 900), ("mla", 4096, None))]  # fmt: skip
    assert table(rows, "gqa").splitlines() == [
        "| tokens/s | 512 | 4,096 |", "| --- | --: | --: |", "| gqa | 1,000 | 250 |", "| mla | 900 | failed |"]  # fmt: skip
