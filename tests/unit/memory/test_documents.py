from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mka_megatron.memory.documents import Documents


def test_positions_and_spans_of_a_packed_row() -> None:
    starts = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    documents = Documents.from_starts(starts)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert documents.spans == ((0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 6))
    assert documents.packed and not documents.whole_rows
    assert [tuple(range(6))[times] for _, times in documents.regions] == [
        (0, 1, 2),
        (3, 4),
        (5,),
        (0, 1, 2, 3, 4, 5),
    ]


def test_padding_is_in_no_span() -> None:
    starts = torch.tensor(
        [[1, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool
    )
    padding = torch.tensor(
        [[0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool
    )
    documents = Documents.from_starts(starts, padding)
    assert documents.spans == ((0, 0, 2), (0, 4, 6), (1, 0, 5))
    assert documents.positions.tolist() == [[0, 1, 0, 0, 0, 1, 0], [0, 1, 2, 3, 4, 0, 0], [0] * 7]
    assert list(zip(*(part.tolist() for part in documents.held), strict=True)) == [
        (0, 2, 1), (0, 3, 1), (0, 6, 5), (1, 5, 4), (1, 6, 4),
    ]  # fmt: skip
    assert documents.heads == ((2, 7),)


def test_one_document_a_row_is_one_region() -> None:
    documents = Documents.unpacked(3, 5)
    again = Documents.from_starts(documents.starts, torch.zeros(3, 5, dtype=torch.bool))
    for each in (documents, again):
        assert each.padding is None and each.whole_rows
        assert each.regions == ((slice(None), slice(None)),)
        assert each.spans == ((0, 0, 5), (1, 0, 5), (2, 0, 5))
        assert each.positions.tolist() == [[0, 1, 2, 3, 4]] * 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_spans_cover_every_token_once(rows: list[list[bool]]) -> None:
    starts = torch.tensor(rows)
    starts[:, 0] = True
    documents = Documents.from_starts(starts)
    covered = torch.zeros_like(starts, dtype=torch.int64)
    for row, begin, end in documents.spans:
        covered[row, begin:end] += 1
        assert bool(starts[row, begin]) and not bool(starts[row, begin + 1 : end].any())
        assert documents.positions[row, begin:end].tolist() == list(range(end - begin))
    assert bool((covered == 1).all())
    assert list(documents.spans) == sorted(documents.spans)


def test_derived_values_are_computed_once() -> None:
    documents = Documents.unpacked(1, 2)
    calls = []

    def build(given: Documents) -> int:
        calls.append(given)
        return len(calls)

    assert documents.once(build) == documents.once(build) == 1
    assert calls == [documents]
    assert documents.to("cpu").once(build) == 2


@pytest.mark.parametrize(
    ("starts", "padding", "message"),
    [
        ([[False, True]], None, r"starts\[:, 0\] is False"),
        ([[True, False, True, False]], [[False, False, True, False]], "row 0: a document starts on padding"),
        ([[True, False]], [[False]], "padding has shape"),
    ],
)
def test_layouts_that_cannot_be(starts, padding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Documents.from_starts(torch.tensor(starts), None if padding is None else torch.tensor(padding))


def test_starts_must_be_bool() -> None:
    with pytest.raises(ValueError, match="int64"):
        Documents.from_starts(torch.ones(1, 2, dtype=torch.int64))
