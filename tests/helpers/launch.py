"""Real ranks: a test module's worker script under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{script} on {ranks} ranks failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done
