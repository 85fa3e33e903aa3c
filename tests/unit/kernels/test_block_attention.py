"""The block core's kernels run lane by lane on the CPU, through the library, against the fp64 oracle."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.ops.block_attention import block_attention, cuda
from tests.helpers import block_oracle
from tests.helpers.block_cases import Case, make_case
from tests.helpers.block_oracle import Table
from tests.helpers.host_block_attention import run_on_host
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same

C = 64
BF16, FP16 = torch.bfloat16, torch.float16
NAN, INFINITY = math.nan, math.inf

# Every chunk of every row as (tokens, document).
ROWS = {
    "one document": [[(64, 0)] * 5],
    "ragged": [[(64, 0)] * 2 + [(3, 0)], [(64, 0)] * 1 + [(64, 1)] + [(1, 1)]],
    "less than a chunk": [[(5, 0)]],
    "a document per chunk": [[(64, 0), (64, 1), (64, 2)], [(1, 0), (20, 1), (63, 2)]],
    "packed": [[(64, 0)] * 3 + [(2, 0), (64, 1), (9, 1)]],
    "empty chunks": [[(64, 0), (64, 0), (0, 0), (9, 0), (0, 0), (40, 0), (17, 1)]],
    "a row of nothing": [[(0, 0)] * 2, [(64, 0), (9, 0)]],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{rows: {"rows": rows} for rows in ROWS},
    "ragged slots": {"rows": "one document", "missing": 60},
    "one query head per KV head": {"rows": "one document", "heads": (2, 2), "missing": 63},
    "two query heads per KV head": {"rows": "ragged", "heads": (4, 2)},
    "four query heads per KV head": {"rows": "packed", "heads": (4, 1)},
    "seven query heads per KV head": {"rows": "ragged", "heads": (7, 1)},
    "128 channels": {"rows": "one document", "channels": 128},
    "half precision": {"rows": "packed", "dtype": FP16},
    "half precision, 128 channels": {"rows": "packed", "dtype": FP16, "channels": 128},
    "one bias for all heads": {"rows": "packed", "bias": "shared", "heads": (2, 2)},
    "no bias": {"rows": "packed", "bias": "none"},
    "no summaries": {"rows": "one document", "summaries": False},
    "nothing recalled": {"rows": "one document", "recalled": 0},
    "window alone": {"rows": "one document", "recalled": 0, "summaries": False, "window": 3},
    "window longer than the row": {"rows": "packed", "window": 9},
    "window of one chunk": {"rows": "packed", "window": 1},
    "rows that differ": {"rows": [[(64, 0)] * 4, [(64, 0), (64, 1), (64, 1), (9, 1)]], "window": 1},
    "a part, its halo short": {"rows": "packed", "first": 1, "window": 3},
    "a part with pages": {"rows": "one document", "first": 3, "recalled": 3, "missing": 5},
    "a part with pages, no halo": {"rows": "empty chunks", "first": 5, "window": 1, "recalled": 3},
    "chunks of 128": {"rows": [[(128, 0), (70, 0), (128, 0)]], "size": 128, "window": 1, "missing": 50},
}


@pytest.fixture(autouse=True)
def _on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_host(library, monkeypatch)


def case(rows: str | list, *, size: int = C, dtype: torch.dtype = BF16, **changes: Any) -> Case:
    """Numbers that `dtype` has, also the bias; NaN on padding and in the summaries of empty chunks."""
    given = {"heads": (2, 1), "channels": 64, **changes}
    made = make_case(size, ROWS[rows] if isinstance(rows, str) else rows, **given).to(dtype)
    with torch.no_grad():
        if made.bias is not None:
            made.bias.copy_(made.bias.to(dtype))
        table = made.table
        slots = torch.arange(size)
        halo = table.first + table.count - -(-made.k.shape[1] // size)
        real = (slots < table.lengths[..., None])[:, halo:].flatten(1)[:, : made.k.shape[1]]
        for x in (made.k, made.v):
            x[~real] = NAN
        at_hand = real[:, made.k.shape[1] - made.q.shape[1] :]
        made.q[~at_hand] = NAN
        if made.bias is not None:
            made.bias[~at_hand] = NAN
        for x in made.summaries or ():
            x[table.lengths == 0] = NAN
        if made.pages is not None:
            blank = slots >= made.pages.lengths[..., None]
            for x in (made.pages.k, made.pages.v):
                x[blank] = NAN
    return made


def clean(given: Case, dtype: torch.dtype) -> Case:
    """The same without what nobody sees, all of it in `dtype`: for the oracle, which multiplies by zero."""
    plain = given.to(dtype)
    with torch.no_grad():
        for x in plain.tensors:
            x.nan_to_num_(nan=0.0)
    if plain.bias is not None:
        bias = plain.bias.detach().nan_to_num(nan=0.0, neginf=-INFINITY).to(dtype).requires_grad_()
        plain = replace(plain, bias=bias)
    return plain


def gradients(given: Case, out: Tensor, direction: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            out, given.tensors, direction.to(out.dtype), allow_unused=True, materialize_grads=True
        )
    )


def some_direction(given: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(given.q.shape, generator=generator).to(given.q.dtype)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_as_accurate_as_pytorchs(name: str) -> None:
    check(case(**CASES[name]))


def check(given: Case) -> None:
    """Against the oracle in fp64, the peer being the oracle in the same low precision."""
    dtype = given.q.dtype
    peer, exact = clean(given, dtype), clean(given, torch.float64)
    out, peer_out, exact_out = given.run("cuda"), peer.oracle(), exact.oracle()
    assert out.dtype == dtype
    assert_as_accurate(out, peer_out, exact_out)
    direction = some_direction(given)
    found = gradients(given, out, direction)
    wanted = zip(gradients(peer, peer_out, direction), gradients(exact, exact_out, direction), strict=True)
    for x, one, (other, right) in zip(given.tensors, found, wanted, strict=True):
        assert one.dtype == x.dtype
        assert_as_accurate(one, other.to(x.dtype), right)


@pytest.mark.parametrize("name", ["one document", "half precision"])
def test_scores_of_any_size(name: str) -> None:
    """Sums that are rescaled often, weights that vanish, levels that outweigh others."""
    given = case(**CASES[name])
    with torch.no_grad():
        given.q *= 6
        assert given.bias is not None
        given.bias[..., 0] -= 8
        given.bias[..., 2] += 12
    check(given)


def test_more_than_one_tile_of_summaries() -> None:
    """Of which one has two documents', and whose visits are split."""
    rows = [[(64, 0)] * 70 + [(3, 1)] * 30 + [(9, 1)] * 40]
    check(case(rows, first=100, window=1, recalled=0, heads=(1, 1)))


