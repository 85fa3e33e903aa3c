"""The fusion's kernels block by block and thread by thread on the host: their own code, plan and look-back, through the
operator that training calls, against the specification. What is left for a GPU: that blocks do wait for each other."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mka_megatron.memory.documents import Documents
from mka_megatron.ops import library as package_library
from mka_megatron.ops import route_fuse as op
from mka_megatron.ops.route_fuse import Stream, cuda
from mka_megatron.ops.route_fuse.route import route
from mka_megatron.ops.route_fuse.slots import pack
from tests.helpers.host_route_fuse import run_on_host
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same

GROUPS = 2
LINK = 16
"""Tiles of a group of the look-back."""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture
def on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator takes CPU tensors and runs the emulation; what it does not write is NaN."""
    run_on_host(library, monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised
    yield
    torch.use_deterministic_algorithms(False)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def inputs(
    batch: int, sequence: int, channels: int, levels: str, dtype: torch.dtype, streams: int, scope: str, carried: bool
) -> tuple[list[Stream], Tensor, Tensor]:
    torch.manual_seed(sequence)
    shape = batch, sequence, GROUPS, channels

    def stream() -> Stream:
        decay = torch.rand(GROUPS, channels).requires_grad_() if "l2" in levels else None
        carry = leaf(batch, GROUPS, channels) if carried and "l2" in levels else None
        return Stream(leaf(*shape, dtype=dtype), decay, carry, leaf(*shape, dtype=dtype) if "l3" in levels else None)

    routes = (GROUPS,) if scope == "group" else ()
    count = 1 + len(levels.split())
    return [stream() for _ in range(streams)], leaf(batch, sequence, *routes, count), leaf(1)


def results(
    streams: list[Stream], logits: Tensor, beta: Tensor, rows: Documents, available: Tensor | None, mode: str,
    backend: str, wide: bool = False,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed functional of them; `wide`: in fp64."""

    def put(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(torch.float64 if wide else x.dtype).requires_grad_()

    streams = [Stream(*(put(each) for each in (s.x, s.decay, s.carry, s.long_term))) for s in streams]
    logits, beta = put(logits), put(beta)
    out, weights = op.route_fuse(streams, logits, beta, rows, available, mode=mode, backend=backend)
    found: dict[str, Tensor] = {"weights": weights}
    leaves: dict[str, Tensor] = {"logits": logits, "beta": beta}
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for number, ((y, last), each) in enumerate(zip(out, streams, strict=True)):
        found[f"y{number}"] = y
        # the same upstream gradients in every precision
        weight = torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype)
        total = total + (y * weight).double().sum()
        if last is not None:
            found[f"last{number}"] = last
            total = total + (last.double() * torch.randn(last.shape, generator=generator)).sum()
        for name in ("x", "decay", "carry", "long_term"):
            if getattr(each, name) is not None:
                leaves[f"{name}{number}"] = getattr(each, name)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {**found, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def compare(streams, logits, beta, rows, available=None, mode: str = "soft") -> None:
    """The kernels against the specification in fp64: no worse than it is in the tensors' own precision."""
    found = results(streams, logits, beta, rows, available, mode, "cuda")
    peer = results(streams, logits, beta, rows, available, mode, "reference")
    exact = results(streams, logits, beta, rows, available, mode, "reference", wide=True)
    assert found.keys() == exact.keys() == peer.keys()
    for name in exact:
        low = found[name].dtype in (torch.bfloat16, torch.float16)
        try:
            if low:
                assert_as_accurate(found[name], exact[name].to(found[name].dtype), exact[name])
            else:
                # what sums over all tokens and channels is as accurate as the length of its sum allows
                terms = 64 if name.startswith(("y", "last", "weights", "grad x", "grad long", "grad carry")) else 512
                scale = torch.stack([exact[name].abs().max(), torch.ones((), dtype=torch.float64)])
                assert_same(found[name], exact[name], terms, scale)
        except AssertionError as problem:
            raise AssertionError(f"{name}: {problem}") from problem


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("levels", ["l2", "l3", "l2 l3"])
@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.usefixtures("on_host")
def test_kernels_are_the_specification(documents: str, levels: str, scope: str, carried: bool) -> None:
    where = layout(documents, 3, 300)
    streams, logits, beta = inputs(3, 300, 24, levels, torch.float32, 2, scope, carried)
    compare(streams, logits, beta, where)


@pytest.mark.parametrize("channels", [8, 64, 80, 128, 256, 264])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.usefixtures("on_host")
def test_types_and_head_sizes(dtype: torch.dtype, channels: int) -> None:
    for levels, streams in (("l2", 2), ("l2 l3", 1)):
        given = inputs(1, 520, channels, levels, dtype, streams, "token", True)
        compare(*given, layout("packed", 1, 520))


@pytest.mark.parametrize("sequence", [1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257])
@pytest.mark.usefixtures("on_host")
def test_lengths(sequence: int) -> None:
    given = inputs(2, sequence, 16, "l2", torch.float32, 1, "group", True)
    compare(*given, layout("whole", 2, sequence))


@pytest.mark.parametrize("tiles", [LINK - 1, LINK, LINK + 1, 2 * LINK, 2 * LINK + 3])
@pytest.mark.usefixtures("on_host")
def test_the_look_back_over_its_groups(tiles: int) -> None:
    """One document that is as long as groups of tiles, with decays near one, so that far states count."""
    sequence = 64 * tiles - 5
    streams, logits, beta = inputs(1, sequence, 128, "l2", torch.float32, 1, "token", True)
    slow = [replace(s, decay=(1 - 1e-4 * torch.rand(GROUPS, 128)).requires_grad_()) for s in streams]
    rows = layout("whole", 1, sequence)
    found = results(slow, logits, beta, rows, None, "soft", "cuda")
    exact = results(slow, logits, beta, rows, None, "soft", "reference", wide=True)
    for name in exact:
        scale = torch.stack([exact[name].abs().max(), torch.ones((), dtype=torch.float64)])
        assert_same(found[name], exact[name], sequence, scale)


@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.usefixtures("on_host")
def test_modes_with_levels_that_hold_nothing(mode: str) -> None:
    streams, logits, beta = inputs(2, 150, 16, "l2 l3", torch.float32, 2, "group", False)
    logits = torch.randint(0, 3, logits.shape).float().requires_grad_()  # with ties
    available = torch.rand(2, 150, 1, 3) < 0.6
    available[..., 0] = True
    compare(streams, logits, beta, layout("packed", 2, 150), available, mode)


@pytest.mark.usefixtures("on_host")
def test_nothing_of_another_document_arrives() -> None:
    streams, logits, beta = inputs(1, 300, 16, "l2", torch.float32, 1, "token", False)
    starts = torch.zeros(1, 300, dtype=torch.bool)
    starts[0, [0, 130, 259]] = True
    rows = Documents.from_starts(starts)
    inside = slice(130, 259)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        each = replace(streams[0], x=x.detach().requires_grad_())
        y = op.route_fuse([each], logits, beta, rows, backend="cuda")[0][0][0]
        return y[:, inside], torch.autograd.grad(y[:, inside].sum(), each.x)[0][:, inside]

    x = streams[0].x.detach()
    poisoned = torch.full_like(x, math.nan)
    poisoned[:, inside] = x[:, inside]
    for found, exact in zip(run(poisoned), run(x), strict=True):
        assert_bitwise(found, exact)


@pytest.mark.usefixtures("on_host")
def test_beta_zero_gives_the_tokens() -> None:
    streams, logits, _ = inputs(1, 300, 64, "l2 l3", torch.bfloat16, 2, "token", False)
    fused, _ = op.route_fuse(streams, logits, torch.zeros(1), layout("packed", 1, 300), backend="cuda")
    for (y, _), each in zip(fused, streams, strict=True):
        assert_bitwise(y, each.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.usefixtures("on_host")
def test_keys_and_values_within_a_projection(dtype: torch.dtype) -> None:
    """Megatron's lie between the queries of their groups, sequence first, and their gradients may lie anywhere: what
    comes out is what contiguous ones give, and nothing is copied to get it."""
    batch, sequence, channels, fan = 2, 300, 64, 7
    streams, logits, beta = inputs(batch, sequence, channels, "l2", dtype, 2, "token", True)
    rows = layout("packed", batch, sequence)
    projected = torch.randn(sequence, batch, GROUPS, (fan + 2) * channels).to(dtype).requires_grad_()
    upstream = torch.randn(2, sequence, batch, channels, GROUPS).to(dtype)

    def run(copied: bool) -> list[Tensor]:
        _, k, v = projected.split((fan * channels, channels, channels), dim=3)
        given = [replace(s, x=x.transpose(0, 1)) for s, x in zip(streams, (k, v), strict=True)]
        # [S, B, d, G] -> [B, S, G, d]
        grads = [grad.permute(1, 0, 3, 2) for grad in upstream]
        if copied:
            given = [replace(s, x=s.x.contiguous()) for s in given]
            grads = [grad.contiguous() for grad in grads]
        else:
            assert all(package_library.rows(s.x) is s.x and not s.x.is_contiguous() for s in given)
        out, _ = op.route_fuse(given, logits, beta, rows, backend="cuda")
        leaves = [projected, logits, *(s.decay for s in streams), *(s.carry for s in streams)]
        return [*(y for y, _ in out), *torch.autograd.grad([y for y, _ in out], leaves, grads)]

    for found, exact in zip(run(False), run(True), strict=True):
        assert_bitwise(found, exact)


def test_what_kernels_can_read_in_place() -> None:
    x = torch.zeros(3, 4, 2, 3 * 8, dtype=torch.bfloat16)
    for view in (x[..., :8], x[..., 8:16].transpose(0, 1), x[1:2], x[:, ::2], torch.zeros(1, 8).expand(4, 8)):
        assert package_library.rows(view) is view
    for view in (x[..., 4:12], x[..., ::2], x.transpose(2, 3), torch.zeros(2, 3, 12, dtype=torch.bfloat16)):
        copy = package_library.rows(view)
        assert copy is not view or view.is_contiguous()
    assert package_library.strides(x[1:2, :, :, :8]) == (0, 48, 24)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 5), st.integers(1, 5000), st.integers(1, 9), st.integers(1, 40), st.integers(1, 2), st.booleans(),
    st.sampled_from(list(DTYPES)), st.booleans(),
)  # fmt: skip
def test_every_element_is_in_one_tile(
    library: ctypes.CDLL, batch: int, sequence: int, groups: int, eighths: int, streams: int, l3: bool,
    dtype: torch.dtype, reverse: bool,
) -> None:  # fmt: skip
    args = cuda.Args()
    args.batch, args.sequence, args.groups, args.channels = batch, sequence, groups, 8 * eighths
    args.streams, args.dtype = streams, package_library.DTYPES[dtype]
    args.long_term[0] = 16 if l3 else None
    plan, tile = (ctypes.c_int64 * 4)(), (ctypes.c_int64 * 8)()
    library.mka_plan_route_fuse(ctypes.byref(args), plan)
    chunk, chunks, width, tiles = plan
    assert chunk == cuda.chunk_tokens(args.channels, dtype.itemsize, l3)
    assert (chunks - 1) * chunk < sequence <= chunks * chunk
    # where every tile lies, and that all it waits for was taken before it
    seen: dict[tuple[int, ...], int] = {}
    for ticket in range(min(tiles, 400)):
        library.mka_plan_route_fuse_tile(ctypes.byref(args), ctypes.c_int64(ticket), int(reverse), tile)
        order, at, row, column, stream, head, channel, first = tile
        assert (at, row, stream, head, channel) not in seen
        seen[at, row, stream, head, channel] = ticket
        assert at == (chunks - 1 - order if reverse else order) and first == at * chunk
        assert 0 <= row < batch and 0 <= stream < streams and 0 <= head < groups
        assert 0 <= channel < args.channels and channel % width == 0 and 0 <= column < tiles // (batch * chunks)
        behind = at + 1 if reverse else at - 1
        if order:
            assert seen[behind, row, stream, head, channel] == ticket - tiles // chunks
    if tiles <= 400:
        assert len(seen) == tiles == batch * chunks * streams * groups * math.ceil(args.channels / width)


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 40.0]), min_size=3, max_size=3), st.integers(1, 7),
    st.sampled_from(op.MODES), st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
)  # fmt: skip
def test_route_and_its_gradient(
    library: ctypes.CDLL, logits: list[float], mask: int, mode: str, upstream: list[float]
) -> None:
    found = (ctypes.c_float * 6)()
    library.mka_host_route(
        (ctypes.c_float * 3)(*logits), mask, cuda.MODES[mode], (ctypes.c_float * 3)(*upstream), found
    )
    wide = torch.tensor(logits, dtype=torch.float64).view(1, 1, 3).requires_grad_()
    weights = route(wide, torch.tensor([bool(mask >> level & 1) for level in range(3)]), mode)
    (grad,) = torch.autograd.grad(
        (weights * torch.tensor(upstream)).sum(), [wide], allow_unused=True, materialize_grads=True
    ) if weights.requires_grad else (torch.zeros_like(wide),)
    one = torch.ones(())
    assert_same(torch.tensor(found[:3]), weights.flatten(), 8, one)
    assert_same(torch.tensor(found[3:]), grad.flatten(), 32, one)


