"""The recall's kernels run thread by thread on the CPU, through the library, against the reference: bit for bit."""

from __future__ import annotations

import ctypes
import math
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.ops import library as package_library
from mka_megatron.ops import recall
from mka_megatron.ops.recall import cuda
from tests.helpers.c_api import struct_fields
from tests.helpers.host_kernels import register_recall
from tests.helpers.numerics import assert_bitwise

HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def host(library: ctypes.CDLL) -> SimpleNamespace:
    """The three ops on CPU tensors."""
    register_recall(library)
    return SimpleNamespace(pool=cuda.pool, recent_codes=cuda.recent_codes, nearest_codes=cuda.nearest_codes)


def table(lengths: Tensor, size: int) -> Chunks:
    return Chunks(size, lengths, lengths.clamp_max(1) - 1, lengths, 0, lengths.shape[1])


def wild(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, some beyond the range of fixed point."""
    x = torch.randn(*shape) * 10.0 ** torch.randint(-6, 4, shape)
    x[torch.rand(shape) < 0.01] = 6e4
    return x.to(dtype)


def test_structs_are_those_of_the_header() -> None:
    for name in ("PoolArgs", "QueriesArgs", "SelectArgs"):
        assert getattr(cuda, name)._fields_ == struct_fields(f"MkaRecall{name}")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_fixed_point(library: ctypes.CDLL, values: list[float]) -> None:
    x = torch.tensor([*values, 2.0**-17, 3 * 2.0**-17, 2.0**15, -(2.0**15)])
    found = torch.empty(len(x), dtype=torch.int64)
    library.mka_host_fixed_point(
        *map(ctypes.c_void_p, (x.data_ptr(), found.data_ptr())), ctypes.c_int64(len(x))
    )
    assert_bitwise(found, recall.fixed_point(x).long())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_fixed_point_of_any_bits(library: ctypes.CDLL, bits: int) -> None:
    test_fixed_point.hypothesis.inner_test(library, [struct.unpack("f", struct.pack("I", bits))[0]])


@pytest.mark.parametrize("size", cuda.SIZES)
@pytest.mark.parametrize("channels", cuda.CHANNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pooling(host: SimpleNamespace, dtype: torch.dtype, channels: int, size: int) -> None:
    torch.manual_seed(0)
    slots = 4 * size - 3
    k, v = wild(2, slots, 2, channels, dtype=dtype), wild(2, slots, 2, channels, dtype=dtype)
    centre = wild(2, channels, dtype=torch.bfloat16)
    lengths = torch.tensor([[size, 1, 0, size - 3], [0, size - 1, size, 7]])
    padding = torch.arange(size) >= lengths[..., None]
    for x in (k, v):
        x[padding.flatten(1)[:, :slots]] = math.nan
    planes = hashing.planes(3, 2, 64, channels)
    found = host.pool(k, v, lengths, size, planes, centre)
    chunks = table(lengths, size)
    assert_bitwise(found[0], hashing.chunk_means(k, chunks))
    assert_bitwise(found[1], hashing.chunk_means(v, chunks))
    assert_bitwise(found[2], recall.sign_codes(recall.chunk_sums(k, lengths, size, centre), planes))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_keys_and_queries_within_a_projection(host: SimpleNamespace, dtype: torch.dtype) -> None:
    """Sequence first, a group's queries beside its key and value, as Megatron projects them; nothing is copied."""
    torch.manual_seed(0)
    slots, groups, fan, channels, size = 300, 2, 3, 64, 128
    projected = wild(slots, 2, groups, (fan + 2) * channels, dtype=dtype).transpose(0, 1)
    q, k, v = projected.split((fan * channels, channels, channels), dim=3)
    # [B, S, G, H/G * d] -> [B, S, H, d]
    q = q.unflatten(3, (fan, channels)).flatten(2, 3)
    assert not k.is_contiguous() and package_library.rows(k) is k and package_library.rows(v) is v
    lengths = torch.tensor([[128, 90, 44], [1, 128, 0]])
    planes = hashing.planes(3, 2, 64, channels)
    selector = hashing.Selector("hash", 2, planes)
    pooled = cuda.pool(k, v, lengths, size, planes)
    expected = recall.chunk_sums(k, lengths, size)
    for found, exact in zip(
        pooled, (*(recall.chunk_means(x, lengths, size) for x in (k, v)), recall.sign_codes(expected, planes)), strict=True
    ):
        assert_bitwise(found, exact)
    for found, exact in zip(cuda.means(k, v, lengths, size), pooled, strict=False):
        assert_bitwise(found, exact)
    assert_bitwise(cuda.codes(k, lengths, size, planes), pooled[2])
    counts = torch.tensor([[0, 128, 218], [0, 1, 129]])
    sums, _ = host.recent_codes(q, None, lengths, counts, size, groups, planes)
    assert_bitwise(sums, recall.recent_sums(selector.queries(q, groups), None, lengths, counts, size, 16))


@pytest.mark.parametrize("centre_dtype", [None, *HALVES], ids=str)
def test_codes_of_what_is_no_number(host: SimpleNamespace, centre_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    k = torch.randn(1, 128, 1, 64)
    k.view(-1)[torch.randperm(k.numel())[:2000]] = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).repeat(
        500
    )
    centre = None if centre_dtype is None else torch.randn(1, 64).to(centre_dtype)
    lengths, planes = torch.tensor([[64, 64]]), hashing.planes(0, 1, 128, 64)
    found = host.pool(k, k, lengths, 64, planes, centre)[2]
    assert_bitwise(found, recall.sign_codes(recall.chunk_sums(k, lengths, 64, centre), planes))


def test_a_sum_of_zero_is_on_the_upper_side(host: SimpleNamespace) -> None:
    zero = torch.zeros(1, 64, 1, 64)
    found = host.pool(zero, zero, torch.tensor([[64]]), 64, hashing.planes(0, 1, 64, 64))[2]
    assert found.tolist() == [[[[-1]]]]


@pytest.mark.parametrize("heads", [2, 6, 14])
@pytest.mark.parametrize("channels", cuda.CHANNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_recent_queries(host: SimpleNamespace, dtype: torch.dtype, channels: int, heads: int) -> None:
    torch.manual_seed(0)
    size, groups = 64, 2
    q = wild(2, 6 * size - 5, heads, channels, dtype=dtype)
    lengths = torch.tensor([[64, 3, 5, 64, 0, 20], [2, 1, 0, 30, 64, 59]])
    # the first row's documents begin before slot 0, at chunk 1 and at chunk 3; the second row's at chunk 0
    counts = torch.tensor([[1000, 0, 3, 0, 0, 64], [0, 2, 0, 3, 33, 97]])
    before = recall.fixed_point(wild(2, 16, groups, channels, dtype=torch.float32))
    planes = hashing.planes(1, 1, 192, channels)
    selector = hashing.Selector("hash", 4, planes)
    for earlier in (None, before):
        fixed = selector.queries(q, groups)
        expected = recall.recent_sums(fixed, earlier, lengths, counts, size, hashing.SELECTING_QUERIES)
        sums, codes = host.recent_codes(q, earlier, lengths, counts, size, groups, planes)
        assert_bitwise(sums, expected)
        assert_bitwise(codes, recall.sign_codes(expected, planes))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    tables=st.integers(1, 3),
    per=st.integers(1, 3),
    count=st.integers(1, 40),
    first=st.integers(0, 80),
    window=st.integers(1, 6),
    recalled=st.integers(1, 40),
    entropy=st.integers(1, 64),
)
def test_nearest_codes(
    host: SimpleNamespace,
    seed: int,
    tables: int,
    per: int,
    count: int,
    first: int,
    window: int,
    recalled: int,
    entropy: int,
) -> None:
    torch.manual_seed(seed)
    total, words = first + count + int(torch.randint(3, ())), tables * per
    documents = (torch.rand(2, total) < 0.05).long().cumsum(1).masked_fill_(torch.rand(2, total) < 0.1, -1)
    # few differing bits, so that many lie at one distance
    mask = (1 << (entropy - 1)) - 1 if entropy < 64 else -1
    draw = [torch.randint(-(2**63), 2**63 - 1, (2, n, 2, words)) & mask for n in (count, total)]
    candidates = recall.Candidates(documents, first, count, window)
    found = host.nearest_codes(*draw, candidates, tables, recalled)
    assert_bitwise(found, recall.nearest_codes(*draw, candidates, tables, recalled))


def test_ties_go_to_the_lower_number(host: SimpleNamespace) -> None:
    codes = torch.zeros(1, 200, 1, 1, dtype=torch.int64)
    codes[0, 70] = 1  # one bit off, and the others off by two, but for 150
    codes[0, :70] = codes[0, 71:] = 3
    codes[0, 150] = 0
    candidates = recall.Candidates(torch.zeros(1, 200, dtype=torch.int64), 199, 1, 4)
    found = host.nearest_codes(torch.zeros(1, 1, 1, 1, dtype=torch.int64), codes, candidates, 1, 6)
    assert found.flatten().tolist() == [0, 1, 2, 3, 70, 150]


def test_gradients_of_the_means(host: SimpleNamespace) -> None:
    torch.manual_seed(0)
    lengths, planes = torch.tensor([[64, 9, 0], [5, 0, 22]]), hashing.planes(0, 1, 64, 64)
    k, v = (torch.randn(2, 150, 1, 64, requires_grad=True) for _ in range(2))
    weights = [torch.randn(2, 3, 1, 64) for _ in range(2)]
    found = host.pool(k, v, lengths, 64, planes)
    gradients = torch.autograd.grad([*found[:2]], [k, v], weights)
    for x, weight, gradient in zip((k, v), weights, gradients, strict=True):
        mean = hashing.chunk_means(x, table(lengths, 64))
        assert_bitwise(gradient, torch.autograd.grad(mean, x, weight)[0])


def test_the_ops_compile(host: SimpleNamespace) -> None:
    """Under torch.compile without a graph break, outputs and gradients alike."""
    torch.manual_seed(0)
    lengths, planes = torch.tensor([[64, 64]]), hashing.planes(0, 1, 64, 64)
    x = torch.randn(1, 128, 1, 64, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        k_mean, v_mean, codes = cuda.pool(x, 2 * x, lengths, 64, planes)
        _, wanted = cuda.recent_codes(x, None, lengths, lengths, 64, 1, planes)
        found = cuda._select(wanted, codes, lengths, 0, 1, 1, 1)
        return k_mean.sum() + v_mean.square().sum(), found

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(x), function(x), strict=True):
        assert_bitwise(one, other)
    assert_bitwise(torch.autograd.grad(compiled(x)[0], x)[0], torch.autograd.grad(function(x)[0], x)[0])


@pytest.mark.usefixtures("host")
def test_the_operators_are_registered_as_torch_asks() -> None:
    """Schema, fake implementation and autograd, also for symbolic shapes, as torch.compile uses them."""
    torch.manual_seed(0)
    lengths, planes = torch.tensor([[64, 64, 7], [64, 3, 0]]), hashing.planes(0, 2, 64, 64)
    k, v = (torch.randn(2, 150, 2, 64, requires_grad=True) for _ in range(2))
    centre = torch.randn(2, 64)
    torch.library.opcheck(cuda._pool, (k, v, lengths, 64, planes, centre))
    torch.library.opcheck(cuda._pool, (k, v, lengths, 64, None, None))
    torch.library.opcheck(cuda._codes, (k.detach(), lengths, 64, planes, centre))
    q, before = torch.randn(2, 150, 4, 64), recall.fixed_point(torch.randn(2, 16, 2, 64))
    torch.library.opcheck(cuda._queries, (q, before, lengths, lengths, 64, 2, planes))
    codes = cuda.codes(k.detach(), lengths, 64, planes)
    torch.library.opcheck(cuda._select, (codes, codes, torch.zeros_like(lengths), 0, 1, 2, 2))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70))
