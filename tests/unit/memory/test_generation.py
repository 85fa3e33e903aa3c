"""What a layer gives with a memory, step by step, is what it gives for the whole row without one.

The reference lays a row out as evaluation does: its open chunk is closed at the end of a prompt or turn. fp64, so that
both recall the same; C = 4, a window of two chunks (others where a case says so), R = 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mka_megatron.attention import blockmka, long_term
from mka_megatron.memory.tiers.pages import TierError
from mka_megatron.memory.tiers.store import TierStore
from tests.helpers.generated import CASES, HIDDEN, SHAPES, C, Case, Layer, Rows
from tests.helpers.numerics import assert_bitwise, assert_same
from tests.helpers.tier_pages import store as open_pages

GATED = [name for name, case in CASES.items() if case.variant not in ("mha", "mqa", "gqa", "mla")]
PAGED = [
    name for name, case in CASES.items() if case.l3 is not None and case.config.memory_hierarchy.l1.window
]


def shape(case: Case):
    return SHAPES[case.config.memory_hierarchy.l3.selection]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def pages(case: Case) -> Iterator[TierStore]:
    with open_pages(None, rows=None, shape=shape(case)) as opened:
        yield opened


def check(rows: Rows) -> None:
    for mine in rows.rows:
        if mine.tokens:
            assert_same(torch.stack(mine.outputs), mine.expected(rows.layer), terms=16 * len(mine.tokens))


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed"])
def test_every_prompt_length_around_the_chunk_edges(case: Case, closes: bool, pages: TierStore) -> None:
    layer = Layer(case)
    for length in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17):
        rows = Rows(layer, 1, pages, seed=length)
        rows.give([length])
        if closes:
            rows.close()
        for _ in range(7):
            rows.give([1])
        check(rows)
        rows.memory.close()
    assert pages.statistics().pages == 0


@pytest.mark.parametrize("width", [1, 3, 4, 5, 11])
def test_chunked_prefill(case: Case, width: int, pages: TierStore) -> None:
    rows = Rows(Layer(case), 2, pages)
    for begin in range(0, 42, width):
        rows.give([min(width, 42 - begin)] * 2)
    rows.close()
    for _ in range(3):
        rows.give([1, 1])
    check(rows)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_of_different_lengths_over_several_turns(case: Case, left: bool, pages: TierStore) -> None:
    """As each row alone: padding on either side, rows that end early and come back, turns of any length."""
    rows = Rows(Layer(case), 3, pages)
    rows.give([23, 5, 12], left)
    rows.close()
    for _ in range(5):
        rows.give([1, 1, 1])
    for _ in range(3):
        rows.give([1, 0, 1], left, width=1)
    rows.close([0, 2])
    rows.give([6, 0, 13], left)
    rows.give([2, 9, 1], left)
    rows.close()
    for _ in range(6):
        rows.give([1, 1, 1])
    assert rows.memory.tokens == [len(mine.tokens) for mine in rows.rows]
    check(rows)


@pytest.mark.parametrize("closed", [None, [0, 2], [1]], ids=str)
def test_a_row_that_ends_with_its_prompt(case: Case, closed: list[int] | None, pages: TierStore) -> None:
    rows = Rows(Layer(case), 3, pages)
    rows.give([22, 9, 1])
    rows.close(closed)
    for _ in range(C + 1):
        rows.give([1, 0, 1])
    rows.give([2, 3, 1])
    check(rows)


def test_rows_are_reordered_repeated_and_given_up(case: Case, pages: TierStore) -> None:
    rows = Rows(Layer(case), 2, pages)
    rows.give([18, 7])
    rows.close()
    rows.select([0, 0, 1, 1])
    for index in ([1, 0, 2, 2], [3, 0, 0, 2], [0, 1, 2, 3], [1, 1, 3, 0], [2, 3, 0, 1]):
        rows.give([1] * 4)
        rows.select(index)
    rows.give([6] * 4)
    rows.select([3, 1])
    for _ in range(5):
        rows.give([1, 1])
    check(rows)
    rows.memory.close()
    assert pages.statistics().pages == 0


def test_a_later_token_changes_no_bit(case: Case, pages: TierStore) -> None:
    """In prefill and decode, at every offset around chunk edges."""
    layer = Layer(case)
    cuts = [13, 4, 1, 1, 1, 5, 1, 1]
    x = torch.randn(2, sum(cuts), HIDDEN, dtype=torch.float64)

    def run(x: torch.Tensor) -> torch.Tensor:
        memory = layer.begun(2, pages)
        outs = []
        for part in x.split(cuts, dim=1):
            outs.append(layer.step(memory, part))
            if len(outs) == 3:
                memory.close_chunks()
        memory.close()
        return torch.cat(outs, dim=1)

    before = run(x)
    for time in (1, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 18, 19, 20, 22, 24, x.shape[1] - 1):
        changed = x.clone()
        changed[:, time:] = 3 * torch.randn_like(changed[:, time:])
        after = run(changed)
        assert_bitwise(after[:, :time], before[:, :time])
        assert not torch.equal(after[:, time], before[:, time])


@pytest.mark.parametrize("name", PAGED)
def test_pages_from_host_memory_and_disk_give_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]

    def run(pages: TierStore) -> torch.Tensor:
        rows = Rows(Layer(case), 2, pages)
        rows.give([40, 31])
        rows.close()
        rows.select([0, 1, 1])
        for _ in range(2 * C):
            rows.give([1, 1, 1])
        check(rows)
        return torch.stack([torch.stack(mine.outputs[-2 * C :]) for mine in rows.rows])

    with open_pages(None, rows=None, shape=shape(case)) as pages:
        expected = run(pages)
    with open_pages(tmp_path, rows=6, shape=shape(case)) as pages:
        found = run(pages)
        held = pages.statistics()
        assert held.ssd_pages > held.dram_pages and held.misses > 0
    assert_bitwise(found, expected)


def test_beams_share_pages() -> None:
    case = CASES["blockmka"]
    with open_pages(None, rows=None, shape=shape(case)) as pages:
        rows = Rows(Layer(case), 1, pages)
        rows.give([10 * C])
        before = pages.statistics().pages
        rows.select([0] * 4)
        for _ in range(C - 1):
            rows.give([1] * 4)
        assert pages.statistics().pages == before
        rows.give([1] * 4)
        assert pages.statistics().pages == before + 4 * rows.layer.groups


def test_the_dense_core_reads_rows_that_are_as_long_at_once() -> None:
    """Else the comparison of rows of different lengths shows nothing about the common case."""
    layer = Layer(CASES["gqa"])
    rows = Rows(layer, 3)
    rows.give([9] * 3)
    rows.give([1] * 3)
    check(rows)
    documents = rows.memory.pieces[0].documents
    assert documents.continued is not None and documents.whole_rows


def test_a_store_is_asked_for() -> None:
    with pytest.raises(ValueError, match="pass a store"):
        Layer(CASES["blockmka"]).begun(1)


def test_a_pass_without_tokens_is_refused() -> None:
    layer = Layer(CASES["gqa"])
    memory = layer.begun(2)
    with pytest.raises(ValueError, match="no new token"):
        layer.step(
            memory, torch.zeros(2, 1, HIDDEN, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.bool)
        )


CHUNKED = [name for name in CASES if Layer(CASES[name]).chunked]


@pytest.mark.parametrize("name", CHUNKED)
def test_an_open_chunk_selects_once_and_nothing_of_it_is_pooled(name: str, monkeypatch) -> None:
    case, calls = CASES[name], {"pooled": 0, "select_once": 0}

    def counted(called: str, real: Callable[..., object], *args: object, **kwargs: object) -> object:
        calls[called] += 1
        return real(*args, **kwargs)

    for module in (blockmka, long_term):
        for called in calls:
            monkeypatch.setattr(module, called, partial(counted, called, getattr(module, called)))
    with open_pages(None, rows=None, shape=shape(case)) as pages:
        rows = Rows(Layer(case), 2, pages)
        rows.give([4 * C + 1] * 2)
        rows.close()
        calls.update(pooled=0, select_once=0)
        selects = int(case.l3 is not None)
        for token in range(3 * C):
            rows.give([1, 1])
            begun, complete = token // C + 1, (token + 1) // C
            assert calls == {"pooled": complete, "select_once": selects * begun}
        check(rows)


@pytest.mark.parametrize("name", [*CHUNKED, "gqa", "fastmka"])
def test_a_token_is_put_where_there_is_room(name: str) -> None:
    """Tables and keys stay in place from token to token but for what has to grow."""
    case = CASES[name]

    def places(rows: Rows) -> set[int]:
        layer = rows.memory.layers[0]
        found = [*(x for pair in layer.caches for x in pair), *(x for x in layer.kept or () if x is not None)]
        found += [table.storage for table in layer.summaries or () if table is not None]
        found += [layer.near.k, layer.near.v] if layer.near is not None else []
        return {x.data_ptr() for x in found}

    with open_pages(None, rows=None, shape=shape(case)) as pages:
        rows = Rows(Layer(case), 2, pages)
        rows.give([4 * C + 1] * 2)
        rows.close()
        rows.give([1, 1])
        rows.give([1] * 2)
        before = places(rows)
        for _ in range(2 * C):
            rows.give([1, 1])
            rows.select([0, 1])
        assert before and places(rows) == before


def test_rows_end_and_begin_while_a_chunk_is_open(case: Case, pages: TierStore) -> None:
    """What the others recall does not depend on it, nor on how their chunks' numbers change."""
    rows = Rows(Layer(case), 3, pages)
    rows.give([26, 15, 0], width=26)
    rows.close()
    for counts in ([1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 7], [0, 0, 1], [1, 1, 1], [3, 1, 2], [1, 1, 1]):
        rows.give(counts)
    rows.close([1])
    for _ in range(C + 1):
        rows.give([1, 1, 1])
    check(rows)


def test_rows_that_an_error_stopped_go_no_further_but_can_be_given_up() -> None:
    layer = Layer(CASES["blockmka"])
    with open_pages(None, rows=None, shape=SHAPES["hash"]) as pages:
        rows = Rows(layer, 2, pages)
        rows.give([9, 9])
        rows.memory.begin(1)
        with pytest.raises(ZeroDivisionError):
            rows.memory.attend(0, lambda *_: 1 // 0, *layer.raw(torch.zeros(2, 1, HIDDEN, dtype=torch.float64)))
        for act in (lambda: rows.give([1, 1]), rows.memory.close_chunks, lambda: rows.memory.select([1, 0])):
            with pytest.raises(RuntimeError, match="begin a new generation") as caught:
                act()
            assert str(caught.value).count(". ") == 0
        rows.memory.close()
        assert pages.statistics().pages == 0


def test_a_full_store_stops_the_rows() -> None:
    with open_pages(None, rows=6, shape=SHAPES["hash"]) as pages:
        rows = Rows(Layer(CASES["blockmka"]), 1, pages)
        with pytest.raises(TierError, match="no room"):
            rows.give([9 * C])
        with pytest.raises(RuntimeError, match="begin a new generation"):
            rows.give([1])
