"""MKA against Algorithm 1 and eq. 5 as written, dense and in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mka_megatron.attention import grouped, mka, recursion
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import AttentionConfig, Config, RoutingConfig
from mka_megatron.memory.documents import Documents
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same, assert_same_gradients

B, S, H, G, D = 3, 37, 4, 2, 8
SCALE = D**-0.5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def raw(scope: str) -> tuple[Tensor, Tensor, Tensor, RouteInputs]:
    torch.manual_seed(0)
    logits = leaf(B, S, 2) if scope == "token" else leaf(B, S, G, 2)
    decays = [torch.rand(G, D, dtype=torch.float64).requires_grad_() for _ in range(2)]
    route = RouteInputs(logits, torch.tensor([0.7], dtype=torch.float64, requires_grad=True), *decays)
    return leaf(B, S, H, D), leaf(B, S, G, D), leaf(B, S, G, D), route


def run(mixture: str, mode: str = "soft") -> Config:
    return Config(attention=AttentionConfig(variant="mka", mixture=mixture), routing=RoutingConfig(mode=mode))


def rotated(where: Documents) -> Finish:
    cos, sin = oracle.tables(where.positions, D, 1e4)
    return Finish(lambda x: x, lambda x: x, lambda x, _: apply_rope(x, cos, sin))


def attend(q, k, v, route, where, config):
    return mka.attend(
        q, k, v, finish=rotated(where), route=route, documents=where, scale=SCALE, config=config
    )[:2]


def both_levels(q, k, v, route, where) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    keys = [k, oracle.ema(k, route.decay_k, where.starts, where.padding)]
    values = [v, oracle.ema(v, route.decay_v, where.starts, where.padding)]
    turn = [oracle.rotate(x, where.positions, 1e4) for x in (q, *keys)]
    return turn[0], turn[1:], values


def per_head(per_group: Tensor) -> Tensor:
    if per_group.dim() == 3:
        return per_group[:, :, None].expand(-1, -1, H, -1)
    return per_group.repeat_interleave(H // G, dim=2)


@pytest.mark.parametrize("mode", ["soft", "fixed"])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("documents", NAMES)
def test_the_output_mixture_is_algorithm_1(documents: str, scope: str, mode: str) -> None:
    q, k, v, route = raw(scope)
    where = layout(documents, B, S)
    seen = oracle.visible(where.starts, where.padding)
    shares = route.logits.softmax(dim=-1) if mode == "soft" else torch.full_like(route.logits, 1 / 2)
    queries, keys, values = both_levels(q, k, v, route, where)
    first, second = (
        oracle.attention(queries, *level, seen, SCALE) for level in zip(keys, values, strict=True)
    )
    lam = per_head(shares)
    exact = first + route.beta * (lam[..., :1] * first + lam[..., 1:] * second - first)
    out, monitored = attend(q, k, v, route, where, run("output", mode))
    assert_same(out, exact, terms=S)
    assert_same(monitored, shares, terms=2)
    wanted = [q, k, v, route.beta, route.decay_k, route.decay_v]
    assert_same_gradients(out, exact, wanted + ([route.logits] if mode == "soft" else []), terms=B * S)


@pytest.mark.parametrize("mode", ["soft", "fixed", "top2"])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("documents", NAMES)
def test_the_score_mixture_is_equation_5(documents: str, scope: str, mode: str) -> None:
    q, k, v, route = raw(scope)
    where = layout(documents, B, S)
    seen = oracle.visible(where.starts, where.padding)
    shares = torch.full_like(route.logits, 1 / 2) if mode == "fixed" else route.logits.softmax(dim=-1)
    queries, keys, values = both_levels(q, k, v, route, where)
    exact = oracle.score_mixture(queries, keys, values, per_head(shares.log()), seen, SCALE)
    out, monitored = attend(q, k, v, route, where, run("score", mode))
    assert_same(out, exact, terms=S)
    assert_same(monitored, shares, terms=2)
    wanted = [q, k, v, route.decay_k, route.decay_v]
    assert_same_gradients(out, exact, wanted + ([] if mode == "fixed" else [route.logits]), terms=B * S)


@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("documents", NAMES)
def test_gate_gradients_sum_to_zero_over_the_levels(documents: str, scope: str) -> None:
    q, k, v, route = raw(scope)
    where = layout(documents, B, S)
    queries, keys, values = both_levels(q, k, v, route, where)
    keys, values = [*keys, torch.randn_like(k)], [*values, torch.randn_like(v)]
    bias = leaf(*route.logits.shape[:-1], 3)
    out = mka.score_mixture(queries, keys, values, bias, where, SCALE)
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert bool(grad.any())
    assert_same(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]), terms=S, scale=grad)


def test_the_score_mixture_passes_gradcheck() -> None:
    torch.manual_seed(0)
    where = layout("padded", 2, 5)
    q, k, v, k2, v2 = leaf(2, 5, 2, 2), *(leaf(2, 5, 1, 2) for _ in range(4))
    assert torch.autograd.gradcheck(
        lambda q, bias, k, v, k2, v2: mka.score_mixture(q, [k, k2], [v, v2], bias, where, 0.7),
        (q, leaf(2, 5, 2), k, v, k2, v2),
    )


def test_a_level_that_takes_no_part_leaves_no_trace() -> None:
    q, k, v, _ = raw("token")
    where = layout("packed", B, S)
    bias = torch.zeros(B, S, 2, dtype=torch.float64)
    bias[..., 1] = float("-inf")
    k2, v2 = leaf(B, S, G, D), leaf(B, S, G, D)
    out = mka.score_mixture(q, [k, k2], [v, v2], bias, where, SCALE)
    exact = oracle.attention(q, k, v, oracle.visible(where.starts), SCALE)
    assert_same(out, exact, terms=S)
    assert_same_gradients(out, exact, [q, k, v, k2, v2], terms=S)


def test_top1_has_no_score_mixture() -> None:
    q, k, v, route = raw("token")
    with pytest.raises(ValueError, match="top1 has no gradient"):
        attend(q, k, v, route, layout("whole", B, S), run("score", "top1"))


@pytest.mark.parametrize("mixture", ["output", "score"])
def test_one_level_is_plain_attention_without_a_route(mixture: str) -> None:
    q, k, v, _ = raw("token")
    where = layout("packed", B, S)
    out, monitored = attend(q, k, v, None, where, run(mixture))
    plain, _ = grouped.attend(
        q, k, v, finish=rotated(where), route=None, documents=where, scale=SCALE, config=run(mixture)
    )
    assert monitored is None
    assert_bitwise(out, plain)


@pytest.mark.parametrize("mode", ["top1", "top2"])
def test_hard_output_routes_train_every_input(mode: str) -> None:
    q, k, v, route = raw("token")
    out, monitored = attend(q, k, v, route, layout("packed", B, S), run("output", mode))
    if mode == "top1":
        assert set(monitored.flatten().tolist()) == {0.0, 1.0}
    for grad in torch.autograd.grad(
        out.square().sum(), [q, k, v, route.logits, route.beta, route.decay_k, route.decay_v]
    ):
        assert bool(torch.isfinite(grad).all()) and bool(grad.any())


@pytest.mark.parametrize("recursive", [recursion.unnormalised, recursion.online])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_recursion_over_levels_is_equation_5(recursive, levels: int) -> None:
    torch.manual_seed(0)
    where = layout("packed", B, S)
    seen = oracle.visible(where.starts)
    q = leaf(B, S, H, D)
    keys, values = ([leaf(B, S, H, D) for _ in range(levels)] for _ in range(2))
    logits = leaf(B, S, H, levels)
    exact = oracle.score_mixture(q, keys, values, logits.log_softmax(dim=-1), seen, SCALE)
    found = recursive(
        [oracle.scores(q, k, seen, SCALE) for k in keys],
        [v.transpose(1, 2) for v in values],
        logits.softmax(dim=-1).transpose(1, 2),
    ).transpose(1, 2)
    assert_same(found, exact, terms=levels * S)
    assert_same_gradients(found, exact, [q, *keys, *values, logits], terms=levels * S)


def test_the_running_maximum_survives_scores_that_overflow() -> None:
    torch.manual_seed(0)
    seen = oracle.visible(layout("whole", 1, 6).starts)
    q, keys = (
        100 * torch.randn(1, 6, 1, D).double(),
        [100 * torch.randn(1, 6, 1, D).double() for _ in range(3)],
    )
    values, weights = [torch.randn(1, 6, 1, D).double() for _ in range(3)], torch.rand(1, 6, 1, 3).double()
    found = recursion.online(
        [oracle.scores(q, k, seen, SCALE) for k in keys],
        [v.transpose(1, 2) for v in values],
        weights.transpose(1, 2),
    ).transpose(1, 2)
    exact = oracle.score_mixture(q, keys, values, weights.log(), seen, SCALE)
    # the scores themselves, of size 1e4, carry their roundoff into the exponent
    largest = oracle.scores(q, keys[0], seen, SCALE).nan_to_num(neginf=0).abs().max()
    assert_same(found, exact, terms=6, scale=largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_score_mixture_is_as_accurate_as_torchs_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    where = layout("whole", B, S)
    mask = oracle.visible(where.starts)
    tensors = [torch.randn(B, S, heads, D).to(dtype).requires_grad_() for heads in (H, G, G, G, G)]
    bias = torch.randn(B, S, 2).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (*tensors, bias)]
    exact = oracle.score_mixture(wide[0], wide[1:5:2], wide[2:5:2], per_head(wide[5]), mask, SCALE)
    q, k, v, k2, v2 = tensors

    def peer(bias: Tensor) -> Tensor:
        """One SDPA over the concatenated levels, the bias in a mask tensor: a flash kernel unless the mask trains."""
        added = [bias[..., level, None].expand(B, S, S).masked_fill(~mask, float("-inf")) for level in (0, 1)]
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), torch.cat((k, k2), 1).transpose(1, 2), torch.cat((v, v2), 1).transpose(1, 2),
            attn_mask=torch.cat(added, dim=-1)[:, None].to(dtype), scale=SCALE, enable_gqa=True,
        ).transpose(1, 2)  # fmt: skip

    found, fixed, trained = (
        mka.score_mixture(q, [k, k2], [v, v2], bias, where, SCALE),
        peer(bias.detach()),
        peer(bias),
    )
    assert_as_accurate(found, fixed, exact)
    direction = torch.randn(exact.shape, dtype=torch.float64).to(dtype)
    ours = torch.autograd.grad(found, [*tensors, bias], direction)
    theirs = torch.autograd.grad(fixed, tensors, direction) + torch.autograd.grad(trained, bias, direction)
    references = torch.autograd.grad(exact, wide, direction.double())
    for one, other, reference in zip(ours, theirs, references, strict=True):
        assert_as_accurate(one, other, reference)
