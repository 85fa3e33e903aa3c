"""kill -9 at a random step: the resumed run has the losses of one that was left alone, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.runs import Run, Workplace

SEED = 20240607


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("kill"))


def check_resumed(run: Run, reference: Run) -> None:
    metrics = run.metrics()
    assert metrics["resumed_from"] is not None and metrics["resumed_from"] % 8 == 0
    assert run.losses() == reference.losses()
    assert run.evaluations() == reference.evaluations()
    assert metrics["final"]["valid_loss"] == reference.metrics()["final"]["valid_loss"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_after_kill_9_is_bitwise(ranks: int, workplace: Workplace) -> None:
    reference = workplace.start(f"alone-{ranks}", ranks=ranks).finish()
    assert len(reference.losses()) == 60

    chance = random.Random(SEED + ranks)  # noqa: S311
    step, victim = chance.randint(9, 30), chance.randrange(ranks)
    options = []
    if ranks == 2:  # checkpoints are written while training goes on; the first is complete once the second begins
        options, step = ["training.async_save=true"], max(step, 17)
    killed = workplace.start(f"killed-{ranks}", *options, ranks=ranks)
    killed.wait_for_step(step)
    killed.workers()[victim].kill()
    assert killed.wait() != 0
    assert not Path(killed.out, "metrics.json").exists() or not killed.metrics()["finished"]

    resumed = workplace.start(f"killed-{ranks}", *options, ranks=ranks).finish()
    check_resumed(resumed, reference)
