"""One run on two ranks under torchrun's agent meets kills, a blocked rank and a stopped one, and ends bit for bit as if
it had been left alone."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from mka_megatron.drills.compare import compare
from mka_megatron.drills.kills import Kill, Start, deliver, until
from mka_megatron.drills.tiny import Run, evaluations, losses, overrides

STEPS, SAVE_INTERVAL, LIMIT = 60, 4, 8
AGENT = (str(Path(__file__).with_name("fault_worker.py")),)
KILLS = [
    Kill(1, "start", 1, 0.0), Kill(0, "data", 1, 0.2), Kill(1, "step", 3, 0.0), Kill(0, "save", 1, 0.0), Kill(1, "save", 2, 0.02),
]  # fmt: skip


class Struck:
    """The run after all that, and what it left at each hang: stack traces by rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        keys = [f"engine.timeout_seconds={LIMIT}"]
        with Run(folder, "alone", [*overrides(folder, "alone", STEPS, SAVE_INTERVAL), *keys]) as run:
            assert run.process.wait(300) == 0, run.end_of_log()
        with Run(folder, "struck", [*overrides(folder, "struck", STEPS, SAVE_INTERVAL), *keys], 50, AGENT) as run:
            self.met = list(deliver(run, KILLS, run.cache))
            killed, block = run.workers(), run.pids / "block-1"
            blocked, self.blocked = self.hang(run, killed, lambda pids: block.touch())
            block.unlink()
            self.stopped_pids, self.stopped = self.hang(run, blocked, lambda pids: os.kill(pids[0], signal.SIGSTOP))
            assert run.process.wait(300) == 0, run.end_of_log()
            self.log = run.log.read_text()

    def hang(
        self, run: Run, ended: dict[int, int], strike: Callable[[dict[int, int]], None]
    ) -> tuple[dict[int, int], dict[int, str]]:
        """`strike` the ranks that follow those that `ended` while they train, and wait for the next."""
        start = Start(run, set(ended.values()))
        start.trains()
        before = set((run.out / "hangs").glob("*"))
        strike(start.pids)
        until(run, lambda: not set(run.workers().values()) & set(start.pids.values()), "the ranks started anew")
        fresh = set((run.out / "hangs").glob("*")) - before
        return start.pids, {int(path.name.split("-")[1]): path.read_text() for path in fresh}


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Struck:
    return Struck(tmp_path_factory.mktemp("faults"))


def test_the_kills_met_what_they_were_meant_for(struck: Struck) -> None:
    assert struck.met[:2] == ["before the first step", "in the data preparation"]
    assert "in a checkpoint write" in struck.met[3:]


def test_the_ranks_left_behind_say_so_in_a_sentence(struck: Struck) -> None:
    begun = struck.log.count("another rank was lost in")
    whole = re.findall(r"another rank was lost in .*?a new start goes on from the newest checkpoint\.", struck.log)
    assert begun == len(whole) > 0  # others may write behind it in the same line


def test_the_last_checkpoint_is_that_of_a_run_left_alone(struck: Struck) -> None:
    last = Path("checkpoints", f"step-{STEPS:08d}")
    found = compare(struck.folder / "alone" / last, struck.folder / "struck" / last)
    assert not found.different
    assert found.tensors > 20 and found.bytes > 1_000_000


def test_losses_and_evaluations_are_those_of_a_run_left_alone(struck: Struck) -> None:
    alone, other = struck.folder / "alone", struck.folder / "struck"
    assert len(losses(alone)) == STEPS
    assert losses(other) == losses(alone)
    assert evaluations(other) == evaluations(alone)


def test_a_blocked_rank_is_named_and_leaves_its_stack(struck: Struck) -> None:
    sentences = [line for line in struck.log.splitlines() if f"no rank has made progress for {LIMIT} s" in line]
    assert len(sentences) == 2
    where = sentences[0].index("rank 1 in the reading of the batch of step")
    assert where < sentences[0].index("rank 0 in step")
    assert set(struck.blocked) == {0, 1}
    assert "waits_for_a_disk" in struck.blocked[1] and "waits_for_a_disk" not in struck.blocked[0]
    assert "train_step" in struck.blocked[0]


def test_a_stopped_rank_is_named_and_makes_way(struck: Struck) -> None:
    sentence = [line for line in struck.log.splitlines() if "no rank has made progress" in line][1]
    assert f"rank 0 (process {struck.stopped_pids[0]} on " in sentence and "does not answer" in sentence
    assert set(struck.stopped) == {1}
