"""Who may use a spill directory: one run at a time, a folder per rank, and nothing left behind.

    <directory>/mka-pages.lock            held (shared) by the ranks of one run, names it
    <directory>/mka-pages-<run>-<rank>/   a rank's files; its `lock` is held as long as the rank lives

Locks are flock's: the system drops them when a process dies, however it dies. Folders whose lock nobody holds are
what a crash left, whatever their run or generation, and are removed by the next run before it starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

from mka_megatron.memory.tiers.pages import TierError

_LOCK = "mka-pages.lock"
_FOLDER = re.compile(r"mka-pages-[\w.-]+-\d{5}")
_FILE = re.compile(r"lock|probe|segment-\d{5,}\.pages")
_PATIENCE_SECONDS = 30.0


class Ownership:
    """This rank's right to `folder` under the spill directory, until :meth:`close`.

    Raises TierError when another run holds the directory, or this rank's folder is in use; OSError when the
    directory cannot be made or written.
    """

    def __init__(self, directory: Path, run: str, rank: int) -> None:
        name = f"mka-pages-{run}-{rank:05d}"
        if not _FOLDER.fullmatch(name):
            raise ValueError(f"run id {run!r}: use letters, digits, '.', '_' and '-'.")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / _LOCK
        self._shared, self.removed = _join(self._path, run)
        self.folder = directory / name
        try:
            # a rank that died while others of its run live on
            if self.folder.exists() and not _remove(self.folder):
                raise TierError(
                    f"memory_hierarchy.ssd_spill_path is {directory}: rank {rank} of run {run} already uses it."
                )
            self.folder.mkdir(mode=0o700)
            self._own = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._own, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._shared)
            raise

    def close(self) -> None:
        """Remove the folder with all it holds, and the directory's lock if no other rank is left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._own)
        try:
            fcntl.flock(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(self._shared, self._path):
                self._path.unlink()
        except OSError:
            pass  # other ranks go on
        os.close(self._shared)


def _join(path: Path, run: str) -> tuple[int, list[Path]]:
    """The directory's lock, shared with the ranks of the same run, and the leftovers removed.

    Folders are removed under the exclusive lock only, and made under the shared one.
    """
    removed: list[Path] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            first = _try(lock, fcntl.LOCK_EX)
            if first and _is(lock, path):
                found = sorted(path.parent.iterdir())
                removed += [each for each in found if _FOLDER.fullmatch(each.name) and _remove(each)]
                os.truncate(lock, 0)
                owner = {"run": run, "pid": os.getpid(), "host": socket.gethostname()}
                os.pwrite(lock, json.dumps(owner).encode(), 0)
            # turning an exclusive lock into a shared one lets others in between, hence the second look
            if (first or _try(lock, fcntl.LOCK_SH)) and _try(lock, fcntl.LOCK_SH) and _is(lock, path):
                owner = _owner(lock)
                if owner.get("run") == run:
                    return lock, removed
                if owner:
                    raise TierError(
                        f"memory_hierarchy.ssd_spill_path is {path.parent}: run {owner.get('run')} (pid "
                        f"{owner.get('pid')} on {owner.get('host')}) uses it, give every run a directory of its own."
                    )
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        if time.monotonic() > deadline:
            raise TierError(
                f"memory_hierarchy.ssd_spill_path is {path.parent}: {path} stays locked by another process."
            )
        time.sleep(0.05)


def _owner(lock: int) -> dict[str, object]:
    try:
        return dict(json.loads(os.pread(lock, 4096, 0)))
    except ValueError:
        return {}


def _try(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(lock: int, path: Path) -> bool:
    """Whether `path` still names the locked file: its last user removes it."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> bool:
    """Remove what a dead rank left; False if it lives, or if the folder holds files that are not ours."""
    if folder.is_symlink():
        return False
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        lock = None  # killed between its first two steps
    try:
        if lock is not None and not _try(lock, fcntl.LOCK_EX):
            return False
        for file in list(folder.iterdir()):
            if _FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return False
    finally:
        if lock is not None:
            os.close(lock)
    return True
