"""The blend against its definition: samples sorted by their due time, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mka_megatron.data.batch import DataError
from mka_megatron.data.blend import Blend

WEIGHTS = st.lists(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 9).map(float)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_the_order_is_the_sorted_due_times(weights: list[float]) -> None:
    count = 200
    total = sum(map(Fraction, weights))
    due = [
        (Fraction(2 * k + 1) / (2 * Fraction(weight)), source, k)
        for source, weight in enumerate(weights)
        for k in range(int(count * Fraction(weight) / total) + len(weights) + 2)
    ]
    expected = [(source, k) for _, source, k in sorted(due)[:count]]
    blend = Blend.of(weights)
    assert [blend.locate(n) for n in range(count)] == expected


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_far_positions_are_consistent_and_in_proportion(weights: list[float], start: int) -> None:
    blend = Blend.of(weights)
    total = sum(map(Fraction, weights))
    seen: dict[int, int] = {}
    for n in range(start, start + 50):
        source, before = blend.locate(n)
        assert before == seen.get(source, before), "a source's samples are consecutive"
        seen[source] = before + 1
        assert abs(before - n * Fraction(weights[source]) / total) <= len(weights)


def test_equal_weights_alternate() -> None:
    assert [Blend.of([0.5, 0.5]).locate(n)[0] for n in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match="weight"):
        Blend.of([1.0, weight])
