"""kill -9 of a random rank at a random moment, again and again, in one run that must not notice."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mka_megatron.drills.tiny import RANKS, Run

Moment = Literal["start", "data", "step", "save"]
_POLL = 0.001
LIMIT = 300.0  # seconds for any one thing to happen, on a machine that does others too
_SHARES: dict[Moment, float] = {"start": 0.15, "data": 0.10, "step": 0.30, "save": 0.45}
# Upper bounds of the delays in seconds: about what a start, a preparation of the data, a step and a save take.
_DELAYS: dict[Moment, float] = {"start": 4.0, "data": 2.0, "step": 0.1, "save": 0.15}


class DrillError(RuntimeError):
    """The run ended or stood still before its time; the message says where to look."""


@dataclass(frozen=True)
class Kill:
    """One kill: `delay` seconds after the ranks started (start; data, of which nothing is prepared then) or at their first
    step, `delay` after the `count`-th step since they did (step), or after they began to write their `count`-th checkpoint
    (save)."""

    rank: int
    moment: Moment
    count: int
    delay: float


def plan(kills: int, seed: int) -> list[Kill]:
    """The kills of a seed."""
    dice = random.Random(seed)  # noqa: S311
    found = []
    for _ in range(kills):
        moment = dice.choices(list(_SHARES), list(_SHARES.values()))[0]
        count = dice.randint(1, 7 if moment == "step" else 2)
        found.append(Kill(dice.randrange(RANKS), moment, count, dice.uniform(0, _DELAYS[moment])))
    return found


def deliver(run: Run, kills: Sequence[Kill], cache: Path) -> Iterator[str]:
    """Deliver the kills to a run, one to each start of its ranks; yields after each what it met.

    Raises:
        DrillError: the run ended before the last kill, or a rank does not start again.
    """
    before: set[int] = set()
    for kill in kills:
        if kill.moment == "data":
            shutil.rmtree(cache, ignore_errors=True)  # the ranks that used it are gone or going
        met = None
        while met is None:  # the ranks may have failed by themselves in between, such as for a port that was taken
            start = Start(run, before)
            met = start.strike(kill)
            before = set(start.pids.values())
        yield met


def until(run: Run, condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition()`; raises DrillError where the run ends or five minutes pass before it is true."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        code = run.process.poll()
        if code is not None:
            raise DrillError(f"the run ended with {code} before {what}; its log is {run.log}.")
        if time.monotonic() > deadline:
            raise DrillError(f"{LIMIT:.0f} s passed before {what}; the run's log is {run.log}.")
        time.sleep(_POLL)


class Start:
    """One start of the ranks, from when the last of them wrote its process id; `before` are those of the last start."""

    def __init__(self, run: Run, before: set[int]) -> None:
        self.run, self.pids = run, run.workers()
        until(run, lambda: self._started(before), "its ranks started")
        self._old_losses = run.losses_inode()
        self._old_folders = run.unpublished()

    def strike(self, kill: Kill) -> str | None:
        """Kill at the moment; returns what the ranks were doing, None where they had ended by themselves."""
        if kill.moment == "step":
            self.trains()
            last = self.run.steps() + kill.count
            self._wait(lambda: self.run.steps() >= last, f"step {last}")
        elif kill.moment == "save":
            for _ in range(kill.count):
                seen = self._old_folders | self.run.unpublished()
                self._wait(lambda seen=seen: bool(self._writing(seen)), "a checkpoint was written")  # type: ignore[misc]
        struck = time.monotonic() + kill.delay
        early = kill.moment in ("start", "data")  # over at the first step, however fast the machine is
        self._wait(lambda: time.monotonic() >= struck or (early and self._trains()), "the moment of a kill")
        doing = self._doing()
        if self.run.workers() != self.pids or not _alive(self.pids[kill.rank]):
            return None
        os.kill(self.pids[kill.rank], signal.SIGKILL)
        return doing

    def trains(self) -> None:
        """Wait until the ranks are about to take steps."""
        self._wait(self._trains, "the first step after a start")

    def _trains(self) -> bool:
        return self.run.losses_inode() != self._old_losses

    def _started(self, before: set[int]) -> bool:
        self.pids = self.run.workers()
        return len(self.pids) == RANKS and not before & set(self.pids.values())

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        until(self.run, lambda: condition() or self.run.workers() != self.pids, what)

    def _writing(self, seen: set[tuple[str, int]]) -> list[str]:
        """Checkpoints that began to be written, other than those `seen`."""
        return [name for name, _ in self.run.unpublished() - seen if name.startswith(".tmp-step-")]

    def _doing(self) -> str:
        if not self._trains():
            return "before the first step" if self.run.prepared() else "in the data preparation"
        fresh = [name for name, _ in self.run.unpublished() - self._old_folders]
        if any(name.startswith(".tmp-step-") for name in fresh):
            return "in a checkpoint write"
        if fresh:
            return "while an old checkpoint was removed"
        return "in a step or an evaluation"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