def test_refusals(library: ctypes.CDLL) -> None:
    def code(**changes: int | tuple[int, ...]) -> int:
        args = cuda.Args()
        sizes = {"batch": 1, "sequence": 4, "groups": 1, "channels": 8, "streams": 1, "routes": 1, "levels": 2,
                 "mode": 0, "dtype": 1}  # fmt: skip
        for name, value in {**sizes, **changes}.items():
            setattr(args, name, value if isinstance(value, int) else (ctypes.c_int64 * 6)(*value))
        args.decay[0] = 16
        return library.mka_route_fuse_forward(ctypes.byref(args), None)

    for change in (
        {"batch": 0}, {"sequence": 0}, {"channels": 12}, {"streams": 3}, {"levels": 3}, {"mode": 4}, {"dtype": 3},
        {"groups": 4, "routes": 2}, {"sequence": 2**40}, {"x_strides": (0, 4, 0, 0, 0, 0)},
    ):  # fmt: skip
        assert code(**change) == -1, change


@pytest.mark.parametrize("levels", ["l2", "l3", "l2 l3"])
@pytest.mark.usefixtures("on_host")
def test_the_operator_is_registered_as_torch_asks(levels: str) -> None:
    """Schema, fake implementation and autograd, also for symbolic shapes, as torch.compile uses them."""
    streams, logits, beta = inputs(2, 70, 16, levels, torch.float32, 2, "group", "l2" in levels)
    slots = pack(layout("packed", 2, 70), None, logits.shape[-1], "l2" in levels)

    def parts(name: str) -> list[Tensor]:
        return [each for s in streams if (each := getattr(s, name)) is not None]

    tensors = (parts("x"), parts("long_term"), parts("decay"), parts("carry"), logits, beta, slots, "soft")
    torch.library.opcheck(cuda._forward, tensors)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.usefixtures("on_host")
