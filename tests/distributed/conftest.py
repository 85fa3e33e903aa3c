"""What several launches share."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def async_io() -> bool:
    """Whether DeepSpeed's NVMe op exists on this host; built here, once, so that no launch waits for it."""
    done = subprocess.run(
        [sys.executable, "-m", "mka_megatron.training.ops"], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return "async_io: built" in done.stdout
