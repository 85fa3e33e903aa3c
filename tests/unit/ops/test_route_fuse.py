"""The fusion's specification against the paper's formulas token by token, in fp64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mka_megatron.memory.documents import Documents
from mka_megatron.ops import route_fuse as op
from mka_megatron.ops.route_fuse import Stream
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same, assert_same_gradients

B, S, G, D = 3, 37, 2, 4
LEVELS = {"l2": 2, "l3": 2, "l2 l3": 3}
DECAYS = {"scalar": (), "head": (G, 1), "channel": (G, D)}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def stream(levels: str = "l2 l3", carried: bool = False, decay: str = "channel") -> Stream:
    return Stream(
        leaf(B, S, G, D),
        torch.rand(DECAYS[decay], dtype=torch.float64).requires_grad_() if "l2" in levels else None,
        leaf(B, G, D) if carried and "l2" in levels else None,
        leaf(B, S, G, D) if "l3" in levels else None,
    )


def written(
    streams: list[Stream], logits: Tensor, beta: Tensor, where: Documents, available: Tensor | None, mode: str
) -> list[tuple[Tensor, Tensor | None]]:
    """y = x + beta * (sum_l lambda_l level_l - x), as the paper has it."""
    if available is None:
        available = torch.ones(logits.shape[:2] + logits.shape[-1:], dtype=torch.bool)
    if logits.dim() == 3:
        logits = logits[:, :, None]
    weights = chosen(logits, available[:, :, None].expand_as(logits), mode)
    results = []
    for each in streams:
        levels, last = [each.x], None
        if each.decay is not None:
            starts = where.starts.clone()
            if each.carry is None and where.padding is not None:
                starts |= (~where.padding).cumsum(dim=1) == 1  # of a part that begins on padding
            levels.append(oracle.ema(each.x, each.decay, starts, where.padding, each.carry))
            last = levels[-1][:, -1]
        levels += [level for level in (each.summary, each.long_term) if level is not None]
        mixed = sum(weights[..., number, None] * level for number, level in enumerate(levels))
        results.append((each.x + beta * (mixed - each.x), last))
    return results


def chosen(logits: Tensor, available: Tensor, mode: str) -> Tensor:
    """The route of [B, S, G or 1, L] logits; a hard one has the gradient of the soft one."""
    if mode == "fixed":
        return available / available.sum(dim=-1, keepdim=True, dtype=torch.float64)
    raised = logits.exp() * available
    soft = raised / raised.sum(dim=-1, keepdim=True)
    if mode == "soft":
        return soft
    kept = torch.zeros_like(available)
    for place in np.ndindex(*logits.shape[:-1]):
        order = sorted((-logits[place][level].item(), level) for level in range(3) if available[place][level])
        kept[place][[level for _, level in order[: int(mode[-1])]]] = True
    hard = (raised * kept / (raised * kept).sum(dim=-1, keepdim=True)).detach()
    return hard + (soft - soft.detach())


def fused(streams: list[Stream], logits: Tensor, beta: Tensor, where: Documents, available: Tensor | None, mode: str):
    levels = available if available is None or logits.dim() == 3 else available[:, :, None]
    results, weights = op.route_fuse(streams, logits, beta, where, levels, mode=mode)
    wide = logits if logits.dim() == 4 else logits[:, :, None]
    everywhere = torch.ones(B, len(where.starts[0]), wide.shape[-1], dtype=torch.bool) if available is None else available
    exact = chosen(wide, everywhere[:, :, None].expand_as(wide), mode)
    assert_same(weights, exact.detach().view_as(weights), terms=8)
    return results


def everything(results: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """All outputs as one vector."""
    return torch.cat([part.flatten() for result in results for part in result if part is not None])


def leaves(streams: list[Stream], *more: Tensor) -> list[Tensor]:
    parts = [part for s in streams for part in (s.x, s.decay, s.carry, s.long_term) if part is not None]
    return [*parts, *more]


def some_levels(levels: int) -> Tensor:
    """[B, S, L] bool: L1 always, the others here and there."""
    available = torch.rand(B, S, levels) < 0.6
    available[..., 0] = True
    return available


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize("fuses", [1, 2])
def test_is_what_the_paper_writes(fuses: int, documents: str, levels: str, scope: str, carried: bool) -> None:
    torch.manual_seed(0)
    where = layout(documents, B, S)
    streams = [stream(levels, carried) for _ in range(fuses)]
    count = LEVELS[levels]
    logits, beta = leaf(B, S, *((G,) if scope == "group" else ()), count), leaf(1)
    for available in (None, some_levels(count)):
        found = everything(fused(streams, logits, beta, where, available, "soft"))
        exact = everything(written(streams, logits, beta, where, available, "soft"))
        assert_same(found, exact, terms=S)
        assert_same_gradients(found, exact, leaves(streams, logits, beta), terms=B * S * G * D)


@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("decay", DECAYS)
def test_modes_and_decays(decay: str, mode: str) -> None:
    torch.manual_seed(1)
    where = layout("packed", B, S)
    streams = [stream("l2 l3", decay=decay) for _ in range(2)]
    with torch.no_grad():
        beta = torch.tensor(0.7, dtype=torch.float64)
        logits = torch.randint(0, 3, (B, S, 3)).double()  # with ties
    logits.requires_grad_(), beta.requires_grad_()
    available = some_levels(3)
    found = everything(fused(streams, logits, beta, where, available, mode))
    exact = everything(written(streams, logits, beta, where, available, mode))
    assert_same(found, exact, terms=S)
    assert_same_gradients(found, exact, leaves(streams, logits, beta), terms=B * S * G * D)


@pytest.mark.parametrize("begin", [0, 5, 18])
def test_a_part_that_begins_within_documents(begin: int) -> None:
    """Its slot 0 may be padding of a document that goes on."""
    torch.manual_seed(2)
    where = layout("gaps", B, S + begin).part(begin, begin + S)
    for carried in (False, True):
        streams, logits, beta = [stream(carried=carried)], leaf(B, S, 3), leaf()
        found = everything(fused(streams, logits, beta, where, None, "soft"))
        exact = everything(written(streams, logits, beta, where, None, "soft"))
        assert_same(found, exact, terms=S)
        assert_same_gradients(found, exact, leaves(streams, logits, beta), terms=B * S * G * D)


@pytest.mark.parametrize("sequence", [1, 2, 3, 127, 128, 129])
def test_lengths(sequence: int) -> None:
    torch.manual_seed(3)
    where = layout("packed", B, sequence)
    streams = [Stream(leaf(B, sequence, G, D), torch.rand(G, D, dtype=torch.float64), leaf(B, G, D))]
    logits, beta = leaf(B, sequence, 2), leaf(1)
    found = everything(fused(streams, logits, beta, where, None, "soft"))
    exact = everything(written(streams, logits, beta, where, None, "soft"))
    assert_same(found, exact, terms=sequence)


def test_gradcheck() -> None:
    torch.manual_seed(4)
    where = layout("gaps", 2, 5)

    def run(x: Tensor, decay: Tensor, carry: Tensor, l3: Tensor, logits: Tensor, beta: Tensor) -> Tensor:
        return everything(op.route_fuse([Stream(x, decay, carry, l3)], logits, beta, where)[0])

    decay = torch.rand(G, D, dtype=torch.float64).requires_grad_()
    inputs = (leaf(2, 5, G, D), decay, leaf(2, G, D), leaf(2, 5, G, D), leaf(2, 5, G, 3), leaf(1))
    assert torch.autograd.gradcheck(run, inputs)


def test_beta_zero_gives_the_tokens() -> None:
    torch.manual_seed(5)
    streams = [stream(), stream()]
    zero = torch.zeros(1, dtype=torch.float64)
    results, _ = op.route_fuse(streams, leaf(B, S, 3), zero, layout("packed", B, S))
    for (found, _), each in zip(results, streams, strict=True):
        assert_bitwise(found, each.x)


def test_another_documents_nan_and_paddings_change_no_bit() -> None:
    torch.manual_seed(6)
    where = layout("padded", B, S)
    assert where.padding is not None
    each, logits, beta = stream("l2"), leaf(B, S, 2), leaf(1)
    # the first document of row 0, and all padding
    poisoned = where.padding.clone()
    poisoned[0, : int(where.starts[0].nonzero()[1])] = True
    dirty = each.x.detach().masked_fill(poisoned[..., None, None], float("nan")).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = op.route_fuse([replace(each, x=x)], logits, beta, where)[0][0][0][~poisoned]
        return y, torch.autograd.grad(y.sum(), x)[0][~poisoned]

    for found, exact in zip(run(dirty), run(each.x), strict=True):
        assert_bitwise(found, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    where = layout("packed", B, S)
    x, long_term = (torch.randn(B, S, G, D).to(dtype) for _ in range(2))
    decay, logits, beta = torch.rand(G, D), torch.randn(B, S, 3), torch.tensor([0.6])

    def run(*given: Tensor) -> Tensor:
        x, decay, long_term, logits, beta = given
        return op.route_fuse([Stream(x, decay, None, long_term)], logits, beta, where)[0][0][0]

    given = (x, decay, long_term, logits, beta)
    exact = run(*(each.double() for each in given))
    assert_as_accurate(run(*given), exact.to(dtype), exact)


def good() -> tuple[list[Stream], Tensor, Tensor, Documents, Tensor]:
    return [stream(), stream()], leaf(B, S, 3), leaf(1), layout("single", B, S), some_levels(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0] * 2, *a[1:]), "4 streams"),
        (lambda a: ([a[0][0], stream("l2")], *a[1:]), "differ"),
        (lambda a: ([Stream(a[0][0].x)], *a[1:]), "nothing to fuse"),
        (lambda a: ([replace(a[0][0], decay=torch.ones(3, G, D))], *a[1:]), "decay has shape"),
        (lambda a: ([replace(a[0][0], carry=torch.ones(B, D))], *a[1:]), "carry has shape"),
        (lambda a: ([replace(a[0][0], long_term=a[0][0].x.float())], *a[1:]), "long_term is torch.float32"),
        (lambda a: (a[0], leaf(B, S, 2), *a[2:]), "logits has shape"),
        (lambda a: (*a[:2], leaf(2), *a[3:]), "beta has shape"),
        (lambda a: (*a[:3], layout("single", B, S + 1)), r"rows are of \[3, 38\] slots, x of \[3, 37\]"),
        (lambda a: (*a[:4], a[4].long()), "available is torch.int64"),
        (lambda a: (*a[:4], a[4][..., :2]), r"available is torch.bool of shape \[3, 37, 2\]: give bool \[3, 37, 3\]"),
        (lambda a: ([replace(a[0][0], summary=a[0][0].x)], *a[1:]), "decay and summary are both given"),
    ],
)
def test_refusals(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.route_fuse(*change(good()))
    with pytest.raises(ValueError, match="mode is 'hard'"):
        op.route_fuse(*good(), mode="hard")
