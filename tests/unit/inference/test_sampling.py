"""Top-k and top-p keep what they say, and draws follow the seed."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.inference.sampling import Sampling, choose, distribution
from tests.helpers.numerics import assert_same


def logits(rows: int = 3, vocabulary: int = 40) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))


def expected(row: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By hand, token by token."""
    weights = {token: float(value) for token, value in enumerate((row.double() / sampling.temperature).exp())}
    order = sorted(weights, key=lambda token: -weights[token])
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if sampling.top_p < 1 and mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    found = torch.zeros(len(row), dtype=torch.float64)
    for token in kept:
        found[token] = weights[token] / mass
    return found


@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_distribution(temperature: float, top_p: float, top_k: int | None) -> None:
    sampling = Sampling(temperature, top_k, top_p)
    given = logits()
    found = distribution(given, sampling)
    for row, probabilities in zip(given, found, strict=True):
        assert_same(probabilities, expected(row, sampling), terms=200)
        assert torch.equal(probabilities > 0, expected(row, sampling) > 0)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    sampling = Sampling(temperature=1.0, top_k=6, seed=3)
    given = logits(1).expand(20_000, -1)

    def draws() -> torch.Tensor:
        return choose(given, sampling, torch.Generator().manual_seed(sampling.seed))

    shares = torch.bincount(draws(), minlength=given.shape[1]) / len(given)
    exact = distribution(given[:1], sampling)[0]
    # five standard deviations of a share
    assert bool(((shares - exact).abs() <= 5 * (exact * (1 - exact) / len(given)).sqrt()).all())
    assert torch.equal(draws(), draws())


def test_no_temperature_is_the_likeliest_token() -> None:
    given = logits()
    assert choose(given, Sampling(), None).tolist() == [int(row.argmax()) for row in given]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_values_without_a_choice_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="give"):
        Sampling(**wrong)
