"""launch/ranks.sh on one machine: torchrun starts the ranks anew, more than once, and they find each other; not so after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, end_tree

RANK = """
import os, signal
from datetime import timedelta
import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
start, ones = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), torch.ones(1)
dist.all_reduce(ones)
if start < 2 and dist.get_rank() == start:
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(ones)
os.write(1, f"rank {dist.get_rank()}, start {start}: {int(ones)}\\n".encode())  # in one piece
dist.destroy_process_group()
"""

SOURCED = f"say() {{ echo \"$*\" >&2; }}; fail() {{ say \"$*\"; exit 1; }}; source {ROOT}/launch/ranks.sh; "
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
WAITING = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, print)  # it may be kept for later
if sys.argv[1] == "trains":  # as training does: the first signal asks, the second ends
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, lambda number, _: signal.signal(number, signal.SIG_DFL))
os.write(1, f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n".encode())
time.sleep(60)
"""


def test_two_killed_ranks_are_two_new_starts(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = f"{SOURCED} run_torchrun 2 {tmp_path}/rank.py"
    environment = ENVIRONMENT | {"MAX_RESTARTS": "2"}
    done = subprocess.run(["/bin/bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.splitlines()) == ["rank 0, start 2: 4", "rank 1, start 2: 4"]


def heed() -> None:
    """A shell cannot trap what was ignored when it began, as INT is in a background job and HUP under nohup."""
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


@pytest.mark.parametrize(("state", "name"), [("starts", "SIGTERM"), ("starts", "SIGINT"), ("starts", "SIGHUP"), ("trains", "SIGTERM")])
def test_ranks_that_a_signal_ends_are_not_started_anew(tmp_path: Path, state: str, name: str) -> None:
    """Before they listen by the first signal, when they train by the second."""
    (tmp_path / "rank.py").write_text(WAITING)
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            ["/bin/bash", "-c", f"{SOURCED} run_torchrun 2 {tmp_path}/rank.py {state}"], stdout=file, stderr=file,
            env=ENVIRONMENT | {"MAX_RESTARTS": "1"}, preexec_fn=heed,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while out.read_text().count("start 0") < 2:
            assert process.poll() is None and time.monotonic() < deadline, out.read_text()
            time.sleep(0.05)
        process.send_signal(signal.Signals[name])
        if state == "trains":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(4)
            process.send_signal(signal.Signals[name])
        assert process.wait(40) != 0
    finally:
        if process.poll() is None:
            end_tree(process)
    assert "start 1" not in out.read_text() and "The ranks end at once" in out.read_text(), out.read_text()
