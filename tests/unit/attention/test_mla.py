from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mka_megatron.attention.mla import absorbed_attention, latent_attention
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_same, assert_same_gradients

B, S, H, NOPE, ROPE = 3, 29, 3, 6, 4
SCALE = (NOPE + ROPE) ** -0.5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("value_channels", [6, 10, 13])
@pytest.mark.parametrize("documents", NAMES)
def test_it_is_dense_attention_with_a_shared_rotary_key(documents: str, value_channels: int) -> None:
    torch.manual_seed(0)
    where = layout(documents, B, S)
    q, kv, k_rope = leaf(B, S, H, NOPE + ROPE), leaf(B, S, H, NOPE + value_channels), leaf(B, S, ROPE)
    cos, sin = oracle.tables(where.positions, ROPE, 1e4)
    found = latent_attention(q, kv, k_rope, cos, sin, where, nope=NOPE, scale=SCALE)

    # the scores of the two parts add up; every head reads the one rotary key
    turned_q = oracle.rotate(q[..., NOPE:], where.positions, 1e4)
    turned_k = oracle.rotate(k_rope[:, :, None], where.positions, 1e4)[:, :, 0]
    scores = torch.einsum("bthn,buhn->bhtu", q[..., :NOPE], kv[..., :NOPE])
    scores = (scores + torch.einsum("bthr,bur->bhtu", turned_q, turned_k)) * SCALE
    seen = oracle.visible(where.starts, where.padding)[:, None]
    blind = ~seen.any(dim=-1, keepdim=True)
    weights = (
        scores.masked_fill(~seen, float("-inf")).masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
    )
    exact = torch.einsum("bhtu,buhe->bthe", weights, kv[..., NOPE:])

    assert found.shape == (B, S, H, value_channels)
    assert_same(found, exact, terms=S)
    assert_same_gradients(found, exact, [q, kv, k_rope], terms=H * S)


@pytest.mark.parametrize("documents", NAMES)
def test_the_latents_themselves_give_the_same(documents: str) -> None:
    torch.manual_seed(0)
    where, values, latents = layout(documents, B, S), 7, 5
    q, latent, k_rope, up = (
        leaf(B, S, H, NOPE + ROPE),
        leaf(B, S, latents),
        leaf(B, S, ROPE),
        leaf(H * (NOPE + values), latents),
    )
    kv = (latent @ up.mT).unflatten(-1, (H, -1))
    turn = oracle.tables(where.positions, ROPE, 1e4)
    exact = latent_attention(q, kv, k_rope, *turn, where, nope=NOPE, scale=SCALE)
    found = absorbed_attention(q, latent, k_rope, up, *turn, where, nope=NOPE, scale=SCALE)
    assert_same(found, exact, terms=S * latents)
