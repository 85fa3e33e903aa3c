from __future__ import annotations

import math

import pytest
import torch

from mka_megatron.config.schema import L2Config, L3Config, MemoryConfig
from mka_megatron.memory.routing import levels, route, route_entropy, score_bias
from tests.helpers.numerics import assert_bitwise, assert_same

MODES = ("soft", "fixed", "top1", "top2")
LOGITS = torch.tensor([[0.1, 2.0, -1.0], [3.0, 3.0, 3.0], [-5.0, 0.0, 5.0]], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("available", [None, [True, True, False], [True, False, False]])
def test_weights_sum_to_one_over_the_available_levels(mode: str, available: list[bool] | None) -> None:
    mask = None if available is None else torch.tensor(available)
    weights = route(LOGITS, mask, mode)
    assert bool((weights >= 0).all())
    assert_same(weights.sum(dim=-1), torch.ones(3), terms=3)
    if mask is not None:
        assert bool((weights[:, ~mask] == 0).all())


def test_soft_is_the_softmax_over_what_is_available() -> None:
    mask = torch.tensor([True, False, True])
    expected = torch.stack(
        [torch.tensor([math.exp(a), 0.0, math.exp(c)]) for a, _, c in LOGITS.tolist()]
    ).double()
    expected /= expected.sum(dim=-1, keepdim=True)
    assert_same(route(LOGITS, mask, "soft").float(), expected, terms=3)


def test_fixed_is_uniform_and_gives_the_gate_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    weights = route(logits, torch.tensor([True, True, False]), "fixed")
    assert weights.tolist() == [[0.5, 0.5, 0.0]] * 3
    assert not weights.requires_grad


def test_top1_takes_one_level_and_ties_go_to_the_lower() -> None:
    assert route(LOGITS, None, "top1").tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_top2_is_the_softmax_within_the_pair() -> None:
    weights = route(LOGITS, None, "top2")
    a = 1 / (1 + math.exp(0.1 - 2.0))
    b = 1 / (1 + math.exp(-5.0))
    expected = torch.tensor([[1 - a, a, 0.0], [0.5, 0.5, 0.0], [0.0, 1 - b, b]], dtype=torch.float64)
    assert_same(weights, expected, terms=3)


@pytest.mark.parametrize("mode", ["top1", "top2"])
def test_hard_routes_have_the_gradient_of_the_soft_one(mode: str) -> None:
    direction = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (
        torch.autograd.grad((route(logits, None, each) * direction).sum(), logits)[0]
        for each, logits in (
            (mode, LOGITS.clone().requires_grad_()),
            ("soft", LOGITS.clone().requires_grad_()),
        )
    )
    assert bool(expected.any())
    assert_bitwise(found, expected)


def test_low_precision_logits_are_routed_in_fp32() -> None:
    assert route(LOGITS.bfloat16(), None, "soft").dtype == torch.float32
    assert score_bias(LOGITS.bfloat16(), None, "soft").dtype == torch.float32


@pytest.mark.parametrize("mode", ["soft", "fixed", "top2"])
def test_the_score_bias_is_the_log_of_the_weights_up_to_a_constant(mode: str) -> None:
    mask = torch.tensor([True, True, False])
    assert_same(score_bias(LOGITS, mask, mode).softmax(dim=-1), route(LOGITS, mask, mode), terms=3)


def test_top1_under_the_score_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="top1 has no gradient"):
        score_bias(LOGITS, None, "top1")


@pytest.mark.parametrize("function", [route, score_bias])
def test_unknown_modes_are_refused(function) -> None:
    with pytest.raises(ValueError, match="'hard'"):
        function(LOGITS, None, "hard")


def test_entropy_is_zero_for_a_hard_route_and_log_of_the_levels_for_a_uniform_one() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert_same(route_entropy(weights), torch.tensor([0.0, math.log(2)]), terms=2)


def test_levels_follow_the_configuration() -> None:
    assert levels(MemoryConfig()) == 2
    assert levels(MemoryConfig(l2=L2Config(enabled=False))) == 1
    assert levels(MemoryConfig(l3=L3Config(enabled=True))) == 3
    assert levels(MemoryConfig(l2=L2Config(enabled=False), l3=L3Config(enabled=True))) == 2
