"""The plans of block_attention's kernels, made on the CPU, against the rule for single pairs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mka_megatron.ops.block_attention import cuda
from tests.helpers import block_oracle
from tests.helpers.block_cases import Case, make_case
from tests.helpers.block_oracle import Pages, Table
from tests.helpers.c_api import struct_fields

WINDOW, SUMMARY, RECALLED = range(3)


class Plan:
    """What mka_plan_block makes of a call, read entry by entry."""

    def __init__(self, library: ctypes.CDLL, args: cuda.Args) -> None:
        self.library, self.args = library, args
        library.mka_plan_block_queries.restype = ctypes.c_int64
        library.mka_plan_block_tiles.restype = ctypes.c_int64
        self.bytes = cuda.workspace_bytes(library, args, True)
        # nothing of it may matter; the parts of dK and dV behind the plan are not touched
        self.workspace = torch.empty(self.bytes, dtype=torch.uint8)
        self.workspace[: 1 << 20] = 0xA5
        args.workspace = self.workspace.data_ptr()
        assert library.mka_plan_block(ctypes.byref(args)) == 0
        self.split, self.targets, self.room, self.slots, self.reductions = self.call("sizes", 5)

    def call(self, name: str, found: int, *numbers: int) -> tuple[int, ...]:
        out = (ctypes.c_int64 * found)()
        entry = getattr(self.library, f"mka_plan_block_{name}")
        entry(ctypes.byref(self.args), *map(ctypes.c_int64, numbers), out)
        return tuple(out)

    def tiles(self, tile: int, *at: int) -> Iterator[tuple[int, ...]]:
        numbers = [ctypes.c_int64(x) for x in (tile, *at)]
        for t in range(self.library.mka_plan_block_tiles(ctypes.byref(self.args), *numbers)):
            yield self.call("tile", 6, tile, *at, t)

    def sees(self, row: int, chunk: int, number: int) -> bool:
        numbers = map(ctypes.c_int64, (row, chunk, number))
        return bool(self.library.mka_plan_block_summary(ctypes.byref(self.args), *numbers))

    def items(self) -> list[tuple[int, ...]]:
        """(target, pair, begin, end, slot) of those that are used, which come first."""
        found = [self.call("item", 5, i) for i in range(self.room)]
        used = [item for item in found if item[0] >= 0]
        assert all(item[0] < 0 for item in found[len(used) :]), "unused items lie behind the used ones"
        return used

    def check_parts(self, pairs: int) -> dict[tuple[int, int], int]:
        """Every target has its visits in as many even parts as there should be, in order, with slots of their own, and
        a reduction where they are several. Returns the visits by (pair, target)."""
        parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        used = self.items()
        for target, pair, begin, end, slot in used:
            parts.setdefault((pair, target), []).append((begin, end, slot))
        assert set(parts) == {(p, t) for p in range(pairs) for t in range(self.targets)}
        weights = [2 * (end - begin) >= self.split for _, _, begin, end, _ in used]
        assert weights == sorted(weights, reverse=True), "those with many visits first"
        slots = sorted(slot for *_, slot in used if slot >= 0)
        assert slots == list(range(len(slots))) and len(slots) <= self.slots
        reductions = [self.call("reduction", 4, i) for i in range(self.reductions)]
        reduced = {(pair, target): list(range(slot, slot + n)) for target, pair, slot, n in reductions if target >= 0}
        assert all(target < 0 for target, *_ in reductions[len(reduced) :])
        for key, of_target in parts.items():
            ends = [0, *(end for _, end, _ in of_target)]
            assert [begin for begin, _, _ in of_target] == ends[:-1]
            lengths = [end - begin for begin, end, _ in of_target]
            assert len(lengths) == max(1, ends[-1] // self.split) and max(lengths) - min(lengths) <= 1
            assert reduced.pop(key, [-1]) == [slot for *_, slot in of_target]
        assert not reduced
        return {key: of_target[-1][1] for key, of_target in parts.items()}


def arguments(case: Case) -> cuda.Args:
    """Of a case whose tensors are never read; the numbers of channels and the dtype are some."""
    pages = case.pages
    size = case.table.size
    given = (case.q, case.k, case.v, *(case.summaries or (None, None)))
    given += (None, None, None, None) if pages is None else (pages.k, pages.v, pages.lengths, pages.index)
    given += (None, case.table.lengths, case.table.documents)
    given = tuple(x.to(torch.bfloat16) if x is not None and x.is_floating_point() else x for x in given)
    args = cuda.arguments(given, (size, case.table.first, case.window // size, 1.0, 0))
    args.channels, args.kept = 64, given
    return args


@dataclass
class Seen:
    """How often each (query slot, key) of a row and KV head is met at which level, in the oracle's order of keys."""

    times: Tensor
    level: Tensor

    @staticmethod
    def nothing(slots: int, keys: int) -> Seen:
        return Seen(torch.zeros(slots, keys, dtype=torch.int64), torch.full((slots, keys), -1))

    def meet(self, slots: slice, keys: slice, level: int, mask: Tensor) -> None:
        self.times[slots, keys] += mask
        self.level[slots, keys] = torch.where(mask, level, self.level[slots, keys])

    def assert_is(self, wanted: Tensor) -> None:
        assert torch.equal(self.times, (wanted >= 0).long()), "every visible pair is met once, no other is"
        assert torch.equal(self.level, wanted)


