"""The learning rate against transformers' schedules and at its corners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from mka_megatron.config.schema import TrainingConfig
from mka_megatron.training.schedule import learning_rate

PEAK, FLOOR, WARMUP, STEPS, DECAY = 3e-3, 2e-4, 7, 50, 20


def config(schedule: str, **fields: int) -> TrainingConfig:
    base = {"warmup_steps": WARMUP, "steps": STEPS, "decay_steps": DECAY} | fields
    return TrainingConfig(schedule=schedule, learning_rate=PEAK, min_learning_rate=FLOOR, **base)  # type: ignore[arg-type]


def theirs(schedule: str) -> list[float]:
    """transformers' rates after 1, 2, ... scheduler steps (its step 0 has rate 0: a wasted step)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if schedule == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, WARMUP, STEPS, min_lr=FLOOR)
    elif schedule == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, WARMUP)
    else:
        scheduler = get_wsd_schedule(
            optimizer, WARMUP, DECAY, num_stable_steps=STEPS - WARMUP - DECAY, decay_type="linear",
            min_lr_ratio=FLOOR / PEAK,
        )
    rates = []
    for _ in range(STEPS + 5):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_equals_transformers(schedule: str) -> None:
    expected = theirs("constant")[:WARMUP] + theirs(schedule)[WARMUP:STEPS]  # their wsd warms up from the floor
    ours = [learning_rate(step, config(schedule)) for step in range(STEPS)]
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("schedule", "end"), [("cosine", FLOOR), ("wsd", FLOOR), ("constant", PEAK)])
def test_ends_where_it_should_and_stays(schedule: str, end: float) -> None:
    for step in (STEPS - 1, STEPS, 10 * STEPS):
        assert learning_rate(step, config(schedule)) == pytest.approx(end, rel=1e-12)


def test_the_first_step_learns_and_the_last_warm_up_step_has_the_peak() -> None:
    assert learning_rate(0, config("cosine")) == pytest.approx(PEAK / WARMUP)
    assert learning_rate(WARMUP - 1, config("cosine")) == PEAK
    assert learning_rate(0, config("constant", warmup_steps=0)) == PEAK


@given(
    st.sampled_from(["cosine", "constant", "wsd"]), st.integers(0, 60), st.integers(1, 50), st.integers(0, 80),
    st.integers(0, 200),
)
@example("constant", 24, 1, 0, 23)  # peak * 24 / 24 is above the peak
def test_stays_within_bounds_and_never_rises_after_warm_up(
    schedule: str, warmup: int, steps: int, decay: int, step: int
) -> None:
    """Whatever the lengths, also those that do not fit into the run."""
    training = config(schedule, warmup_steps=warmup, steps=steps, decay_steps=decay)
    rate = learning_rate(step, training)
    if step >= warmup:
        assert FLOOR - 1e-15 <= rate <= PEAK
        assert learning_rate(step + 1, training) <= rate
    else:
        assert 0 < rate <= PEAK
