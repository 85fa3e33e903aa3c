"""Writes pages from where they lie, and checks that they arrived.

Not by DeepSpeed's aio: that takes one stretch of locked memory at a time, so that pages would be copied first, drops
the results of its writes, and hangs when two threads meet at a process's first write. A gathering write with O_DIRECT
keeps the disk as busy, from the rows of a pool, and its count can be trusted.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ALIGNMENT = 4096
"""Sizes and offsets are multiples of it: every disk's sectors, and every file system's direct I/O, divide it."""


def write(path: Path, offset: int, records: Sequence[np.ndarray], direct: bool) -> None:
    """Write `records` one behind the other to a file that reaches as far, and read its last sector back.

    Args:
        records: uint8 [bytes], their sizes and, with O_DIRECT, their addresses multiples of ALIGNMENT.
        direct: with O_DIRECT.

    Raises OSError: the file is missing or shorter, or what was written is not there.
    """
    rest = [record.data for record in records]
    last = bytes(rest[-1][-ALIGNMENT:])
    end = offset + sum(map(len, rest))
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        if os.fstat(file).st_size < end:
            raise OSError(f"{path} has been cut short")
        place = offset
        while rest:
            moved = os.pwritev(file, rest, place)
            if moved <= 0 or moved % ALIGNMENT:
                raise OSError(f"only {place + moved - offset} of {end - offset} bytes written at {offset}")
            place += moved
            while rest and moved >= len(rest[0]):
                moved -= len(rest.pop(0))
            if moved:
                rest[0] = rest[0][moved:]
        # anonymous mappings start on a memory page
        tail = mmap.mmap(-1, ALIGNMENT)
        os.preadv(file, [tail], end - ALIGNMENT)
        if tail[:] != last:
            raise OSError(f"{end - offset} bytes written at {offset} are not there when read back")
    finally:
        os.close(file)
