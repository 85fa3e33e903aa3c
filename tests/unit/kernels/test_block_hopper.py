"""block_attention's kernels for Hopper on the CPU: its warps' roles run side by side over a model of the hardware.

The model reads descriptors, swizzled tiles and barriers as the PTX manual has them, and runs everything twice: with
copies and products as early and as late as the program alcases, which must give the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mka_megatron.ops.block_attention import cuda
from mka_megatron.ops.block_attention.layout import Layout
from tests.helpers import block_oracle, numerics
from tests.helpers.block_cases import Case, make_case
from tests.helpers.host_block_attention import run_on_host

FULL = 128
CASES: dict[str, dict[str, Any]] = {
    "ragged": {"rows": [[(FULL, 0), (100, 0), (FULL, 0), (7, 0), (60, 0)]], "missing": 50, "heads": (2, 1)},
    "documents": {
        "rows": [
            [(FULL, 0), (1, 0), (127, 1), (0, 1), (FULL, 1), (90, 1)],
            [(FULL, 0), (FULL, 0), (FULL, 0), (FULL, 0), (FULL, 1), (5, 2)],
        ],
        "channels": 64,
        "heads": (4, 2),
        "bias": "shared",
        "dtype": torch.float16,
    },
    "pages": {
        "rows": [[(FULL, 0), (17, 0), (FULL, 0), (FULL, 0), (64, 0), (FULL, 0), (FULL, 0)]],
        "first": 4,
        "recalled": 3,
        "heads": (1, 1),
        "dtype": torch.float16,
    },
    # more than one tile of summaries, and one that begins with those of another document
    "summaries": {
        "rows": [[(9, 0)] * 70 + [(FULL, 1)] * 70 + [(3, 1), (FULL, 1)]],
        "first": 139,
        "window": 1,
        "heads": (1, 1),
        "channels": 64,
    },
    "no bias": {
        "rows": [[(FULL, 0)] * 3],
        "recalled": 0, "summaries": False, "bias": "none", "window": 4, "heads": (2, 1),
    },
}


@pytest.fixture(autouse=True)
def host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_host(library, monkeypatch)


def make(name: str) -> Case:
    """Numbers that its dtype has, the bias too."""
    given: dict[str, Any] = {"channels": 128, "dtype": torch.bfloat16, **CASES[name]}
    dtype = given.pop("dtype")
    case = make_case(FULL, **given).to(dtype)
    if case.bias is None:
        return case
    return dataclasses.replace(case, bias=case.bias.detach().to(dtype).float().requires_grad_())


def plain(case: Case, dtype: torch.dtype) -> Case:
    """All of it in `dtype`, as new leaves."""
    bias = None if case.bias is None else case.bias.detach().to(dtype).requires_grad_()
    return dataclasses.replace(case.to(dtype), bias=bias)


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    scale = case.q.shape[-1] ** -0.5
    return block_oracle.attend(*case.arguments, table=case.table, window=case.window, scale=scale)


def attend(case: Case, kernel: str = "wgmma") -> tuple[Tensor, Tensor]:
    """Outputs and logarithms of sums."""
    scale = case.q.shape[-1] ** -0.5
    layout = Layout.of(*case.arguments, chunks=case.table, window=case.window, scale=scale)
    summaries = case.summaries or (None, None)
    pages = case.pages
    recalled = (None,) * 4 if pages is None else (pages.k, pages.v, pages.lengths, pages.index)
    tensors = (case.q, case.k, case.v, *summaries, *recalled, case.bias, case.table.lengths, case.table.documents)
    sizes = layout.size, layout.first, layout.window, scale, cuda.KERNELS[kernel]
    return cuda._forward(*tensors, *sizes)


def tokens(case: Case) -> Tensor:
    """[B, S] which queries are tokens."""
    table, slots = case.table, torch.arange(case.q.shape[1])
    chunk = table.first + slots // table.size
    return slots % table.size < table.lengths[:, chunk]


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_pytorch(name: str) -> None:
    """Outputs, logarithms of sums, every gradient."""
    case = make(name)
    peer, exact = plain(case, case.q.dtype), plain(case, torch.float64)
    (out, lse), (peer_out, _), (exact_out, sums) = attend(case), oracle(peer), oracle(exact)
    numerics.assert_as_accurate(out, peer_out, exact_out)
    assert not bool(out[~tokens(case)].any()), "padding is 0"
    nothing = sums == math.inf
    assert bool((lse[nothing] == math.inf).all())
    numerics.assert_same(lse[~nothing], sums[~nothing], 4 * FULL)
    direction = some_direction(case)
    grads = (gradients(x, y, direction) for x, y in ((case, out), (peer, peer_out), (exact, exact_out)))
    for one, other, right in zip(*grads, strict=True):
        numerics.assert_as_accurate(one, other.to(one.dtype), right)


def some_direction(case: Case) -> Tensor:
    return torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1)).to(case.q.dtype)


def gradients(case: Case, out: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(out, case.tensors, direction.to(out.dtype), allow_unused=True, materialize_grads=True)
    return tuple(grads)


def test_a_target_of_many_visits_is_split() -> None:
    """So that parts of its gradients are summed; the reference is the peer that can do so many slots."""
    case = make_case(
        FULL, [[(3, 0)] * 34], window=34, recalled=0, summaries=False, heads=(1, 1), channels=64, bias="none"
    ).to(torch.bfloat16)
    exact = plain(case, torch.float64)
    direction = some_direction(case)
    found, wanted = gradients(case, attend(case)[0], direction), gradients(exact, exact.run(), direction)
    for one, right in zip(found, wanted, strict=True):
        numerics.assert_same(one, right, 4)


@pytest.mark.parametrize("name", ["ragged", "documents", "summaries"])
def test_padding_may_hold_anything(name: str) -> None:
    case = make(name)
    other = spoilt(case)
    found, expected = attend(other), attend(case)
    for one, right in zip(found, expected, strict=True):
        numerics.assert_bitwise(one, right)
    direction = some_direction(case)
    strange = direction.masked_fill(~tokens(case)[..., None, None], math.nan)
    for one, right in zip(
        gradients(other, found[0], strange), gradients(case, expected[0], direction), strict=True
    ):
        numerics.assert_bitwise(one, right)


def spoilt(case: Case) -> Case:
    """NaN wherever no query looks."""
    table, halo = case.table, min(case.window // FULL - 1, case.table.first)
    slots = torch.arange(case.k.shape[1])
    padding = slots % FULL >= table.lengths[:, table.first - halo + slots // FULL]

    def without(x: Tensor, where: Tensor) -> Tensor:
        return x.detach().masked_fill(where[..., None, None], math.nan).requires_grad_()

    summaries, pages = case.summaries, case.pages
    if summaries is not None:
        empty = table.lengths == 0
        summaries = (without(summaries[0], empty), without(summaries[1], empty))
    if pages is not None and pages.k.numel():
        beyond = torch.arange(FULL) >= pages.lengths[..., None]
        k, v = (
            x.detach().masked_fill(beyond[..., None], math.nan).requires_grad_() for x in (pages.k, pages.v)
        )
        pages = dataclasses.replace(pages, k=k, v=v)
    return dataclasses.replace(
        case,
        q=without(case.q, ~tokens(case)),
        k=without(case.k, padding),
        v=without(case.v, padding),
        summaries=summaries,
        pages=pages,
    )


def test_strided_operands() -> None:
    """q, k and v as slices of one projection."""
    case = make("ragged")
    joined = torch.cat([case.q, case.k, case.v], dim=2).detach()
    q, k, v = joined.split([case.q.shape[2], case.k.shape[2], case.v.shape[2]], dim=2)
    numerics.assert_bitwise(attend(dataclasses.replace(case, q=q, k=k, v=v))[0], attend(case)[0])


def test_a_hidden_level() -> None:
    """A bias of -inf hides it."""
    case = make("pages")
    assert case.bias is not None
    bias = case.bias.detach().clone()
    bias[..., 1:] = -math.inf
    hidden = attend(dataclasses.replace(case, bias=bias))
    alone = attend(dataclasses.replace(case, bias=bias, summaries=None, pages=None))
    numerics.assert_bitwise(hidden[0], alone[0])
    numerics.assert_bitwise(hidden[1], alone[1])


def test_other_chunk_sizes_are_refused(library: ctypes.CDLL) -> None:
    case = make_case(64, [[(64, 0)] * 2], channels=64, recalled=0).to(torch.bfloat16)
    inputs = (case.q, case.k, case.v, *(case.summaries or ()), *[None] * 4, case.bias)
    args = cuda.arguments(
        (*inputs, case.table.lengths, case.table.documents), (64, 0, 2, 0.125, cuda.KERNELS["wgmma"])
    )
    assert library.mka_host_block_attention_forward(ctypes.byref(args)) == -1
