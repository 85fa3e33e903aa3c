"""Orders that a resumed run must find again."""

from __future__ import annotations

import numpy as np
import pytest

from mka_megatron.data.shuffle import permutation, scatter, uniform


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 257])
def test_scatter_and_permutation_visit_everything_once(count: int) -> None:
    for key in range(3):
        assert sorted(scatter(i, count, "rows", key) for i in range(count)) == list(range(count))
        assert sorted(permutation(count, "documents", key)) == list(range(count))


def test_the_key_decides_the_order() -> None:
    def orders(*key: int | str) -> list[int]:
        return [scatter(i, 1000, *key) for i in range(1000)] + permutation(1000, *key).tolist()

    assert orders("rows", 1, 0) == orders("rows", 1, 0)
    different = [orders("rows", 1, 0), orders("rows", 2, 0), orders("rows", 1, 1), orders("documents", 1, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_scatter_leaves_little_in_place() -> None:
    order = np.array([scatter(i, 10_000, 7) for i in range(10_000)])
    assert (order == np.arange(10_000)).sum() < 20
    assert (np.abs(np.diff(order)) == 1).sum() < 20
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_element_i_does_not_depend_on_the_count() -> None:
    assert np.array_equal(uniform(10, "x"), uniform(1000, "x")[:10])
    assert uniform(0, "x").shape == (0,)


def test_orders_are_pinned() -> None:
    """A change of these orders would break the resume of every run in flight."""
    assert permutation(8, "documents", 1234, 0).tolist() == [5, 7, 3, 6, 4, 2, 0, 1]
    assert [scatter(i, 8, "rows", 1234, 0) for i in range(8)] == [2, 7, 5, 4, 3, 6, 1, 0]


def test_scatter_refuses_what_is_not_there() -> None:
    with pytest.raises(IndexError, match="outside"):
        scatter(5, 5, 1)