def test_keys_that_every_chunk_recalls() -> None:
    """Whose visits are split, too."""
    given = case([[(64, 0)] + [(7, 0)] * 39], window=1, heads=(2, 1), summaries=False)
    assert given.pages is not None
    index = given.pages.index.clone()
    index[:, 1:, :, 0] = 0
    index[..., 1].masked_fill_(index[..., 1] == 0, -1)
    check(replace(given, pages=replace(given.pages, index=index)))


def test_the_logarithms_of_the_sums() -> None:
    for name in ("packed", "a row of nothing", "a part with pages"):
        given = case(**CASES[name])
        exact = clean(given, torch.float64)
        sizes = (C, given.table.first, given.window // C, given.q.shape[3] ** -0.5, 0)
        lse = cuda._forward(*inputs(given), *sizes)[1]
        _, wanted = block_oracle.attend(*exact.arguments, exact.table, exact.window, sizes[3])
        nothing = wanted == INFINITY
        assert bool((lse[nothing] == INFINITY).all())
        assert_same(lse[~nothing], wanted[~nothing], 4 * 64)


def inputs(given: Case) -> tuple[Tensor | None, ...]:
    pages = given.pages
    stored = (None,) * 4 if pages is None else (pages.k, pages.v, pages.lengths, pages.index)
    tensors = (given.q, given.k, given.v, *(given.summaries or (None, None)), *stored, given.bias)
    return *tensors, given.table.lengths, given.table.documents


def test_padding_is_zero_and_has_no_gradient() -> None:
    given = case("empty chunks", recalled=3)
    real = (torch.arange(C) < given.table.lengths[..., None]).flatten(1)
    out = given.run("cuda")
    assert not bool(out[~real].any())
    # from a loss that looks at padding, too
    grads = torch.autograd.grad(out, given.tensors, torch.full_like(out, NAN).where(~real[..., None, None], 1))
    named = zip(given.tensors, grads, strict=True)
    for x, grad in named:
        assert bool(torch.isfinite(grad).all()) and not bool(grad[x.isnan()].any())


def test_recalls_of_nothing() -> None:
    given = case("one document")
    assert given.pages is not None
    nothing = replace(given.pages, index=torch.full_like(given.pages.index, -1))
    check(replace(given, pages=nothing))


@pytest.mark.parametrize("level", [1, 2])
def test_a_bias_of_minus_infinity_hides_a_level(level: int) -> None:
    given = case("one document")
    assert given.bias is not None and given.pages is not None
    with torch.no_grad():
        given.bias[..., level] = -INFINITY
    check(given)
    grads = gradients(given, given.run("cuda"), some_direction(given))
    assert not bool(grads[-1][..., level].any())
    if level == 1:
        assert not any(bool(grad.any()) for grad in grads[3:5])


@pytest.mark.parametrize("missing", [0, 5])
def test_a_window_as_long_as_the_row_is_dense_attention(missing: int) -> None:
    given = case("one document", window=5, missing=missing, recalled=0, bias="none", heads=(4, 2))

    def sdpa(case: Case) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (case.q, case.k, case.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    peer, exact = given.to(BF16), given.to(torch.float64)
    outs = given.run("cuda"), sdpa(peer), sdpa(exact)
    assert_as_accurate(*outs)
    direction = some_direction(given)
    grads = (
        torch.autograd.grad(out, [x.q, x.k, x.v], direction.to(out.dtype))
        for out, x in zip(outs, (given, peer, exact), strict=True)
    )
    for each in zip(*grads, strict=True):
        assert_as_accurate(*each)


def test_the_gradient_of_the_bias_sums_to_zero_over_the_levels() -> None:
    """As far as the output, which the row's constant is made of, is rounded."""
    given = case("one document", recalled=3)
    *_, grad = gradients(given, given.run("cuda"), some_direction(given))
    assert bool(grad.any())
    assert_same(grad.sum(dim=-1).to(BF16), torch.zeros_like(grad[..., 0]), 2 * 64, grad)


def test_reruns_are_equal_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        given = case("packed", recalled=3, heads=(4, 2))
        out = given.run("cuda")
        runs.append([out, *gradients(given, out, some_direction(given))])
    for one, other in zip(*runs, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize("slot", [62, 63, 64, 130, 194])
def test_no_later_token_changes_a_bit(slot: int) -> None:
    given = case("packed", recalled=3)
    assert given.bias is not None and given.summaries is not None and given.pages is not None
    with torch.no_grad():
        before = given.run("cuda")
        later = replace(given, **{name: getattr(given, name).detach().clone() for name in ("q", "k", "v", "bias")})
        for x in (later.q, later.k, later.v):
            x[:, slot + 1 :] = torch.randn_like(x[:, slot + 1 :]) * 1e3
        later.bias[:, slot + 1 :] -= 5
        summaries = tuple(x.detach().clone() for x in given.summaries)
        for x in summaries:  # a summary holds its chunk's last token
            x[:, (slot + 1) // C :] *= -1e3
        index = given.pages.index.clone()
        index[:, slot // C + 1 :] = -1
        after = replace(later, summaries=summaries, pages=replace(given.pages, index=index)).run("cuda")
    assert_bitwise(after[:, : slot + 1], before[:, : slot + 1])


@pytest.mark.parametrize("spoil", [NAN, 1e3])
def test_no_other_document_changes_a_bit(spoil: float) -> None:
    """Not even as NaN in the outputs; as any numbers in the gradients, where documents share a tile of summaries."""

    def made() -> Case:
        return case([[(64, 0), (64, 0), (20, 0), (64, 1), (64, 1), (9, 1)]], window=1, recalled=2)

    given = made()
    direction = some_direction(given)
    owner = given.table.documents
    real = (torch.arange(C) < given.table.lengths[..., None]).flatten(1)
    document = owner.repeat_interleave(C, dim=1).masked_fill(~real, -1)
    out = given.run("cuda")
    exact = gradients(given, out, direction)
    for number in range(2):
        spoilt, kept = made(), document == number
        with torch.no_grad():
            for x in (spoilt.q, spoilt.k, spoilt.v, spoilt.bias):
                x[~kept] *= spoil
            for x in spoilt.summaries or ():
                x[owner != number] *= spoil
        again = spoilt.run("cuda")
        assert_bitwise(again[kept], out[kept])
        if math.isnan(spoil):
            continue
        found = gradients(spoilt, again, direction * kept[..., None, None])
        for one, other in zip(found, exact, strict=True):
            own = kept if one.shape[1] == kept.shape[1] else owner == number
            assert_bitwise(one[own], other[own])


def test_operands_of_any_strides() -> None:
    """Slices of a fused projection, an expanded bias, gradients that are transposed."""
    given = case("one document", heads=(2, 2), bias="shared")
    direction = some_direction(given)
    exact = given.run("cuda")
    wanted = gradients(given, exact, direction)
    fused = torch.cat([given.q, given.k, given.v], dim=2).transpose(0, 1).contiguous().transpose(0, 1)
    q, k, v = (x.detach().requires_grad_() for x in fused.split(2, dim=2))
    assert not q.is_contiguous()
    # [B, U, G, d] over [B, G, U, d]
    summaries = tuple(
        x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in given.summaries or ()
    )
    bias = given.bias.transpose(1, 3).contiguous().transpose(1, 3).detach().requires_grad_()
    strided = replace(given, q=q, k=k, v=v, summaries=summaries, bias=bias)
    out = strided.run("cuda")
    assert_bitwise(out, exact)
    across = direction.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    for one, other in zip(gradients(strided, out, across), wanted, strict=True):
        assert_bitwise(one, other)
    everywhere = torch.tensor([0.5, -1.0, 2.0]).expand(*given.bias.shape)
    outs = [replace(given, bias=x).run("cuda") for x in (everywhere, everywhere.contiguous())]
    assert_bitwise(*outs)


@pytest.mark.parametrize("name", ["a part with pages", "window alone"])
def test_the_operator_is_registered_as_torch_asks(name: str) -> None:
    """Schema, fake implementation and autograd, also for symbolic shapes, as torch.compile uses them."""
    given = clean(case(**CASES[name]), BF16)
    given = replace(given, bias=given.bias.detach().float().requires_grad_())
    sizes = (C, given.table.first, given.window // C, 0.125, 0)
    torch.library.opcheck(cuda._forward, (*inputs(given), *sizes))


def test_the_block_core_compiles() -> None:
    """Under torch.compile without a graph break, outputs and gradients alike."""
    given = clean(case("packed", heads=(4, 2)), BF16)
    given = replace(given, bias=given.bias.detach().float().requires_grad_())

    def attend(*tensors: Tensor) -> Tensor:
        q, k, v, *summaries, page_k, page_v, bias = tensors
        pages = replace(given.pages, k=page_k, v=page_v)
        return block_attention(
            q, k, v, tuple(summaries), pages, bias, chunks=given.table, window=given.window, scale=0.125, backend="cuda"
        )  # fmt: skip

    leaves = [*given.tensors[:5], given.pages.k, given.pages.v, given.bias]
    found, exact = (f(*leaves) for f in (torch.compile(attend, backend="aot_eager", fullgraph=True), attend))
    assert_bitwise(found, exact)
    direction = some_direction(given)
    for one, other in zip(
        *(torch.autograd.grad(out, given.tensors, direction) for out in (found, exact)), strict=True
    ):
        assert_bitwise(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 96}, "a head must have 64 or 128 channels, not 96"),
        ({"dtype": torch.float32}, "its dtypes are torch.bfloat16 and torch.float16, not torch.float32"),
        ({"size": 32, "rows": [[(32, 0)] * 3]}, "its chunk sizes are 64 and 128, not 32"),
    ],
)
def test_what_has_no_kernel_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^block_attention has no kernel: {message}.$"):
        case(**{"rows": "less than a chunk", **change}).run("cuda")


def test_what_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    """By the library, before anything is launched."""
    given = case("one document", heads=(2, 2))
    refused: list[dict[str, Any]] = [
        {"channels": 32}, {"size": 32}, {"dtype": 0}, {"heads": 3}, {"window": 0}, {"chunks": 4}, {"kernel": 3},
        {"scale": 0.0}, {"scale": NAN}, {"summaries": 0}, {"summaries": 2}, {"recalled": 0}, {"pages": 1}, {"first": -1},
        {"q": given.q.data_ptr() + 8}, {"k_strides": (0, 7, 64)}, {"batch": 1 << 40},
    ]  # fmt: skip
    for change in refused:
        args = cuda.arguments(inputs(given), (C, 0, 2, 0.125, 0))
        workspace = torch.empty(cuda.workspace_bytes(library, args, True) + 16, dtype=torch.uint8)
        args.workspace = (workspace.data_ptr() + 15) // 16 * 16
        out, lse = torch.empty_like(given.q), torch.empty(1, 2, given.q.shape[1])
        args.out, args.lse = out.data_ptr(), lse.data_ptr()
        for name, value in change.items():
            setattr(args, name, value)
        for entry in ("forward", "backward"):
            assert getattr(library, f"mka_host_block_attention_{entry}")(ctypes.byref(args)) == -1, change


def test_empty_rows_at_hand() -> None:
    given = case("less than a chunk", recalled=0, summaries=False)
    none = replace(
        given, table=Table(C, given.table.lengths[:0], given.table.documents[:0], 0, 1),
        **{name: getattr(given, name)[:0].detach().requires_grad_() for name in ("q", "k", "v", "bias")},
    )  # fmt: skip
    out = none.run("cuda")
    assert out.shape == none.q.shape
    assert all(grad.shape == x.shape for grad, x in zip(torch.autograd.grad(out.sum(), none.tensors), none.tensors, strict=True))
