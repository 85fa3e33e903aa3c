"""An environment for the launch scripts that is this interpreter's: nothing is installed and nothing is built."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from pathlib import Path

from tests.helpers.launch import ROOT


def launch_environment(folder: Path, checkout: Path = ROOT) -> dict[str, str]:
    """Environment variables under which the launch/env.sh of `checkout` finds everything in place, below `folder`."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(
        f'#!/usr/bin/env bash\n[ "$*" = "-m pip --version" ] || exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    wanted = b"".join((checkout / name).read_bytes() for name in ("constraints.txt", "pyproject.toml")) + str(checkout).encode()
    (folder / "installed.sha256").write_text(f"{hashlib.sha256(wanted).hexdigest()}  -\n")
    (folder / "operators").write_text("built\n")
    return os.environ | {"VENV": str(folder), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
