"""Real ranks: a test module's worker script under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(script: str | Path, *arguments: object, ranks: int, timeout: float, check: bool = True,
             environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `script` on `ranks` gloo ranks, one thread each; raises AssertionError with its output where it fails."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}",
        str(script), *map(str, arguments),
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | (environment or {})
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_tree(process)
        raise
    if check:
        assert process.returncode == 0, f"{script} on {ranks} ranks failed:\n{out[-4000:]}\n{err[-8000:]}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a launcher and the ranks it started: killed alone, torchrun leaves them behind."""
    main = psutil.Process(process.pid)
    for each in [*main.children(recursive=True), main]:
        each.kill()
    process.wait()
