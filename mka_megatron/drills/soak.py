"""A run under random events for minutes, with an eye on what its processes hold."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mka_megatron.drills.kills import LIMIT, DrillError, until
from mka_megatron.drills.tiny import RANKS, Run

EVENTS = ("nothing", "a save and a resume with other logging", "a rank killed", "a rank stopped for a while", "a failed write")
_RESUME = EVENTS[1]
_QUIET = (15.0, 50.0)  # seconds before an event
_SAMPLE_SECONDS = 0.5
_WARM_SECONDS = 20.0  # of a process, before what it holds is judged
_WARM_SAMPLES = 20
_STOPPED_SECONDS = 3.0
_FAILING_BYTES = 1 << 15
_RSS_GROWTH, _DISK_GROWTH = 0.05, 0.5


@dataclass(frozen=True)
class Sample:
    """What one process holds at a time, in seconds of the monotonic clock."""

    at: float
    rss: int
    files: int
    threads: int


@dataclass
class Soak:
    """What happened, and what was held."""

    events: Counter[str] = field(default_factory=Counter)
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    """Of each process, by id."""
    disk: list[int] = field(default_factory=list)
    """Bytes in the output's folder before each event, logs and TensorBoard's files left out."""
    steps: int = 0

    def growth(self) -> list[tuple[Sample, Sample]]:
        """Of each process that lived long enough: the least it held in the first and in the second half of its life."""
        found = []
        for samples in self.samples.values():
            warm = [sample for sample in samples if sample.at >= samples[0].at + _WARM_SECONDS]
            if len(warm) >= _WARM_SAMPLES:
                half = len(warm) // 2
                found.append((_least(warm[:half]), _least(warm[half:])))
        return found

    def problems(self) -> list[str]:
        """What grew; none is the good verdict."""
        found = []
        for before, after in self.growth():
            if after.files > before.files:
                found.append(f"open files {before.files} -> {after.files}")
            if after.threads > before.threads:
                found.append(f"threads {before.threads} -> {after.threads}")
            if after.rss > (1 + _RSS_GROWTH) * before.rss:
                found.append(f"memory {before.rss >> 20} -> {after.rss >> 20} MiB")
        if not self.growth():
            found.append("no process lived long enough to be judged")
        early = max(self.disk[: len(self.disk) // 3 + 1], default=0)
        if self.disk and self.disk[-1] > (1 + _DISK_GROWTH) * early:
            found.append(f"disk {early:,} -> {self.disk[-1]:,} bytes")
        return found


def soak(folder: Path, arguments: Callable[[Sequence[str]], list[str]], seconds: float, seed: int,
         say: Callable[[str], None]) -> Soak:  # fmt: skip
    """Keep a run going for `seconds`, and end it with a saved checkpoint.

    Args:
        folder: for the run's output and log, `soak`.
        arguments: the command line of the run, given some keys of its configuration.
        say: told of each event.

    Raises:
        DrillError: the run ended when it should not have, or stood still.
    """
    dice, found = random.Random(seed), Soak()  # noqa: S311
    end = time.monotonic() + seconds
    keys: list[str] = []
    ahead: list[str] = []  # each event once, in random order, again and again
    while time.monotonic() < end:
        with Run(folder, "soak", arguments(keys), max_restarts=10_000) as run:
            event = ""
            while time.monotonic() < end and event != _RESUME:
                _watch(run, min(end, time.monotonic() + dice.uniform(*_QUIET)), found)
                ahead = ahead or dice.sample(EVENTS, len(EVENTS))
                event = ahead.pop()
                found.disk.append(_bytes(run.out))
                found.events[event] += 1
                say(f"step {run.steps()}: {event}")
                _strike(run, event, dice)
            _watch(run, time.monotonic(), found)
            os.kill(run.workers()[dice.randrange(RANKS)], signal.SIGUSR1)
            if run.process.wait():
                raise DrillError(f"the run ended with {run.process.returncode} after SIGUSR1; its log is {run.log}.")
            found.steps = run.steps()
        keys = [f"logging.interval={dice.randint(1, 20)}", f"logging.tensorboard={dice.choice(['true', 'false'])}"]
    return found


def _watch(run: Run, end: float, found: Soak) -> None:
    """Sample the processes until `end`, and until they have taken two more steps."""
    pids: dict[int, int] = {}
    first = 0
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < end or run.workers() != pids or run.steps() < first + 2:
        if run.process.poll() is not None or time.monotonic() > max(end, deadline):
            raise DrillError(f"the run ended or stood still, code {run.process.returncode}; its log is {run.log}.")
        if run.workers() != pids and len(run.workers()) == RANKS:
            pids, first = run.workers(), run.steps()
        for pid in pids.values():
            held = _held(pid)
            if held is not None:
                samples = found.samples.setdefault(pid, [])
                samples.append(Sample(time.monotonic(), *held))
        time.sleep(_SAMPLE_SECONDS)


def _strike(run: Run, event: str, dice: random.Random) -> None:
    pids = run.workers()
    pid = pids[dice.randrange(RANKS)]
    if event == "a rank killed":
        os.kill(pid, signal.SIGKILL)
    elif event == "a rank stopped for a while":
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_STOPPED_SECONDS)
        os.kill(pid, signal.SIGCONT)
    elif event == "a failed write":  # a file of a checkpoint that may not grow, as on a full disk
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FAILING_BYTES, resource.RLIM_INFINITY))
    if event in ("a rank killed", "a failed write"):
        until(run, lambda: run.workers() != pids, f"the ranks started anew after {event}")


def _held(pid: int) -> tuple[int, int, int] | None:
    """Resident bytes, open files and threads of a process; None where it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024 * int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


def _least(samples: Sequence[Sample]) -> Sample:
    return Sample(samples[0].at, *(min(getattr(s, name) for s in samples) for name in ("rss", "files", "threads")))


def _bytes(out: Path) -> int:
    """Bytes of all files but the logs, which grow with the steps."""
    size = 0
    for path in out.rglob("*"):
        if path.name != "losses.jsonl" and "tensorboard" not in path.parts:
            try:
                size += path.stat().st_size
            except OSError:
                continue  # just removed
    return size
