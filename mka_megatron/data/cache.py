"""Directories that are built once, by one process, and never seen half-built."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mka_megatron.data.batch import DataError


def publish(final: Path, build: Callable[[Path], None], waiting: Callable[[], None] = lambda: None) -> None:
    """Make `final` hold what `build` writes into the empty directory it is given.

    Safe to call from any number of processes and hosts that share the file system: one builds under a file
    lock, the others wait. `final` appears by one rename after its files are on disk, so that it is complete
    whenever it is there; what a killed build left is removed by the next one.

    Args:
        final: the directory.
        build: fills the one it is given.
        waiting: called again and again while another process builds.

    Raises:
        DataError: the directory cannot be written or locked.
    """
    if final.is_dir():
        return
    field = f"data.cache_dir: {final.parent}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent / f".{final.name}.lock", waiting):
            if final.is_dir():
                return
            for stale in final.parent.glob(f".{final.name}.tmp-*"):
                shutil.rmtree(stale)
            temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
            temporary.mkdir()
            try:
                build(temporary)
                _sync(temporary)
                temporary.rename(final)
                _sync_directory(final.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{field}: the disk is full; free space or choose another directory") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise DataError(
                f"{field}: cannot be written ({error.strerror}); choose another directory"
            ) from None
        raise


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    with open(path, "w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.1)
            except OSError as error:
                raise DataError(
                    f"data.cache_dir: {path.parent} is on a file system without locks ({error.strerror}); choose "
                    "another, or prepare the data ahead with tools/preprocess_data.py"
                ) from None
        yield


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
