"""launch/ranks.sh on one machine: torchrun starts the ranks anew, more than once, and they find each other."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers.launch import ROOT

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


def test_two_killed_ranks_are_two_new_starts(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = f"fail() {{ echo \"$*\" >&2; exit 1; }}; source {ROOT}/launch/ranks.sh; run_torchrun 2 {tmp_path}/rank.py"
    environment = os.environ | {"MAX_RESTARTS": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["/bin/bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.splitlines()) == ["rank 0, start 2: 4", "rank 1, start 2: 4"]
