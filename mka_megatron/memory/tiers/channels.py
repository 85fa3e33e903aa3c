"""Blocking reads and writes of one file at a time, past the page cache where the file system allows it.

A channel belongs to one stream at a time and owns an aligned buffer, which everything passes through. It is
DeepSpeed's `aio_handle` (several blocks in flight), or plain preadv and pwritev where libaio, its build or the
right to lock memory is missing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Sizes and offsets are multiples of it: every disk's sectors, and every file system's direct I/O, divide it."""
_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
Backend = Literal["auto", "aio", "plain"]


class Channel(Protocol):
    """One stream; offsets, counts and the buffer are aligned."""

    buffer: Tensor
    """uint8, where reads arrive and writes start."""

    def read(self, path: Path, offset: int, count: int) -> None:
        """Fill the head of the buffer with `count` bytes; the file is known to reach that far. Raises OSError."""

    def write(self, path: Path, offset: int, count: int) -> None:
        """Write the buffer's first `count` bytes, and check that they arrived. Raises OSError."""

    def close(self) -> None:
        """Give the buffer back."""


class PlainChannel:
    """preadv and pwritev; direct: with O_DIRECT."""

    def __init__(self, buffer_bytes: int, direct: bool) -> None:
        # anonymous mappings start on a memory page
        self.buffer = torch.frombuffer(mmap.mmap(-1, buffer_bytes), dtype=torch.uint8)
        self._bytes = self.buffer.numpy().data
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)

    def read(self, path: Path, offset: int, count: int) -> None:
        """As the protocol says."""
        self._whole(os.preadv, path, os.O_RDONLY, offset, count)

    def write(self, path: Path, offset: int, count: int) -> None:
        """As the protocol says: the system's count is the proof."""
        self._whole(os.pwritev, path, os.O_WRONLY, offset, count)

    def _whole(self, move: Callable[..., int], path: Path, mode: int, offset: int, count: int) -> None:
        file = os.open(path, mode | self._flags)
        try:
            done = 0
            while done < count:
                moved = move(file, [self._bytes[done:count]], offset + done)
                if moved == 0 or (moved % ALIGNMENT and done + moved < count):
                    raise OSError(f"only {done + moved} of {count} bytes at {offset} moved")
                done += moved
        finally:
            os.close(file)

    def close(self) -> None:
        """As the protocol says."""
        del self._bytes, self.buffer


class AioChannel:
    """DeepSpeed's handle, one per channel because its `wait` is for all of a handle.

    It drops the results of its writes, so a write counts only when its last sector is read back and found.
    """

    def __init__(self, buffer_bytes: int, operations: Any) -> None:
        self._handle = operations.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, False, True, 1)
        # locked memory: DeepSpeed copies everything else through a buffer that it allocates anew every time
        self._locked = self._handle.new_cpu_locked_tensor(
            buffer_bytes + ALIGNMENT, torch.empty(0, dtype=torch.uint8)
        )
        self.buffer = self._locked[:buffer_bytes]
        self._tail = self._locked[buffer_bytes:]

    def read(self, path: Path, offset: int, count: int) -> None:
        """As the protocol says."""
        if self._handle.sync_pread(self.buffer[:count], str(path), offset) != 1:
            raise OSError(f"DeepSpeed's aio cannot read {count} bytes at {offset}")

    def write(self, path: Path, offset: int, count: int) -> None:
        """As the protocol says."""
        self._tail.bitwise_not_()
        written = self._handle.sync_pwrite(self.buffer[:count], str(path), offset)
        end = offset + count
        if written != 1 or os.stat(path).st_size < end:
            raise OSError(f"DeepSpeed's aio cannot write {count} bytes at {offset}")
        read = self._handle.sync_pread(self._tail, str(path), end - ALIGNMENT)
        if read != 1 or not torch.equal(self._tail, self.buffer[count - ALIGNMENT : count]):
            raise OSError(f"{count} bytes written at {offset} are not there when read back")

    def close(self) -> None:
        """As the protocol says."""
        self._handle.free_cpu_locked_tensor(self._locked)
        del self._locked, self._tail, self.buffer


def factory(backend: Backend, folder: Path, locked_bytes: int) -> tuple[str, Callable[[int], Channel]]:
    """Choose how to reach the files in `folder`.

    Args:
        backend: "auto": DeepSpeed's aio where it works, else plain.
        folder: of the files to come, writable.
        locked_bytes: total size of the channels' buffers.

    Returns:
        What was chosen and why, in words for a log, and the channels' constructor by buffer size.
        Raises OSError when backend "aio" cannot be had or the folder cannot be written.
    """
    direct = _direct_io(folder)
    if backend == "plain":
        reason = "as asked for"
    elif not direct:
        reason = "this file system has no O_DIRECT"
    elif not _lockable(locked_bytes):
        reason = f"the limit on locked memory (ulimit -l) is below {locked_bytes >> 10} KiB"
    else:
        operations, reason = _deepspeed()
        if operations is not None:
            return "DeepSpeed aio", lambda size: AioChannel(size, operations)
    if backend == "aio":
        raise OSError(f"DeepSpeed's aio is not available: {reason}")
    kind = "with O_DIRECT" if direct else "through the page cache"
    return f"preadv/pwritev {kind}: {reason}", lambda size: PlainChannel(size, direct)


@functools.cache
def _deepspeed() -> tuple[Any, str]:
    """DeepSpeed's operations, or None and why not."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            return None, "libaio's header is missing (install libaio-dev or libaio-devel)"
        return builder.load(verbose=False), ""
    except Exception as error:  # whatever a compiler or loader does wrong, there is a way without it
        return None, f"its op does not build or load ({type(error).__name__}: {str(error).splitlines()[0]})"


def _direct_io(folder: Path) -> bool:
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR, 0o600))
        os.truncate(probe, ALIGNMENT)
        try:
            PlainChannel(ALIGNMENT, direct=True).read(probe, 0, ALIGNMENT)
        except OSError:
            return False
        return True
    finally:
        probe.unlink(missing_ok=True)


def _lockable(count: int) -> bool:
    """Whether this process may lock `count` more bytes: DeepSpeed aborts when it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    trial = mmap.mmap(-1, count)
    address = ctypes.addressof(ctypes.c_char.from_buffer(trial))
    return libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(count)) == 0
