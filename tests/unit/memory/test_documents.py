from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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


def test_gaps_lie_inside_a_span_and_consume_no_position() -> None:
    starts = torch.tensor([[1, 0, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    padding = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    documents = Documents.from_starts(starts, padding)
    assert documents.gaps
    assert documents.spans == ((0, 0, 3), (0, 4, 5), (0, 5, 7), (1, 0, 5)), "the last is a document of padding"
    assert documents.runs == ((0, 0, 1), (0, 2, 3), (0, 4, 5), (0, 5, 7), (1, 0, 2), (1, 4, 5))
    assert documents.lengths == (2, 1, 2, 3)
    assert documents.positions.tolist() == [[0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 2, 0, 0, 0]]
    moved = documents.compacted
    assert moved.documents.spans == moved.documents.runs == ((0, 0, 2), (0, 4, 5), (0, 5, 7), (1, 0, 3))
    assert moved.documents.positions.tolist() == [[0, 1, 0, 0, 0, 0, 1, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    x = torch.arange(1, 17).view(2, 8)
    assert moved.take(x).tolist() == [[1, 3, 0, 0, 5, 6, 7, 0], [9, 10, 13, 0, 0, 0, 0, 0]]
    assert moved.put(moved.take(x)).tolist() == x.masked_fill(padding, 0).tolist()


def tables(starts: Tensor, padding: Tensor) -> dict[str, list]:
    """The boundaries of every row, slot by slot."""
    found: dict[str, list] = {"positions": [], "spans": [], "runs": [], "lengths": []}
    for row, (begun, empty) in enumerate(zip(starts.tolist(), padding.tolist(), strict=True)):
        positions, documents = [], []
        for slot, (start, blank) in enumerate(zip(begun, empty, strict=True)):
            if start:
                documents.append([])
            positions.append(0 if blank else len(documents[-1]))
            if not blank:
                documents[-1].append(slot)
        found["positions"].append(positions)
        for slots in filter(None, documents):
            found["spans"].append((row, slots[0], slots[-1] + 1))
            found["lengths"].append(len(slots))
            begins = [s for s in slots if s - 1 not in slots]
            ends = [s + 1 for s in slots if s + 1 not in slots]
            found["runs"] += [(row, b, e) for b, e in zip(begins, ends, strict=True)]
    return found


ROWS = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(st.sampled_from("s.p"), min_size=size, max_size=size), min_size=1, max_size=3)
)


def drawn(rows: list[list[str]]) -> Documents:
    starts = torch.tensor([[slot == "s" for slot in row] for row in rows])
    starts[:, 0] = True
    padding = torch.tensor([[slot == "p" for slot in row] for row in rows])
    padding[:, 0] = False
    return Documents.from_starts(starts, padding)


@settings(deadline=None, max_examples=100)
@given(ROWS)
def test_boundaries_are_those_of_the_loop(rows: list[list[str]]) -> None:
    documents = drawn(rows)
    padding = torch.zeros_like(documents.starts) if documents.padding is None else documents.padding
    expected = tables(documents.starts, padding)
    assert documents.positions.tolist() == expected["positions"]
    for name in ("spans", "runs", "lengths"):
        assert list(getattr(documents, name)) == expected[name]
    assert documents.gaps == (expected["spans"] != expected["runs"])
    held = list(zip(*(part.tolist() for part in documents.held), strict=True))
    assert held == [
        (row, slot, max(s for s in range(slot) if not padding[row, s]))
        for row, slot in padding.nonzero().tolist()
    ]


@settings(deadline=None, max_examples=100)
@given(ROWS, st.data())
def test_a_part_has_the_boundaries_of_its_slots(rows: list[list[str]], data: st.DataObject) -> None:
    whole = drawn(rows)
    slots = len(rows[0])
    begin = data.draw(st.integers(0, slots - 1))
    end = data.draw(st.integers(begin + 1, slots))
    part = whole.part(begin, end)
    assert part.whole is whole and part.begin == begin
    assert bool(part.starts[:, 0].all())
    assert torch.equal(part.starts[:, 1:], whole.starts[:, begin + 1 : end])
    assert torch.equal(part.positions, whole.positions[:, begin:end])
    assert part.continues.tolist() == [not row[begin] for row in whole.starts.tolist()]
    padding = torch.zeros_like(whole.starts) if whole.padding is None else whole.padding
    here = torch.zeros_like(part.starts) if part.padding is None else part.padding
    assert torch.equal(here, padding[:, begin:end])
    expected = tables(part.starts, here)
    assert list(part.runs) == expected["runs"]
    assert list(part.lengths) == expected["lengths"]
    # a document that goes on at slot 0 does so even where padding comes first
    ordinals = part.starts.long().cumsum(dim=1)
    moved = [
        (row, 0 if ordinals[row, first] == 1 and first and not whole.starts[row, begin] else first, last)
        for row, first, last in expected["spans"]
    ]
    assert list(part.spans) == moved
    assert part.gaps == (list(part.spans) != list(part.runs))

    inner = data.draw(st.integers(0, end - begin - 1))
    again = part.part(inner, end - begin)
    direct = whole.part(begin + inner, end)
    assert again.whole is whole and again.begin == direct.begin
    assert (again.spans, again.runs, again.gaps) == (direct.spans, direct.runs, direct.gaps)
    assert torch.equal(again.starts, direct.starts) and torch.equal(again.positions, direct.positions)
    assert again.to("cpu").whole.spans == whole.spans


@settings(deadline=None, max_examples=50)
@given(ROWS, st.data())
def test_compaction_moves_tokens_and_nothing_else(rows: list[list[str]], data: st.DataObject) -> None:
    whole = drawn(rows)
    documents = whole.part(data.draw(st.integers(0, len(rows[0]) - 1)), len(rows[0]))
    moved = documents.compacted
    assert not moved.documents.gaps and moved.documents.lengths == documents.lengths
    x = torch.randn(*documents.starts.shape, 2, dtype=torch.float64, requires_grad=True)
    taken = moved.take(x)
    for (row, begin, end), (_, at, to) in zip(documents.spans, moved.documents.spans, strict=True):
        tokens = [s for s in range(begin, end) if documents.padding is None or not documents.padding[row, s]]
        assert torch.equal(taken[row, at:to], x[row, tokens])
        assert moved.documents.positions[row, at:to].tolist() == documents.positions[row, tokens].tolist()
        assert at == begin and to <= end
    padding = torch.zeros_like(documents.starts) if documents.padding is None else documents.padding
    back = moved.put(taken)
    assert torch.equal(back, x.masked_fill(padding[..., None], 0))
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, (~padding[..., None]).expand_as(x).double())
    assert torch.autograd.gradcheck(moved.take, (x,)) and torch.autograd.gradcheck(moved.put, (x,))


@settings(deadline=None, max_examples=50)
@given(ROWS, st.integers(1, 4), st.data())
def test_later_documents_lack_their_first_slots(rows: list[list[str]], slots: int, data: st.DataObject) -> None:
    documents = drawn(rows)
    expected: dict[str, list] = {"spans": [], "runs": []}
    for (row, begin, end), count in zip(documents.spans, documents.lengths, strict=True):
        tokens = [s for s in range(begin, end) if documents.padding is None or not documents.padding[row, s]]
        assert len(tokens) == count
        rest = [s for s in tokens if s >= begin + slots]
        if rest:
            expected["spans"].append((row, rest[0], rest[-1] + 1))
            begins = [s for s in rest if s - 1 not in rest]
            ends = [s + 1 for s in rest if s + 1 not in rest]
            expected["runs"] += [(row, b, e) for b, e in zip(begins, ends, strict=True)]
    later = documents.later(slots)
    assert list(later.spans) == expected["spans"] and list(later.runs) == expected["runs"]
    assert later.gaps == (later.spans != later.runs)
    kept = torch.zeros_like(documents.starts)
    for row, begin, end in later.runs:
        kept[row, begin:end] = True
    assert torch.equal(later.padding, ~kept)
    assert all(bool(later.starts[row, begin]) for row, begin, _ in later.spans)
    begin = data.draw(st.integers(0, len(rows[0]) - 1))
    part, direct = documents.part(begin, len(rows[0])).later(slots), later.part(begin, len(rows[0]))
    assert (part.spans, part.runs, part.whole.runs) == (direct.spans, direct.runs, later.runs)


def test_what_lies_on_padding_is_not_moved() -> None:
    documents = Documents.from_starts(
        torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    )
    taken = documents.compacted.take(torch.tensor([[1.0, float("nan"), 2.0]]))
    assert taken.tolist() == [[1.0, 2.0, 0.0]]


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (2, 2), (0, 4), (3, 4)])
def test_a_part_of_slots_that_are_not_there(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match="no part of rows of 3"):
        Documents.unpacked(1, 3).part(begin, end)


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
    assert documents.part(0, 1).once(build) == 3


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