class Bench:
    """A case, its plan, and how the kernels read both."""

    def __init__(self, library: ctypes.CDLL, case: Case) -> None:
        self.case, self.table = case, case.table
        self.levels: dict[tuple[int, int], Tensor] = {}
        self.plan = Plan(library, arguments(case))
        self.rows, self.slots = case.q.shape[:2]
        self.groups, self.w = case.k.shape[2], case.window // self.table.size
        self.summaries = 0 if case.summaries is None else case.summaries[0].shape[1]
        self.halo = min(self.w - 1, self.table.first)
        held = (self.halo + self.table.count) * self.table.size
        stored = 0 if case.pages is None else case.pages.k.shape[2]
        # of rows at hand, summaries, pages
        self.offsets = (0, held, held + self.summaries)
        self.keys = held + self.summaries + stored * self.table.size

    def wanted(self, row: int, group: int) -> Tensor:
        if (row, group) not in self.levels:
            self.levels[row, group] = block_oracle.levels(
                self.table, self.slots, self.case.window, row, group, self.summaries, self.case.pages
            )
        return self.levels[row, group]

    def queries(self, row: int, chunk: int) -> slice:
        """The slots of a chunk's tokens."""
        size = self.table.size
        tokens = int(self.table.lengths[row, self.table.first + chunk])
        return slice(chunk * size, min(chunk * size + tokens, self.slots))

    def meet(
        self, seen: Seen, row: int, chunk: int, level: int, source: int, begin: int, count: int, after: int | None
    ) -> None:
        """after: slot of the chunk before which its queries do not see the first key; None: they all see it."""
        queries = self.queries(row, chunk)
        held = self.halo * self.table.size + self.slots
        assert count == 0 or begin + count <= (held, self.summaries, self.keys - self.offsets[2])[source], "in bounds"
        height = queries.stop - queries.start
        mask = torch.ones(height, count, dtype=torch.bool)
        if after is not None:
            mask = torch.arange(height)[:, None] >= after + torch.arange(count)
        if source == 1:
            mask &= torch.tensor([self.plan.sees(row, chunk, begin + c) for c in range(count)], dtype=torch.bool)
        first = self.offsets[source] + begin
        seen.meet(queries, slice(first, first + count), level, mask)

    def check_forward(self, tile: int) -> None:
        for row in range(self.rows):
            for group in range(self.groups):
                seen = Seen.nothing(self.slots, self.keys)
                for chunk in range(self.table.count):
                    order = []
                    for level, source, begin, slot, count, diagonal in self.plan.tiles(tile, row, group, chunk):
                        assert 0 <= count <= min(tile, tile if source == 1 else self.table.size)
                        assert source == 1 or begin % self.table.size == slot
                        assert source != 1 or begin % tile == 0
                        order.append((level, not diagonal))
                        self.meet(seen, row, chunk, level, source, begin, count, slot if diagonal else None)
                    assert order == sorted(order), "the diagonal first, then level by level"
                seen.assert_is(self.wanted(row, group))

    def check_backward(self) -> None:
        pairs = [(row, group) for row in range(self.rows) for group in range(self.groups)]
        seen = [Seen.nothing(self.slots, self.keys) for _ in pairs]
        for number, (_, pair, begin, end, _) in enumerate(self.plan.items()):
            source, first, count, _ = self.plan.call("target", 4, number)
            recalling = []
            for visit in range(begin, end):
                chunk, level, diagonal = self.plan.call("visit", 3, number, visit)
                assert 0 <= chunk < self.table.count
                if level == RECALLED:
                    recalling.append(chunk)
                if level >= 0:
                    row = pairs[pair][0]
                    self.meet(seen[pair], row, chunk, level, source, first, count, 0 if diagonal else None)
            assert recalling == sorted(set(recalling)), "the recalling chunks ascend"
        self.plan.check_parts(len(pairs))
        for pair, (row, group) in enumerate(pairs):
            seen[pair].assert_is(self.wanted(row, group))

    def check_queries(self, heads: int) -> None:
        """Every packed query row once, late chunks first, the tiles of a KV head side by side."""
        fan, size = heads // self.groups, self.table.size
        self.plan.args.heads = heads
        tiles = -(-fan * size // 128)
        blocks = self.table.count * self.rows * self.groups * tiles
        found = []
        out = (ctypes.c_int64 * 4)()
        for block in range(blocks):
            many = self.plan.library.mka_plan_block_queries(
                ctypes.byref(self.plan.args), ctypes.c_int64(block), out
            )
            assert many == blocks
            found.append(tuple(out))
        assert set(found) == {
            (row, group, chunk, tile * 128)
            for row in range(self.rows)
            for group in range(self.groups)
            for chunk in range(self.table.count)
            for tile in range(tiles)
        }
        assert [chunk for _, _, chunk, _ in found] == sorted((at[2] for at in found), reverse=True)
        assert all(found[i][:3] == found[i - i % tiles][:3] for i in range(blocks))


# Every chunk of every row as (tokens, document), of 64 tokens.
ROWS = {
    "one document": [[(64, 0)] * 6] * 2,
    "ragged": [[(64, 0)] * 5 + [(3, 0)], [(64, 0)] * 3 + [(64, 1)] * 2 + [(1, 1)]],
    "less than a chunk": [[(5, 0)]],
    "a document per chunk": [[(64, n) for n in range(5)], [(7 * n + 1, n) for n in range(5)]],
    "packed": [[(64, 0)] * 3 + [(2, 0), (64, 1), (64, 1), (9, 2)], [(64, 0), (1, 0), (6, 1)] + [(64, 2)] * 4],
    "empty chunks": [
        [(64, 0), (64, 0), (0, 0), (9, 0), (0, 0), (64, 0), (64, 0)],
        [(0, 0), (64, 1), (64, 1), (64, 1), (2, 1), (0, 0), (0, 0)],
    ],
    "a row of nothing": [[(0, 0)] * 3, [(64, 0)] * 3],
}  # fmt: skip
CASES = {
    **{rows: {"rows": rows} for rows in ROWS},
    "ragged slots": {"rows": "one document", "missing": 60},
    "seven query heads per KV head": {"rows": "ragged", "heads": (7, 1)},
    "no summaries": {"rows": "packed", "summaries": False},
    "nothing recalled": {"rows": "packed", "recalled": 0},
    "window alone": {"rows": "one document", "recalled": 0, "summaries": False, "window": 3},
    "window of one chunk": {"rows": "empty chunks", "window": 1},
    "window longer than the row": {"rows": "packed", "window": 9},
    "a part, its halo short": {"rows": "packed", "first": 1, "window": 3},
    "a part with pages": {"rows": "one document", "first": 4, "recalled": 3},
    "a part with pages, no halo": {"rows": "empty chunks", "first": 5, "window": 1, "recalled": 3},
    "a part whose halo spans it": {"rows": "packed", "first": 6, "window": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_lists_are_the_rule_for_pairs(library: ctypes.CDLL, name: str) -> None:
    changes = {"channels": 1, "bias": "none", **CASES[name]}
    bench = Bench(library, make_case(64, ROWS[changes.pop("rows")], **changes))
    bench.check_forward(64)
    bench.check_forward(128)
    bench.check_backward()
    bench.check_queries(bench.case.q.shape[2])


@pytest.mark.parametrize("tile", [64, 128])
def test_chunks_of_128(library: ctypes.CDLL, tile: int) -> None:
    """Of which tiles of 64 rows are halves."""
    rows = [[(128, 0), (70, 0), (128, 0), (128, 1), (64, 1)]]
    bench = Bench(library, make_case(128, rows, window=1, first=1, heads=(3, 1), channels=1, bias="none", missing=40))
    bench.check_forward(tile)
    bench.check_backward()
    bench.check_queries(3)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Rows of documents with padding anywhere; recalls of anything that has tokens before the window, or of nothing."""
    batch, number = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    rows = []
    for _ in range(batch):
        document, row = 0, []
        for _ in range(number):
            document += draw(st.sampled_from([0, 0, 0, 1, 3]))
            row.append((draw(st.sampled_from([64, 64, 64, 0, 1, 17])), document))
        rows.append(row)
    return make_case(
        64,
        rows,
        window=draw(st.sampled_from([1, 2, 3, 8])),
        first=draw(st.integers(0, number - 1)),
        missing=draw(st.sampled_from([0, 0, 1, 63])),
        heads=draw(st.sampled_from([(1, 1), (4, 2)])),
        channels=1,
        recalled=draw(st.integers(0, 4)),
        summaries=draw(st.booleans()),
        bias="none",
        seed=draw(st.integers(0, 100)),
    )


@settings(deadline=None, max_examples=40)
@given(any_case(), st.sampled_from([64, 128]))
def test_lists_of_anything(library: ctypes.CDLL, case: Case, tile: int) -> None:
    bench = Bench(library, case)
    bench.check_forward(tile)
    bench.check_backward()


def test_recalls_of_nothing_and_of_what_is_no_place(library: ctypes.CDLL) -> None:
    case = make_case(64, ROWS["one document"], channels=1, bias="none")
    assert case.pages is not None
    for number in (-7, 1 << 40):
        index = torch.full_like(case.pages.index, number)
        bench = Bench(library, replace(case, pages=replace(case.pages, index=index)))
        nothing = replace(case, pages=replace(case.pages, index=torch.full_like(index, -1)))
        bench.wanted = Bench(library, nothing).wanted  # type: ignore[method-assign]
        bench.check_forward(64)
        bench.check_backward()


def long_case(
    slots: int, *, size: int = 128, window: int = 16, recalled: int = 16, groups: int = 1, hot: int = 0
) -> Case:
    """A document of so many tokens; `hot`: chunks of the row's beginning that everybody recalls as soon as it may."""
    count = slots // size
    index = torch.full((1, count, groups, recalled), -1)
    generator = torch.Generator().manual_seed(0)
    for chunk in range(window, count):
        for group in range(groups):
            index[0, chunk, group, :hot] = torch.arange(hot).clamp_max(chunk - window)
            others = hot + torch.randint(0, chunk - window + 1, (recalled - hot,), generator=generator)
            others = others[others <= chunk - window].unique()
            index[0, chunk, group, hot : hot + len(others)] = others
    index[0, : window + hot, :, :hot] = -1
    one = torch.zeros(1).expand(1, slots, groups, 1)
    summaries = torch.zeros(1).expand(1, count, groups, 1)
    table = Table(size, torch.full((1, count), size), torch.zeros(1, count, dtype=torch.int64), 0, count)
    lengths = torch.zeros(1, groups, 0, dtype=torch.int64)
    pages = Pages(torch.zeros(1, groups, 0, size, 1), torch.zeros(1, groups, 0, size, 1), lengths, index)
    return Case(table, one, one, one, (summaries, summaries), pages, None, window * size)


@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("slots", [1 << 15, 1 << 18, 1 << 20])
def test_long_rows(library: ctypes.CDLL, slots: int, hot: int) -> None:
    """Visits by target, chunk by chunk, up to 1M tokens; a target that everybody visits is split."""
    case = long_case(slots, hot=hot)
    plan = Plan(library, arguments(case))
    count, w, size = case.table.count, 16, case.table.size
    assert case.pages is not None
    named = case.pages.index[0, :, 0].flatten()
    recalls = named[named >= 0].bincount(minlength=count)
    numbers = torch.arange(count)
    near = (count - numbers).clamp_max(w)
    behind = (count - (torch.arange(-(-count // size)) * size + w)).clamp_min(0)
    wanted = torch.cat([near + recalls, behind])
    visits = plan.check_parts(1)
    assert torch.equal(wanted, torch.tensor([visits[0, target] for target in range(plan.targets)]))
    used = plan.items()
    if hot and count > 1024:
        assert any(slot >= 0 for *_, slot in used), "some targets are split"
    for number in range(0, len(used), max(1, len(used) // 200)):
        target, _, begin, *_ = used[number]
        if target < count and begin == 0:
            chunks = [plan.call("visit", 3, number, v)[0] for v in range(int(wanted[target]))]
            window = list(range(target, target + int(near[target])))
            recalling = (case.pages.index[0, :, 0] == target).any(dim=1).nonzero().flatten().tolist()
            assert chunks == window + recalling


@pytest.mark.parametrize("window", [16, 1 << 14])
def test_the_workspace_stays_small(library: ctypes.CDLL, window: int) -> None:
    """Also for the window that spans the row, and whatever is recalled."""
    for slots in (1 << 12, 1 << 15, 1 << 18, 1 << 20):
        args = arguments(long_case(slots, window=window, groups=1))
        args.groups, args.heads, args.channels = 4, 28, 128
        plan = 4 * args.heads * slots + 4 * (slots // 128) ** 2 // 8
        parts = 2048 * 2 * 128 * 128 * 4
        assert plan < cuda.workspace_bytes(library, args, True) < 1.1 * (plan + parts) + (1 << 23)
        assert cuda.workspace_bytes(library, args, False) < 1 << 20


def test_rows_beyond_32_bits_of_elements(library: ctypes.CDLL) -> None:
    """A part of a row of 4M tokens, far behind: numbers of rows, whose products with strides are the kernels'."""
    number, origin, pages = 1 << 16, 40_000, 20_000
    documents = (torch.arange(number) >= origin).long()[None]
    table = Table(64, torch.full((1, number), 64), documents, number - 3, 3)
    index = torch.tensor([[0, 3 + pages], [4 + pages, -1], [1, 0]]).view(1, 3, 1, 2)
    stored, lengths = torch.zeros(1).expand(1, 1, pages + 1, 64, 1), torch.full((1, 1, pages + 1), 64)
    q, k, summaries = (torch.zeros(1).expand(1, many, 1, 1) for many in (192, 256, number))
    case = Case(table, q, k, k, (summaries, summaries), Pages(stored, stored, lengths, index), None, 128)
    plan = Plan(library, arguments(case))
    tiles = list(plan.tiles(128, 0, 0, 1))
    assert [tile for tile in tiles if tile[0] == RECALLED] == [(2, 2, pages * 64, 0, 64, 0), (2, 0, 0, 0, 0, 0)]
    summed = [tile for tile in tiles if tile[0] == SUMMARY]
    seen = number - 3  # the chunk is the last but one, its window two chunks
    assert [tile[2] for tile in summed] == list(range(origin // 128 * 128, seen, 128)), "from the document's first on"
    assert [tile[4] for tile in summed] == [min(128, seen - tile[2]) for tile in summed]
    assert not plan.sees(0, 1, origin - 1) and plan.sees(0, 1, origin) and plan.sees(0, 1, seen - 1)


def test_the_struct_is_that_of_the_header() -> None:
    assert cuda.Args._fields_ == struct_fields("MkaBlockAttentionArgs")
