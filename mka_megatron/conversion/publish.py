"""Output directories that are there completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mka_megatron.config.errors import ConfigError, show


def check_output(output: Path) -> Path:
    """The real path of `output`, which does not exist yet or is empty; raises ConfigError."""
    final = Path(os.path.realpath(output))
    try:
        if final.is_dir():
            if any(final.iterdir()):
                raise ConfigError(f"{show(str(output))} is not empty; give a directory that is, or a new one.")
        elif final.exists():
            raise ConfigError(f"{show(str(output))} is a file; give an empty directory, or a new one.")
    except OSError as error:
        raise ConfigError(f"{show(str(output))} cannot be written: {error.strerror}; give another directory.") from None
    return final


@contextlib.contextmanager
def published(output: Path, needed: int) -> Iterator[Path]:
    """A directory to write into that becomes `output` by one rename at the end, once it is on the disk.

    After any exception there is nothing left of it; what a killed process left beside `output` is removed by the next one.

    Args:
        output: must not exist, or be empty.
        needed: bytes that will be written, to refuse a disk that is too full beforehand.

    Raises:
        ConfigError: `output` is not empty or cannot be written.
    """
    final = check_output(output)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final)
        free = shutil.disk_usage(final.parent).free
        if free < needed:
            raise ConfigError(f"{show(str(output))} needs {needed / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB left; "
                              "free some space, or give another directory.")
        temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            with _held(temporary):
                yield temporary
                _sync(temporary)
                temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _force(final.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ConfigError(f"{show(str(output))} cannot be written: {error.strerror or error}; "
                          f"{'free some space, or ' if full else ''}give another directory.") from None


def _force(path: Path) -> None:
    """A file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _force(path)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Locked as long as this process lives, so that others can tell that it does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(final: Path) -> None:
    for stale in final.parent.glob(f".{final.name}.tmp-*"):
        try:
            descriptor = os.open(stale, os.O_RDONLY)
        except FileNotFoundError:  # the one that made it has just ended
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        finally:
            os.close(descriptor)
        shutil.rmtree(stale, ignore_errors=True)
