"""Every variant, bit for bit: no later token and no other document changes an output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import AttentionConfig, Config, RoutingConfig
from mka_megatron.memory.documents import Documents
from tests.helpers import oracle
from tests.helpers.layouts import layout
from tests.helpers.numerics import assert_bitwise

B, S, H, D, HIDDEN = 2, 133, 4, 16, 24

CASES = [
    ("mha", {}, {}, "ema"), ("mqa", {}, {}, "ema"), ("gqa", {}, {}, "ema"), ("mla", {}, {}, "ema"),
    ("fastmka", {}, {}, "ema"), ("fastmka", {}, {}, "mean"), ("fastmka", {}, {"scope": "group"}, "ema"),
    ("fastmka", {}, {"mode": "top1"}, "ema"), ("fastmka", {"fuse": "k"}, {"mode": "fixed"}, "ema"),
    ("mka", {"mixture": "output"}, {}, "ema"), ("mka", {"mixture": "output"}, {"mode": "top1"}, "mean"),
    ("mka", {"mixture": "score"}, {}, "ema"), ("mka", {"mixture": "score"}, {"scope": "group"}, "mean"),
]  # fmt: skip


def layer(
    name: str, attention: dict, routing: dict, summary: str, dtype: torch.dtype
) -> Callable[[Tensor, Documents], Tensor]:
    """A whole attention layer [B, S, hidden] -> [B, S, H, e] with random projections, gate and decays."""
    torch.manual_seed(0)
    config = Config(attention=AttentionConfig(variant=name, **attention), routing=RoutingConfig(**routing))
    variant = VARIANTS[name]
    groups = {"mha": H, "mqa": 1}.get(name, 2)
    wq, wk, wv = (torch.randn(HIDDEN, n * D, dtype=dtype) for n in (H, groups, groups))
    gate = torch.randn(HIDDEN, groups * 2 if config.routing.scope == "group" else 2, dtype=dtype)
    latent, shared = torch.randn(HIDDEN, H * (D - 4 + D), dtype=dtype), torch.randn(HIDDEN, 4, dtype=dtype)
    decay = torch.linspace(0.1, 0.99, D, dtype=dtype) if summary == "ema" else None

    def project(x: Tensor, weight: Tensor) -> Tensor:
        # elementwise, so that a token's projection has the same bits whatever the others are
        return (x[..., None] * weight).sum(dim=-2)

    def forward(x: Tensor, where: Documents) -> Tensor:
        cos, sin = oracle.tables(where.positions, 4 if variant.projection == "latent" else D, 1e4)
        q = project(x, wq).unflatten(-1, (H, D))
        if variant.projection == "latent":
            kv = project(x, latent).unflatten(-1, (H, -1))
            return variant.attend(q, kv, project(x, shared), cos, sin, where, nope=D - 4, scale=D**-0.5)
        route = None
        if variant.levels(config) > 1:
            logits = project(x, gate)
            logits = logits.unflatten(-1, (groups, 2)) if config.routing.scope == "group" else logits
            route = RouteInputs(logits, torch.ones(1, dtype=dtype), decay, decay)
        k, v = (project(x, w).unflatten(-1, (groups, D)) for w in (wk, wv))
        finish = Finish(lambda x: x, lambda x: x, lambda heads, _: apply_rope(heads, cos, sin))
        return variant.attend(
            q, k, v, finish=finish, route=route, documents=where, scale=D**-0.5, config=config
        )[0]

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_later_token_changes_a_bit(case, dtype: torch.dtype) -> None:
    forward = layer(*case, dtype)
    where = Documents.unpacked(B, S)
    x = torch.randn(B, S, HIDDEN, dtype=dtype)
    before = forward(x, where)
    for time in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, S - 1):
        changed = x.clone()
        changed[:, time:] = 3 * torch.randn_like(changed[:, time:])
        after = forward(changed, where)
        assert_bitwise(after[:, :time], before[:, :time])
        assert not torch.equal(after[:, time], before[:, time])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", ["packed", "padded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_other_document_changes_a_bit(case, documents: str, dtype: torch.dtype) -> None:
    forward = layer(*case, dtype)
    where = layout(documents, B, S)
    x = torch.randn(B, S, HIDDEN, dtype=dtype, requires_grad=True)
    before = forward(x, where)
    (before_grad,) = torch.autograd.grad(before.square().sum(), x)
    spans = where.spans[:: max(1, len(where.spans) // 4)]
    for row, begin, end in spans:
        changed = torch.full_like(x, float("nan"))
        if where.padding is not None:
            changed[where.padding] = 3 * torch.randn_like(changed[where.padding])
        changed[row, begin:end] = x.detach()[row, begin:end]
        changed.requires_grad_()
        after = forward(changed, where)
        assert_bitwise(after[row, begin:end], before[row, begin:end])
        (after_grad,) = torch.autograd.grad(after[row, begin:end].square().sum(), changed)
        assert_bitwise(after_grad[row, begin:end], before_grad[row, begin:end])
        after_grad[row, begin:end] = 0
        assert not bool(after_grad.nan_to_num(nan=0.0).any())