def test_the_fusion_compiles(carried: bool) -> None:
    """Under torch.compile without a graph break, outputs and gradients alike."""
    streams, logits, beta = inputs(2, 70, 16, "l2 l3", torch.float32, 2, "group", carried)
    rows, available = layout("padded", 2, 70), torch.rand(2, 70, 1, 3) < 0.6
    available[..., 0] = True
    tensors = [x for s in streams for x in (s.x, s.decay, s.long_term, s.carry) if x is not None]

    def function(logits: Tensor, beta: Tensor, *given: Tensor) -> list[Tensor]:
        each = len(given) // 2
        fused, weights = op.route_fuse(
            [Stream(*(part[0], part[1], part[3] if carried else None, part[2])) for part in (given[:each], given[each:])],
            logits, beta, rows, available, backend="cuda",
        )  # fmt: skip
        return [*(x for pair in fused for x in pair), weights]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, exact = compiled(logits, beta, *tensors), function(logits, beta, *tensors)
    for one, other in zip(found, exact, strict=True):
        assert_bitwise(one, other)
    leaves = [logits, beta, *tensors]
    upstream = [torch.randn_like(x) for x in exact[:4]]
    for one, other in zip(
        torch.autograd.grad(found[:4], leaves, upstream), torch.autograd.grad(exact[:4], leaves, upstream), strict=True
    ):
        assert_bitwise(one, other)
