"""Blocking reads and writes of stretches of files, past the page cache where the file system allows it.

A channel belongs to one stream at a time and owns an aligned buffer, which everything passes through. It is
DeepSpeed's `aio_handle` (several blocks in flight), or plain preadv and pwritev where libaio, its build or the
right to lock memory is missing.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Sizes and offsets are multiples of it: every disk's sectors, and every file system's direct I/O, divide it."""
_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
Backend = Literal["auto", "aio", "plain"]


class Stretch(NamedTuple):
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    size: int


class Channel(Protocol):
    """One stream; offsets, counts and the buffer are aligned."""

    buffer: Tensor
    """uint8, where reads arrive and writes start: stretches from its head on, one behind the other."""

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """Read them; the files are known to reach that far. Returns for each what went wrong, if anything."""

    def write(self, stretches: Sequence[Stretch]) -> None:
        """Write them, and check that they arrived. Raises OSError for the first that did not."""

    def close(self) -> None:
        """Give the buffer back."""


class PlainChannel:
    """preadv and pwritev; direct: with O_DIRECT."""

    def __init__(self, buffer_bytes: int, direct: bool) -> None:
        # anonymous mappings start on a memory page
        self.buffer = torch.frombuffer(mmap.mmap(-1, buffer_bytes), dtype=torch.uint8)
        self._bytes = self.buffer.numpy().data
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """As the protocol says."""
        problems: list[OSError | None] = []
        for part, stretch in _placed(stretches):
            try:
                self._whole(os.preadv, os.O_RDONLY, self._bytes[part], stretch)
                problems.append(None)
            except OSError as error:
                problems.append(error)
        return problems

    def write(self, stretches: Sequence[Stretch]) -> None:
        """As the protocol says: the system's count is the proof."""
        for part, stretch in _placed(stretches):
            self._whole(os.pwritev, os.O_WRONLY, self._bytes[part], stretch)

    def _whole(self, move: Callable[..., int], mode: int, part: memoryview, stretch: Stretch) -> None:
        path, offset, count = stretch
        file = os.open(path, mode | self._flags)
        try:
            done = 0
            while done < count:
                moved = move(file, [part[done:]], offset + done)
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

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """As the protocol says."""
        begun = [
            self._handle.async_pread(self.buffer[part], str(path), offset) == 0
            for part, (path, offset, _) in _placed(stretches)
        ]
        if any(begun):
            self._handle.wait()
        return [
            None if fine else OSError(f"DeepSpeed's aio cannot read {count} bytes at {offset}")
            for fine, (_, offset, count) in zip(begun, stretches, strict=True)
        ]

    def write(self, stretches: Sequence[Stretch]) -> None:
        """As the protocol says."""
        for part, (path, offset, count) in _placed(stretches):
            self._tail.bitwise_not_()
            written = self._handle.sync_pwrite(self.buffer[part], str(path), offset)
            end = offset + count
            if written != 1 or os.stat(path).st_size < end:
                raise OSError(f"DeepSpeed's aio cannot write {count} bytes at {offset}")
            read = self._handle.sync_pread(self._tail, str(path), end - ALIGNMENT)
            if read != 1 or not torch.equal(self._tail, self.buffer[part][-ALIGNMENT:]):
                raise OSError(f"{count} bytes written at {offset} are not there when read back")

    def close(self) -> None:
        """As the protocol says."""
        self._handle.free_cpu_locked_tensor(self._locked)
        del self._locked, self._tail, self.buffer


def _placed(stretches: Sequence[Stretch]) -> list[tuple[slice, Stretch]]:
    """Each with its part of the buffer."""
    ends = accumulate(stretch.size for stretch in stretches)
    return [(slice(end - stretch.size, end), stretch) for end, stretch in zip(ends, stretches, strict=True)]


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
        try:
            if operations is not None:
                _first_write(operations, folder)
                return "DeepSpeed aio", lambda size: AioChannel(size, operations)
        except OSError as error:
            reason = f"it does not write there ({error})"
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
    with _probe(folder) as probe:
        return PlainChannel(ALIGNMENT, direct=True).read([probe]) == [None]


def _first_write(operations: Any, folder: Path) -> None:
    """At a process's first write DeepSpeed warns of worn disks, and two threads that come to it together wait for each
    other for ever: so one makes it alone. Raises OSError when it does not arrive."""
    channel = AioChannel(ALIGNMENT, operations)
    try:
        with _probe(folder) as probe:
            channel.buffer.fill_(1)
            channel.write([probe])
    finally:
        channel.close()


@contextmanager
def _probe(folder: Path) -> Iterator[Stretch]:
    path = folder / "probe"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        os.truncate(path, ALIGNMENT)
        yield Stretch(path, 0, ALIGNMENT)
    finally:
        path.unlink(missing_ok=True)


def _lockable(count: int) -> bool:
    """Whether this process may lock `count` more bytes: DeepSpeed aborts when it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    trial = mmap.mmap(-1, count)
    address = ctypes.addressof(ctypes.c_char.from_buffer(trial))
    return libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(count)) == 0
