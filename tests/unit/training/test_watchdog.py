"""The watchdog on real processes: who is behind, what is left on the disk, and how each process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT

LIMIT = 3.0
RANK = """
import os, sys, time
from pathlib import Path
from mka_megatron.training.watchdog import Watchdog

folder, rank, ranks, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

def waits_for_a_disk():
    time.sleep(600)

def steps(rank):
    path = folder / f"steps-{rank}"
    return path.stat().st_size if path.exists() else 0

def stat(path, *arguments, stat=os.stat, **options):
    if str(path) == str(folder / "ranks" / "hang"):
        raise OSError(5, "Input/output error")
    return stat(path, *arguments, **options)

if (folder / "sick").exists():
    os.stat = stat

with Watchdog(folder, rank, ranks, limit) as watchdog:
    for step in range(1, 10 ** 6):
        watchdog.note(f"the reading of the batch of step {step}")
        if (folder / f"block-{rank}").exists():
            waits_for_a_disk()
        while (folder / f"slow-{rank}").exists():
            time.sleep(0.01)
        while (folder / f"alone-{rank}").exists():
            watchdog.note_alone("the tokenising of a text")
            time.sleep(0.01)
        watchdog.note(f"step {step}")
        ended = (folder / "end").exists()
        with open(folder / f"steps-{rank}", "a") as file:
            file.write("e" if ended else ".")
        while min(map(steps, range(ranks))) < step:  # as in a collective
            time.sleep(0.01)
        if any("e" in (folder / f"steps-{other}").read_text()[:step] for other in range(ranks)):
            break
"""


class Ranks:
    """Watched processes in a folder."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder = folder
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank), str(count), str(LIMIT)], env=environment,
                             stderr=subprocess.PIPE, text=True)
            for rank in range(count)
        ]  # fmt: skip
        self.wait(lambda: all((folder / f"steps-{rank}").exists() for rank in range(count)))

    def set(self, *names: str) -> None:
        for name in names:
            (self.folder / name).touch()

    def wait(self, condition) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ends(self) -> tuple[list[int], list[str]]:
        """Exit codes and stderr."""
        printed = [process.communicate(timeout=60)[1] for process in self.processes]
        return [process.returncode for process in self.processes], printed

    def stacks(self) -> dict[int, str]:
        return {int(path.name.split("-")[1]): path.read_text() for path in (self.folder / "hangs").glob("rank-*.txt")}


@pytest.fixture(params=[3])
def ranks(tmp_path: Path, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    for name in getattr(request.function, "before", ()):
        (tmp_path / name).touch()
    started = Ranks(tmp_path, request.param)
    yield started
    for process in started.processes:
        process.kill()
        process.communicate()


def test_a_blocked_rank_is_named_with_its_stack(ranks: Ranks) -> None:
    began = time.monotonic()
    ranks.set("block-1")
    codes, printed = ranks.ends()
    assert codes == [1, 1, 1]
    assert time.monotonic() - began > LIMIT
    said = [text for text in printed if text]
    assert len(said) == 1 and printed[0], "the first rank speaks for all"
    assert "no rank has made progress for 3 s" in said[0] and str(ranks.folder / "hangs") in said[0]
    assert said[0].index("rank 1 in the reading of the batch") < said[0].index("rank 0, rank 2 in step")
    stacks = ranks.stacks()
    assert set(stacks) == {0, 1, 2}
    assert "waits_for_a_disk" in stacks[1] and "waits_for_a_disk" not in stacks[0]


def test_a_stopped_rank_is_named_and_killed(ranks: Ranks) -> None:
    ranks.processes[0].send_signal(signal.SIGSTOP)
    codes, printed = ranks.ends()
    assert codes == [-signal.SIGKILL, 1, 1]
    assert printed[0] == printed[2] == ""
    assert f"rank 0 (process {ranks.processes[0].pid} on " in printed[1] and "does not answer" in printed[1]
    assert set(ranks.stacks()) == {1, 2}


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_a_process_of_its_own_is_watched_too(ranks: Ranks) -> None:
    ranks.set("block-0")
    codes, printed = ranks.ends()
    assert codes == [1]
    assert "rank 0 in the reading of the batch" in printed[0]
    assert "waits_for_a_disk" in ranks.stacks()[0]


def test_progress_of_one_rank_keeps_the_others_waiting(ranks: Ranks) -> None:
    """As when rank 0 prepares the data: longer than the limit, and no hang."""
    ranks.set("alone-0")
    time.sleep(2 * LIMIT)
    assert [process.poll() for process in ranks.processes] == [None] * 3
    ranks.set("end")
    (ranks.folder / "alone-0").unlink()
    codes, printed = ranks.ends()
    assert codes == [0, 0, 0] and printed == ["", "", ""]
    assert not (ranks.folder / "hangs").exists()
    assert not [path for path in (ranks.folder / "ranks").iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_it_ends_though_nobody_hears_why(ranks: Ranks) -> None:
    """As when the log is on a full disk, or the pipe to it is closed."""
    [process] = ranks.processes
    process.stderr.close()
    process.stderr = None
    ranks.set("block-0")
    assert process.wait(60) == 1
    assert "waits_for_a_disk" in ranks.stacks()[0]


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_a_folder_that_cannot_be_asked_does_not_end_the_watch(ranks: Ranks) -> None:
    ranks.set("block-0")
    codes, printed = ranks.ends()
    assert codes == [1]
    assert "rank 0 in the reading of the batch" in printed[0]


test_a_folder_that_cannot_be_asked_does_not_end_the_watch.before = ["sick"]  # type: ignore[attr-defined]


def test_a_run_that_was_stopped_as_a_whole_goes_on(ranks: Ranks) -> None:
    """As by Ctrl-Z or a job that is suspended, in a pass that takes half of the limit."""
    ranks.set("slow-0")
    time.sleep(LIMIT / 2)
    for process in ranks.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * LIMIT)
    for process in ranks.processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(LIMIT / 6)
    ranks.set("end")
    (ranks.folder / "slow-0").unlink()
    codes, printed = ranks.ends()
    assert codes == [0, 0, 0] and printed == ["", "", ""]
