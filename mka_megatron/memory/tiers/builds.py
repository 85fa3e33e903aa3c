"""Locks of DeepSpeed's just-in-time builds: one that a killed process left stops every later load, without a word."""

from __future__ import annotations

import logging
import time
from pathlib import Path

_LONGEST_BUILD_SECONDS = 1200.0
_LONGEST_LOAD_SECONDS = 60.0
_PATIENCE_SECONDS = 10.0
_INTERVAL_SECONDS = 0.2

_log = logging.getLogger(__name__)


def stale_lock(name: str) -> Path | None:
    """The lock of a build of op `name` that cannot be running any more, if there is one."""
    lock = _folder(name) / "lock"
    age = _age(lock)
    return lock if age is not None and age > _LONGEST_BUILD_SECONDS else None


def wait_for_build(name: str) -> None:
    """Wait for another process that builds or loads op `name`, if one does.

    Raises:
        OSError: the lock is older than a build takes (where the op is built already: than loading it takes).
    """
    folder, began, told = _folder(name), time.monotonic(), False
    while (age := _age(folder / "lock")) is not None:
        built = (folder / f"{name}.so").exists()
        if age > (_LONGEST_LOAD_SECONDS if built else _LONGEST_BUILD_SECONDS):
            raise OSError(f"a build of {name} was killed and left {folder / 'lock'}; remove that file")
        if not told and time.monotonic() - began > _PATIENCE_SECONDS:
            _log.warning("waiting for a build of DeepSpeed's %s; if none is running, remove %s", name, folder / "lock")
            told = True
        time.sleep(_INTERVAL_SECONDS)


def _folder(name: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def _age(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None
