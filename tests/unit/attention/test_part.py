"""Attention of a part of longer rows = the same slots of the attention over whole rows, by the fp64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mka_megatron.attention import sdpa
from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.part import part_attention
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Alone
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_same, assert_same_gradients

BATCH, SLOTS, HEADS, GROUPS, KEY, VALUE = 2, 48, 4, 2, 8, 6
PARTS = ((0, 16), (16, 32), (32, 48), (0, 48), (47, 48))


@dataclass(frozen=True)
class Prefix(Alone):
    """A view of rows that are all at hand elsewhere."""

    k: Tensor
    v: Tensor

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        return self.k, self.v


def gapped() -> Documents:
    """Chunks of 4 closed early inside documents, one of them without a token, and a padded tail."""
    starts = torch.zeros(BATCH, SLOTS, dtype=torch.bool)
    starts[:, 0] = starts[1, 20] = True
    padding = torch.zeros_like(starts)
    for chunk, tokens in enumerate((4, 2, 0, 4, 1, 3, 4, 0, 0, 2, 4, 1)):
        padding[:, 4 * chunk + tokens : 4 * chunk + 4] = True
    padding[1, 36:] = True
    return Documents.from_starts(starts, padding)


def rows(name: str) -> Documents:
    return gapped() if name == "gapped" else layout(name, BATCH, SLOTS)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "gapped"])
def test_a_part_is_its_slots_of_the_whole(name: str, part: tuple[int, int]) -> None:
    begin, end = part
    documents = rows(name)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(BATCH, SLOTS, heads, width, dtype=torch.float64, generator=generator).requires_grad_()
        for heads, width in ((HEADS, KEY), (GROUPS, KEY), (GROUPS, VALUE))
    )
    seen = oracle.visible(documents.starts, documents.padding)
    exact = oracle.attention(q, k, v, seen, KEY**-0.5)[:, begin:end]
    view = Prefix(k[:, :end], v[:, :end])
    out = causal_attention(
        q[:, begin:end], k[:, begin:end], v[:, begin:end], documents.part(begin, end), KEY**-0.5, view
    )
    assert_same(out, exact, terms=SLOTS)
    assert_same_gradients(out, exact, (q, k, v), terms=4 * SLOTS)


def test_a_part_without_tokens_reaches_its_keys() -> None:
    """Its gradients are 0, not absent: the ranks that own the keys wait for them. NaN in padding stays there."""
    padding = torch.zeros(1, 8, dtype=torch.bool)
    padding[:, 4:] = True
    documents = Documents.from_starts(torch.eye(1, 8, dtype=torch.bool), padding).part(4, 8)
    q, k = torch.full((1, 4, 2, 4), torch.nan), torch.randn(1, 8, 2, 4)
    k[:, 4:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, k.detach().clone())]
    out = part_attention(*leaves, documents, 0.5)
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("queries", [1, 5, 20, 47])
def test_queries_at_the_end_of_longer_keys(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_HOST_QUERIES", 8)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, SLOTS, heads, KEY, dtype=torch.float64, generator=generator).requires_grad_()
               for heads in (HEADS, GROUPS, GROUPS))  # fmt: skip
    exact = oracle.attention(q, k, v, torch.ones(1, SLOTS, SLOTS, dtype=torch.bool).tril(), 0.3)[:, -queries:]
    out = sdpa.causal_sdpa(q[:, -queries:], k, v, 0.3)
    assert_same(out, exact, terms=SLOTS)
    assert_same_gradients(out, exact, (q, k, v), terms=4 * SLOTS)


def test_keys_that_do_not_begin_with_the_rows_are_refused() -> None:
    documents = Documents.unpacked(1, 8).part(4, 8)
    x = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ValueError, match=r"slots \[4, 8\) of the rows come with 4 keys"):
        causal_attention(x, x, x, documents, 1.0)
