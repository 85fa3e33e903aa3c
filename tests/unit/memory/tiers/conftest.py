"""The two ways to the files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mka_megatron.memory.tiers import channels


@pytest.fixture(scope="session")
def aio() -> str | None:
    """Why DeepSpeed's aio cannot be tested here; None: it can. Builds its op on the first run."""
    operations, reason = channels._deepspeed()
    return reason if operations is None else None


@pytest.fixture(params=["plain", "aio"])
def backend(request: pytest.FixtureRequest, aio: str | None) -> str:
    """Either backend."""
    if request.param == "aio" and aio is not None:
        pytest.skip(aio)
    return request.param


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)  # noqa: S607
