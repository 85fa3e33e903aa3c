"""Reads of stretches of files, past the page cache where the file system allows it.

A channel belongs to one stream at a time and owns an aligned buffer, which everything passes through. It is
DeepSpeed's `aio_handle`, which works off many stretches while Python does not, or preadv where libaio, its build or
the right to lock memory is missing. (`writing` is the other direction.)
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mka_megatron.memory.tiers.builds import wait_for_build
from mka_megatron.memory.tiers.writing import ALIGNMENT

_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
Backend = Literal["auto", "aio", "plain"]


class Stretch(NamedTuple):
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    size: int


class Channel(Protocol):
    """One stream; offsets, sizes and the buffer are aligned."""

    buffer: Tensor
    """uint8, where stretches arrive, from its head on, one behind the other."""

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """Read them; the files are known to reach that far. Returns for each what went wrong, if anything."""

    def close(self) -> None:
        """Give the buffer back."""


class PlainChannel:
    """preadv; direct: with O_DIRECT."""

    def __init__(self, buffer_bytes: int, direct: bool) -> None:
        # anonymous mappings start on a memory page
        self.buffer = torch.frombuffer(mmap.mmap(-1, buffer_bytes), dtype=torch.uint8)
        self._bytes = self.buffer.numpy().data
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """As the protocol says."""
        problems: list[OSError | None] = []
        for part, stretch in _placed(stretches):
            try:
                self._whole(self._bytes[part], stretch)
                problems.append(None)
            except OSError as error:
                problems.append(error)
        return problems

    def _whole(self, part: memoryview, stretch: Stretch) -> None:
        path, offset, size = stretch
        file = os.open(path, self._flags)
        try:
            done = 0
            while done < size:
                moved = os.preadv(file, [part[done:]], offset + done)
                if moved == 0 or (moved % ALIGNMENT and done + moved < size):
                    raise OSError(f"only {done + moved} of {size} bytes at {offset} moved")
                done += moved
        finally:
            os.close(file)

    def close(self) -> None:
        """As the protocol says."""
        del self._bytes, self.buffer


class AioChannel:
    """DeepSpeed's handle, one per channel because its `wait` is for all of a handle. It drops the results of reads."""

    def __init__(self, buffer_bytes: int, operations: Any) -> None:
        self._handle = operations.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, False, True, 1)
        # locked memory: DeepSpeed copies everything else through a buffer that it allocates anew every time
        self.buffer = self._handle.new_cpu_locked_tensor(buffer_bytes, torch.empty(0, dtype=torch.uint8))

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """As the protocol says."""
        begun = [
            self._handle.async_pread(self.buffer[part], str(path), offset) == 0
            for part, (path, offset, _) in _placed(stretches)
        ]
        if any(begun):
            self._handle.wait()
        return [
            None if fine else OSError(f"DeepSpeed's aio cannot read {size} bytes at {offset}")
            for fine, (_, offset, size) in zip(begun, stretches, strict=True)
        ]

    def close(self) -> None:
        """As the protocol says."""
        self._handle.free_cpu_locked_tensor(self.buffer)
        del self.buffer


def _placed(stretches: Sequence[Stretch]) -> list[tuple[slice, Stretch]]:
    """Each with its part of the buffer."""
    ends = accumulate(stretch.size for stretch in stretches)
    return [(slice(end - stretch.size, end), stretch) for end, stretch in zip(ends, stretches, strict=True)]


def factory(backend: Backend, folder: Path, locked_bytes: int) -> tuple[str, bool, Callable[[int], Channel]]:
    """Choose how to reach the files in `folder`.

    Args:
        backend: "auto": DeepSpeed's aio where it works, else plain.
        folder: of the files to come, writable.
        locked_bytes: total size of the channels' buffers.

    Returns:
        What was chosen and why, in words for a log; whether the files can be reached with O_DIRECT; and the
        channels' constructor by buffer size.
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
            return "DeepSpeed aio", True, lambda size: AioChannel(size, operations)
    if backend == "aio":
        raise OSError(f"DeepSpeed's aio is not available: {reason}")
    kind = "with O_DIRECT" if direct else "through the page cache"
    return f"preadv {kind}: {reason}", direct, lambda size: PlainChannel(size, direct)


@functools.cache
def _deepspeed() -> tuple[Any, str]:
    """DeepSpeed's operations, or None and why not."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        builder = AsyncIOBuilder()
        if not builder.is_compatible(verbose=False):
            return None, "libaio's header is missing (install libaio-dev or libaio-devel)"
        for name in ("pin_memory", "async_io"):  # it loads the other before itself
            wait_for_build(name)
        return builder.load(verbose=False), ""
    except Exception as error:  # whatever a compiler or loader does wrong, there is a way without it
        return None, f"its op does not build or load ({type(error).__name__}: {str(error).splitlines()[0]})"


def _direct_io(folder: Path) -> bool:
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_RDWR, 0o600))
        os.truncate(probe, ALIGNMENT)
        return PlainChannel(ALIGNMENT, direct=True).read([Stretch(probe, 0, ALIGNMENT)]) == [None]
    finally:
        probe.unlink(missing_ok=True)


def _lockable(count: int) -> bool:
    """Whether this process may lock `count` more bytes: DeepSpeed aborts when it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    trial = mmap.mmap(-1, count)
    address = ctypes.addressof(ctypes.c_char.from_buffer(trial))
    return libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(count)) == 0