def test_every_query_chunk_is_one_warps(library: ctypes.CDLL, batch: int, groups: int, count: int) -> None:
    task = (ctypes.c_int64 * 3)()

    def plan(block: int, warp: int) -> int:
        library.mka_plan_recall_task.restype = ctypes.c_int64
        return library.mka_plan_recall_task(*map(ctypes.c_int64, (block, warp, batch, groups, count)), task)

    seen = []
    for block in range(plan(0, 0)):
        own = [tuple(task) for warp in range(8) if plan(block, warp) and task[2] >= 0]
        assert len({t[:2] for t in own}) == 1, "a block's warps share a head"
        seen += own
    assert sorted(seen) == [(b, g, i) for b in range(batch) for g in range(groups) for i in range(count)]
    tiles = [t[2] // 8 for t in seen]
    assert tiles == sorted(tiles, reverse=True), "the most candidates come first"


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20), st.integers(0, 120), st.integers(0, 120))
def test_candidates_end_before_the_window(
    library: ctypes.CDLL, first: int, item: int, window: int, stored: int, total: int
) -> None:
    library.mka_plan_recall_candidates.restype = ctypes.c_int64
    end = library.mka_plan_recall_candidates(*map(ctypes.c_int64, (first, item, window, stored, total)))
    wanted = [n for n in range(min(stored, total)) if n <= first + item - window]
    assert list(range(end)) == wanted


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=12),
    chunk=st.integers(0, 11),
    counts=st.integers(0, 40),
    back=st.integers(1, 16),
)
def test_recent_slots(library: ctypes.CDLL, lengths: list[int], chunk: int, counts: int, back: int) -> None:
    chunk = min(chunk, len(lengths) - 1)
    library.mka_plan_recall_recent.restype = ctypes.c_int64
    table = (ctypes.c_int64 * len(lengths))(*lengths)
    rest = map(ctypes.c_int64, (chunk, counts, 8, 8 * len(lengths), back))
    found = library.mka_plan_recall_recent(table, *rest)
    slots = [8 * at + i for at in range(chunk) for i in range(lengths[at])]
    if back > counts:
        assert found == -(2**63)
    elif back <= len(slots):
        assert found == slots[-back]
    else:
        assert found == len(slots) - back


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 96), ("size", 32), ("dtype", 7), ("centre_dtype", 3), ("chunks", 3)]
)
def test_what_has_no_kernel_is_refused(library: ctypes.CDLL, field: str, value: int) -> None:
    k, lengths, planes = torch.zeros(1, 64, 1, 64), torch.tensor([[64]]), hashing.planes(0, 1, 64, 64)
    out = cuda.pool_out(k, k, lengths, planes)
    args = cuda.pool_args(k, k, lengths, 64, planes, None, out)
    setattr(args, field, value)
    assert library.mka_recall_pool(ctypes.byref(args), None) == -1
    assert library.mka_host_recall_pool(ctypes.byref(args)) == -1
