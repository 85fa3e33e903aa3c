"""The decode's kernels run lane by lane and thread by thread on the CPU, through the library, against the reference;
and the plan of which split attends which keys."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mka_megatron.memory.hashing import planes
from mka_megatron.ops import decode
from mka_megatron.ops import library as package_library
from mka_megatron.ops.decode import Cache, Hashing, cuda, structs
from tests.helpers.c_api import struct_fields
from tests.helpers.decode_rows import Rows, generate, new_cache
from tests.helpers.host_decode import register_decode
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same
from tests.unit.kernels.conftest import REPOSITORY

HALVES = (torch.bfloat16, torch.float16)
TILE = 16


@pytest.fixture(scope="module", autouse=True)
def host(library: ctypes.CDLL) -> Iterator[None]:
    """Backend "cuda" on CPU tensors, as for a GPU of three processors."""
    register_decode(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "processors", lambda device: 3)
        patch.setattr(package_library, "library", lambda: library)
        yield


def plan(library: ctypes.CDLL, name: str, *numbers: int) -> int:
    function = getattr(library, f"mka_plan_decode_{name}")
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, numbers))


def test_structs_are_those_of_the_header() -> None:
    for name in ("AttendArgs", "FuseArgs", "AppendArgs", "CloseArgs"):
        assert getattr(structs, name)._fields_ == struct_fields(f"MkaDecode{name}")


@settings(deadline=None, max_examples=200)
@given(
    own=st.integers(-1, 60),
    window=st.integers(1, 70),
    size=st.integers(1, 140),
    summarised=st.booleans(),
    recalled=st.integers(0, 9),
    splits=st.integers(1, 128),
)
def test_every_key_is_attended_once_and_in_order(
    library: ctypes.CDLL, own: int, window: int, size: int, summarised: bool, recalled: int, splits: int
) -> None:
    tiles = plan(library, "tiles", own, window, size, int(summarised), recalled)
    ends = [plan(library, "split", tiles, splits, s) for s in range(splits + 1)]
    assert ends[0] == 0 and ends[-1] == tiles
    assert all(a <= b <= a + -(-tiles // splits) for a, b in pairwise(ends))
    found: list[tuple[int, int, int]] = []
    out = (ctypes.c_int64 * 3)()
    for t in range(tiles):
        library.mka_plan_decode_tile(*map(ctypes.c_int64, (own, window, size, int(summarised), recalled, t)), out)
        level, chunk, begin = out
        for i in range(TILE):
            if level == 1 and chunk + i <= own - window:
                found.append((1, chunk + i, 0))
            if level != 1 and begin + i < size:
                found.append((level, chunk, begin + i))
    near = [(0, chunk, slot) for chunk in range(max(0, own - window + 1), own + 1) for slot in range(size)]
    summaries = [(1, chunk, 0) for chunk in range(max(0, own - window + 1))] if summarised else []
    far = [(2, rank, slot) for rank in range(recalled) for slot in range(size)]
    assert found == ([*near, *summaries, *far] if own >= 0 else [])


@settings(deadline=None)
@given(pairs=st.integers(1, 2000), tiles=st.integers(0, 20000), processors=st.integers(1, 200))
def test_splits_fill_the_processors_and_leave_every_warp_a_tile(
    library: ctypes.CDLL, pairs: int, tiles: int, processors: int
) -> None:
    splits = plan(library, "splits", pairs, tiles, processors)
    assert 1 <= splits <= 128
    assert splits == 1 or (pairs * splits <= 2 * processors and 4 * (splits - 1) < tiles)
    assert splits == 128 or pairs * (splits + 1) > 2 * processors or 4 * splits >= tiles


def random_cache(
    batch: int, groups: int, channels: int, size: int, chunks: int, window: int, recalled: int, l2: bool,
    dtype: torch.dtype,
) -> Cache:  # fmt: skip
    """Sequences of different lengths with short and empty chunks, the last idle; NaN where there is no token."""
    cache = Cache.empty(
        batch, groups, channels, chunks=chunks, size=size, pages=batch * groups * chunks + 2, dtype=dtype,
        summaries=l2, words=int(recalled > 0), recalled=recalled,
    )  # fmt: skip
    cache.table.copy_(torch.randperm(len(cache.k))[: cache.table.numel()].view_as(cache.table))
    cache.chunk.copy_(torch.randint(0, chunks, (batch,)))
    cache.chunk[0] = chunks - 1
    numbers = torch.arange(chunks)
    short = torch.rand(batch, chunks) < 0.4
    cache.lengths.copy_(torch.where(short, torch.randint(0, size, (batch, chunks)), size))
    own = cache.chunk[:, None]
    cache.lengths.copy_(torch.where(numbers == own, cache.lengths.clamp_min(1), cache.lengths) * (numbers <= own))
    empty = torch.arange(size) >= cache.lengths[:, None, :, None]
    for pages in (cache.k, cache.v):
        tokens = torch.randn(batch, groups, chunks, size, channels).masked_fill(empty[..., None], math.nan)
        pages.fill_(math.nan)
        pages[cache.table.long()] = tokens.to(dtype)
    for x in (cache.summary_k, cache.summary_v):
        if x is not None:
            x.copy_(torch.randn(x.shape).masked_fill((cache.lengths == 0)[:, None, :, None], math.nan))
    if cache.recalled is not None:
        for row in range(batch):
            for head in range(groups):
                pick = torch.randperm(max(0, int(cache.chunk[row]) - window + 1))[:recalled].sort().values
                cache.recalled[row, head, : len(pick)] = pick.int()
    if batch > 2:
        cache.chunk[-1] = -1
    cache.table[0, 0, 0] = -1
    return cache


def doubled(cache: Cache) -> Cache:
    return replace(cache, **{
        f.name: x.double() for f in fields(cache)
        if (x := getattr(cache, f.name)) is not None and x.is_floating_point()
    })  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", cuda.CHANNELS)
@pytest.mark.parametrize(
    "batch, groups, fan, size, chunks, window, recalled, l2, bias_groups",
    [
        (3, 1, 7, 64, 6, 2, 2, True, 1),
        (2, 2, 4, 32, 40, 3, 4, True, 2),
        (1, 1, 16, 128, 5, 1, 2, True, 0),
        (3, 2, 1, 20, 5, 9, 0, False, 0),
        (2, 1, 3, 16, 30, 1, 0, True, 1),
        (2, 1, 2, 128, 3, 1, 2, False, 1),
    ],
)
def test_attention(
    batch: int, groups: int, fan: int, size: int, chunks: int, window: int, recalled: int, l2: bool, bias_groups: int,
    channels: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    cache = random_cache(batch, groups, channels, size, chunks, window, recalled, l2, dtype)
    q = torch.randn(batch, groups * fan, channels).to(dtype)
    bias = torch.randn(batch, bias_groups, 3) if bias_groups else None
    options = {"window": window * size, "scale": channels**-0.5}
    found = decode.attend(cache, q, bias, **options, backend="cuda")
    exact = decode.attend(doubled(cache), q.double(), None if bias is None else bias.double(), **options)
    assert_as_accurate(found, decode.attend(cache, q, bias, **options), exact)
    if batch > 2:
        assert not bool(found[-1].any())
    assert_bitwise(decode.attend(cache, q, bias, **options, backend="cuda"), found)


@pytest.mark.parametrize("splits", [1, 2, 5, 128])
def test_any_number_of_splits_gives_the_same(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cache = random_cache(2, 1, 64, 32, 8, 2, 2, True, torch.float16)
    q = torch.randn(2, 7, 64).half() * 4
    options = {"window": 64, "scale": 0.5}
    monkeypatch.setattr(cuda, "choose_splits", lambda *_: splits)
    found = decode.attend(cache, q, None, **options, backend="cuda")
    exact = decode.attend(doubled(cache), q.double(), None, **options)
    assert_as_accurate(found, decode.attend(cache, q, None, **options), exact)


def test_levels_of_minus_infinity_are_not_read() -> None:
    torch.manual_seed(0)
    cache = random_cache(1, 1, 64, 32, 8, 2, 2, True, torch.float16)
    assert cache.summary_k is not None and cache.recalled is not None
    q, bias = torch.randn(1, 2, 64).half(), torch.tensor([[[0.5, -math.inf, -math.inf]]])
    without = replace(cache, summary_k=None, summary_v=None, recalled=None)
    found = decode.attend(cache, q, bias, window=64, scale=0.125, backend="cuda")
    cache.summary_k.fill_(math.nan)
    assert_bitwise(decode.attend(cache, q, bias, window=64, scale=0.125, backend="cuda"), found)
    exact = decode.attend(doubled(without), q.double(), None, window=64, scale=0.125)
    assert_as_accurate(found, decode.attend(without, q, None, window=64, scale=0.125), exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("l2, l3", [(False, False), (True, False), (False, True), (True, True)])
def test_a_sequence_token_by_token(l2: bool, l3: bool, dtype: torch.dtype) -> None:
    """What is remembered is the reference's bit for bit but for the summaries' last bit."""
    rows = Rows([[8, 8, 3, 8, 8, 8, 5], [1, 8, 8], [8] * 6 + [2]], 8, 7, 1, 64)
    for name in ("q", "k", "v", "cos", "sin"):
        setattr(rows, name, getattr(rows, name).to(dtype))
    rows.logits = rows.logits.float()
    hashing = Hashing(planes(1, 2, 64, 64), torch.randn(1, 64)) if l3 else None
    order = torch.random.get_rng_state()
    caches, results = [], []
    for backend in ("reference", "cuda"):
        torch.random.set_rng_state(order)
        caches.append(new_cache(rows, l2, hashing, 2, dtype))
        results.append(generate(rows, caches[-1], hashing, 8, l2 or l3, backend))
    for field in fields(Cache):
        expected, found = (getattr(cache, field.name) for cache in caches)
        if expected is None:
            assert found is None
        elif field.name.startswith("summary"):
            closed = ~expected.isnan()
            assert torch.equal(found.isnan(), ~closed)
            assert_same(found[closed], expected[closed], terms=1)
        else:
            assert_bitwise(found, expected)
    (exact, chosen), (found, recalled) = results
    assert_bitwise(recalled, chosen)
    # one formula in one precision, weights rounded to it
    assert_same(found, exact, terms=2)
    assert not l3 or bool((recalled >= 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("fused", ["kv", "k", "v"])
@pytest.mark.parametrize("l3", [False, True])
def test_fusing(l3: bool, fused: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (3, 2, 64)
    decays = [torch.rand(2, 64) if name in fused else None for name in "kv"]
    caches = [Cache.empty(3, 2, 64, chunks=1, size=4, pages=6, dtype=dtype, ema=True) for _ in range(2)]
    for cache in caches:
        cache.chunk[1] = -1
    for step in range(3):
        k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        memory = [torch.randn(shape).to(dtype) if l3 and decay is not None else None for decay in decays]
        shares = torch.rand(3, 1 + step % 2, 1 + l3)
        pairs = [
            decode.fuse(cache, k, v, shares, *decays, tuple(memory), backend=backend)
            for cache, backend in zip(caches, ("reference", "cuda"), strict=True)
        ]
        for expected, found in zip(*pairs, strict=True):
            assert_same(found, expected, terms=4)
        for cache in caches:
            cache.position.add_(1)
    for name in ("ema_k", "ema_v"):
        expected, found = (getattr(cache, name) for cache in caches)
        assert_same(found, expected, terms=4)
        assert not bool(found[1].any())


def test_a_cache_that_is_full_stays_as_it_is() -> None:
    rows = Rows([[8, 8]], 8, 2, 1, 64)
    cache = new_cache(rows, True, None, 0, torch.float32)
    one, q = torch.randn(1, 1, 64), torch.randn(1, 2, 64)
    tables = torch.ones(1, 64), torch.zeros(1, 64)
    for backend in ("reference", "cuda"):
        cache.chunk.fill_(3)
        before = cache.k.clone()
        decode.append(cache, q, one, one, one, backend=backend)
        decode.close(cache, *tables, None, window=8, force=torch.tensor([True]), backend=backend)
        assert int(cache.chunk) == 3 and int(cache.position) == 0
        assert_bitwise(cache.k, before)


def test_sizes_without_a_kernel_are_refused(library: ctypes.CDLL) -> None:
    cache = random_cache(1, 1, 64, 16, 4, 1, 0, True, torch.bfloat16)

    def code(heads: int, dtype: torch.dtype) -> int:
        c, q = cache, torch.zeros(1, heads, 64, dtype=dtype)
        out = torch.empty_like(q)
        args = structs.attend_args(
            q, None, c.k, c.v, c.table, c.lengths, c.chunk, c.summary_k, c.summary_v, None, out, None,
            None, window=1, scale=1.0, splits=1,
        )  # fmt: skip
        return library.mka_host_decode_attend(ctypes.byref(args))

    assert code(16, torch.bfloat16) == 0
    assert code(17, torch.bfloat16) == -1 and code(2, torch.float32) == -1


def test_the_section_of_verify_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "kernels")
    section = importlib.import_module("verify_decode")
    common = importlib.import_module("verify_common")
    found = list(section.checks(torch.device("cpu"), (129,)))
    assert len(found) == 2 + 18 * 8 and [check.case for check in found if not check.passed] == []
    for name, launch in section.launches(torch.device("cpu")):
        if name.startswith("B=3"):
            assert common.same_bits(name, launch(), launch()).passed
    timings = list(section.benchmarks(common.Clock(torch.device("cpu"), repetitions=1), (129,)))
    assert len(timings) == 5 and all(timing.ms > 0 for timing in timings)
    monkeypatch.setattr(cuda, "attend", lambda cache, q, *_: torch.zeros_like(q))
    assert not next(section.checks(torch.device("cpu"), (129,))).passed


def test_operators_say_what_they_change() -> None:
    """Schemas and fake implementations, as torch.compile relies on them."""
    torch.manual_seed(0)
    c = random_cache(2, 1, 64, 16, 6, 2, 2, True, torch.bfloat16)
    c.table.clamp_(min=0)
    q, k = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 1, 64).bfloat16()
    tables, state = (torch.randn(2, 64), torch.randn(2, 64)), torch.randn(2, 1, 64)
    calls = [
        (cuda._attend, (q, torch.randn(2, 1, 3), c.k, c.v, c.table, c.lengths, c.chunk, c.summary_k, c.summary_v,
                        c.recalled, c.arrived, 2, 0.1, 3)),
        (cuda._fuse, (k, torch.rand(1, 64), state, torch.rand(2, 1, 2), k.clone(), c.chunk, c.position)),
        (cuda._append, (q, k, k + 1, k + 2, c.k.clone(), c.v.clone(), c.table, c.lengths, c.chunk, c.position, c.sum_k,
                        c.sum_v, c.code_sum, c.queries)),
        (cuda._close, (*tables, torch.tensor([True, False]), planes(0, 1, 64, 64), None, c.k, c.lengths, c.chunk,
                       c.position, c.summary_k, c.summary_v, c.sum_k, c.sum_v, c.codes, c.recalled, c.code_sum,
                       c.queries, 2)),
    ]  # fmt: skip
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
