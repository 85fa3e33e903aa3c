"""FastMKA against Algorithm 2 as written: hidden states are fused, then projected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mka_megatron.attention import fastmka, grouped
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import AttentionConfig, Config, RoutingConfig
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_bitwise, assert_same, assert_same_gradients

B, S, H, G, D, HIDDEN = 2, 37, 4, 2, 8, 24
SCALE = D**-0.5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": leaf(B, S, HIDDEN), "wq": leaf(HIDDEN, H * D), "wk": leaf(HIDDEN, G * D), "wv": leaf(HIDDEN, G * D),
        "bq": leaf(H * D), "bk": leaf(G * D), "bv": leaf(G * D), "q_norm": leaf(D), "k_norm": leaf(D),
        "logits": leaf(B, S, 2), "beta": torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        "decay": torch.tensor(0.83, dtype=torch.float64, requires_grad=True),
    }  # fmt: skip


def fused_before_projection(p: dict[str, Tensor], bias: bool, norm: bool, where, summary: str) -> Tensor:
    """Algorithm 2: L_1 = X, L_2 = summary(X), M = sum lambda_l L_l (blended by beta), K = M Wk + bk, V = M Wv + bv."""
    x = p["x"]
    second = (
        oracle.ema(x, p["decay"], where.starts, where.padding)
        if summary == "ema"
        else oracle.prefix_mean(x, where.starts, where.padding)
    )
    route = p["logits"].exp() / p["logits"].exp().sum(dim=-1, keepdim=True)
    mixed = route[..., :1] * x + route[..., 1:] * second
    mixed = x + p["beta"] * (mixed - x)
    q, k, v = x @ p["wq"], mixed @ p["wk"], mixed @ p["wv"]
    if bias:
        q, k, v = q + p["bq"], k + p["bk"], v + p["bv"]
    q, k, v = q.view(B, S, H, D), k.view(B, S, G, D), v.view(B, S, G, D)
    if norm:
        q, k = oracle.rms_norm(q, p["q_norm"], 1e-6), oracle.rms_norm(k, p["k_norm"], 1e-6)
    q, k = oracle.rotate(q, where.positions, 1e4), oracle.rotate(k, where.positions, 1e4)
    return oracle.attention(q, k, v, oracle.visible(where.starts, where.padding), SCALE)


def fused_after_projection(p: dict[str, Tensor], bias: bool, norm: bool, where, summary: str) -> Tensor:
    x = p["x"]
    q, k, v = x @ p["wq"], x @ p["wk"], x @ p["wv"]
    if bias:
        q, k, v = q + p["bq"], k + p["bk"], v + p["bv"]
    cos, sin = oracle.tables(where.positions, D, 1e4)

    def normed(name: str):
        return lambda heads: oracle.rms_norm(heads, p[name], 1e-6) if norm else heads

    decay = p["decay"] if summary == "ema" else None
    out, *_ = fastmka.attend(
        q.view(B, S, H, D), k.view(B, S, G, D), v.view(B, S, G, D),
        finish=Finish(normed("q_norm"), normed("k_norm"), lambda x, _: apply_rope(x, cos, sin)), route=RouteInputs(p["logits"], p["beta"], decay, decay),
        documents=where, scale=SCALE, config=Config(),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("summary", ["ema", "mean"])
@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fusion_after_the_projection_is_algorithm_2(
    bias: bool, norm: bool, documents: str, summary: str
) -> None:
    p = weights()
    where = layout(documents, B, S)
    found = fused_after_projection(p, bias, norm, where, summary)
    exact = fused_before_projection(p, bias, norm, where, summary)
    assert_same(found, exact, terms=HIDDEN * S)
    names = [
        n for n in p if (bias or n not in ("bq", "bk", "bv")) and (norm or n not in ("q_norm", "k_norm"))
    ]
    assert_same_gradients(found, exact, [p[n] for n in names], terms=HIDDEN * S)


def raw(scope: str = "token") -> tuple[Tensor, Tensor, Tensor, RouteInputs]:
    torch.manual_seed(0)
    logits = leaf(B, S, 2) if scope == "token" else leaf(B, S, G, 2)
    decays = [torch.rand(G, D, dtype=torch.float64).requires_grad_() for _ in range(2)]
    route = RouteInputs(logits, torch.tensor([0.7], dtype=torch.float64, requires_grad=True), *decays)
    return leaf(B, S, H, D), leaf(B, S, G, D), leaf(B, S, G, D), route


FINISH = Finish(lambda x: x, lambda x: x, lambda x, _: x)


def config(fuse: str = "kv", mode: str = "soft") -> Config:
    return Config(attention=AttentionConfig(fuse=fuse), routing=RoutingConfig(mode=mode))


def attend(q, k, v, route, where, run: Config):
    return fastmka.attend(q, k, v, finish=FINISH, route=route, documents=where, scale=SCALE, config=run)[:2]


@pytest.mark.parametrize("mode", ["soft", "fixed", "top1", "top2"])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("fuse", ["kv", "k", "v"])
def test_what_is_fused_and_by_which_route(fuse: str, scope: str, mode: str) -> None:
    q, k, v, route = raw(scope)
    where = layout("packed", B, S)
    soft = route.logits.softmax(dim=-1)
    shares = {
        "soft": soft, "top2": soft, "fixed": torch.full_like(soft, 1 / 2),
        "top1": (route.logits >= route.logits.flip(-1)).double(),
    }[mode]  # fmt: skip
    per_head = shares if scope == "group" else shares[:, :, None].expand(B, S, G, 2)

    def blend(tokens: Tensor, decay: Tensor) -> Tensor:
        level2 = oracle.ema(tokens, decay, where.starts)
        return tokens + route.beta * (per_head[..., :1] * tokens + per_head[..., 1:] * level2 - tokens)

    exact = oracle.attention(
        q,
        blend(k, route.decay_k) if "k" in fuse else k,
        blend(v, route.decay_v) if "v" in fuse else v,
        oracle.visible(where.starts),
        SCALE,
    )
    out, seen = attend(q, k, v, route, where, config(fuse, mode))
    assert_same(out, exact, terms=S)
    assert_same(seen, shares, terms=2)
    assert not seen.requires_grad


@pytest.mark.parametrize("mode", ["soft", "top1", "top2"])
def test_every_input_is_trained(mode: str) -> None:
    q, k, v, route = raw()
    out, _ = attend(q, k, v, route, layout("packed", B, S), config(mode=mode))
    wanted = [q, k, v, route.logits, route.beta, route.decay_k, route.decay_v]
    for grad in torch.autograd.grad(out.square().sum(), wanted):
        assert bool(torch.isfinite(grad).all()) and bool(grad.any())


def test_a_blend_of_zero_is_plain_attention_bit_for_bit_and_still_trains() -> None:
    q, k, v, route = raw()
    route = replace(route, beta=torch.zeros(1, dtype=torch.float64, requires_grad=True))
    where = layout("packed", B, S)
    out, _ = attend(q, k, v, route, where, config())
    plain, _ = grouped.attend(
        q, k, v, finish=FINISH, route=None, documents=where, scale=SCALE, config=config()
    )
    assert_bitwise(out, plain)
    (grad,) = torch.autograd.grad(out.square().sum(), route.beta)
    assert bool(grad.any())


def test_one_level_is_plain_attention_without_a_route() -> None:
    q, k, v, _ = raw()
    where = layout("packed", B, S)
    out, seen = attend(q, k, v, None, where, config())
    plain, _ = grouped.attend(
        q, k, v, finish=FINISH, route=None, documents=where, scale=SCALE, config=config()
    )
    assert seen is None
    assert_bitwise(out, plain)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    where = layout("padded", 2, 5)
    q, k, v = leaf(2, 5, 2, 2), leaf(2, 5, 1, 2), leaf(2, 5, 1, 2)
    logits, beta = leaf(2, 5, 2), leaf(1)
    decay = torch.rand(1, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, *route: attend(q, k, v, RouteInputs(*route), where, config())[0],
        (q, k, v, logits, beta, decay, decay),
    )
