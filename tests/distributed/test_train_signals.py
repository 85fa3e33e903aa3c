"""SIGUSR1, SIGTERM and SIGINT: the step ends, a checkpoint is saved, the exit is clean, the run goes on later."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.helpers.runs import Run, Workplace

NO_OTHER_SAVES = "training.save_interval=0"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def reference(workplace: Workplace) -> Run:
    return workplace.start("alone", NO_OTHER_SAVES, ranks=2).finish()


def interrupted_step(run: Run, name: str) -> int:
    """The step that the run says it was interrupted at; its checkpoint is the only one."""
    metrics = run.metrics()
    assert (metrics["interrupted"], metrics["finished"]) == (name, False)
    [found] = re.findall(rf"interrupted by {name} at step (\d+), saved (?:.*); the same command resumes it", run.text())
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == [f"step-{int(found):08d}"]
    assert run.steps() == metrics["step"] == int(found) < 60
    return int(found)


def test_one_signalled_rank_of_two_stops_both(workplace: Workplace, reference: Run) -> None:
    run = workplace.start("usr1", NO_OTHER_SAVES, ranks=2)
    run.wait_for_step(10)
    run.workers()[1].send_signal(signal.SIGUSR1)
    run.finish()
    step = interrupted_step(run, "SIGUSR1")
    resumed = workplace.start("usr1", NO_OTHER_SAVES, ranks=2).finish()
    assert resumed.metrics()["resumed_from"] == step
    assert resumed.losses() == reference.losses()


def test_sigterm_to_torchrun_reaches_the_ranks(workplace: Workplace, reference: Run) -> None:
    run = workplace.start("term", NO_OTHER_SAVES, ranks=2)
    run.wait_for_step(10)
    run.process.terminate()
    run.wait()  # torchrun itself reports the signal, whatever its workers do
    interrupted_step(run, "SIGTERM")
    assert run.losses() == reference.losses()[: run.steps()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_single_process_exits_with_0(number: signal.Signals, workplace: Workplace) -> None:
    run = workplace.start(f"one-{number.name}", NO_OTHER_SAVES)
    run.wait_for_step(5)
    run.process.send_signal(number)
    run.finish()
    interrupted_step(run, number.name)
    assert "Traceback" not in run.text()


def test_a_warning_that_comes_before_the_first_step_is_heeded_after_it(workplace: Workplace) -> None:
    """Slurm's SIGUSR1 while the data is prepared or a checkpoint read: it would end the process, or be forgotten."""
    run = workplace.start("early", NO_OTHER_SAVES)
    while "preparing data" not in run.text():
        assert run.process.poll() is None
        time.sleep(0.01)
    run.process.send_signal(signal.SIGUSR1)
    run.finish()
    assert interrupted_step(run, "SIGUSR1") == 1
