"""The lowest tier: pages in files, written and read by background threads.

Pages lie in slots of segment files, whose space is claimed when a file is made, so that a write never runs out of
disk. Free slots are used again, the lowest first, so that pages written together lie together: consecutive slots
are one write and one read.
"""

from __future__ import annotations

import errno
import heapq
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mka_megatron.memory.tiers.channels import Channel
from mka_megatron.memory.tiers.pages import PageKey, Seal, TierError

SEGMENT_BYTES = 64 << 20
WRITERS = 2
READERS = 8
WRITE_BYTES = 8 << 20
READ_BYTES = 2 << 20
PART_PAGES = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


Slot = int
"""A page's place on the disk: its segment times _STRIDE, plus its number in the segment. (There are many, and the
garbage collector does not follow integers.)"""
_STRIDE = 1 << 32


class Run(NamedTuple):
    """Consecutive slots of a segment."""

    segment: int
    first: int
    places: list[int]
    """Which of the given slots they are."""


class Segments:
    """The files and their free slots. limit: most slots of all files together, None: what the disk has."""

    def __init__(self, folder: Path, record_bytes: int, limit: int | None) -> None:
        self.limit = limit
        self._folder = folder
        self._record_bytes = record_bytes
        self._sizes: list[int] = []
        self._paths: list[Path] = []
        self._free: list[Slot] = []

    @property
    def slots(self) -> int:
        """Slots of all files so far."""
        return sum(self._sizes)

    @property
    def used(self) -> int:
        """Slots that hold a page or are about to."""
        return self.slots - len(self._free)

    def place(self, slot: Slot) -> tuple[Path, int]:
        """A slot's file, and the byte that it begins at."""
        segment, number = divmod(slot, _STRIDE)
        return self.path(segment), number * self._record_bytes

    def path(self, segment: int) -> Path:
        """A segment's file."""
        return self._paths[segment]

    def allocate(self, count: int) -> list[Slot]:
        """Up to `count` slots, fewer when the disk or the limit is reached. Raises OSError."""
        while len(self._free) < count and self._grow():
            pass
        return [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]

    def release(self, slots: list[Slot]) -> None:
        """The slots' pages are no longer needed."""
        for slot in slots:
            heapq.heappush(self._free, slot)

    def runs(self, slots: list[Slot], longest: int) -> Iterator[Run]:
        """`slots` as runs of at most `longest`."""
        run: Run | None = None
        for place in sorted(range(len(slots)), key=slots.__getitem__):
            segment, number = divmod(slots[place], _STRIDE)
            joins = run and run.segment == segment and run.first + len(run.places) == number
            if run and joins and len(run.places) < longest:
                run.places.append(place)
                continue
            if run:
                yield run
            run = Run(segment, number, [place])
        if run:
            yield run

    def _grow(self) -> bool:
        slots = max(1, SEGMENT_BYTES // self._record_bytes)
        if self.limit is not None:
            slots = min(slots, self.limit - self.slots)
        path = self._folder / f"segment-{len(self._sizes):05d}.pages"
        while slots > 0:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, slots * self._record_bytes)
            except OSError as error:
                path.unlink()
                if error.errno not in _FULL:
                    raise
                slots //= 2
                continue
            finally:
                os.close(file)
            first = len(self._sizes) * _STRIDE
            self.release(list(range(first, first + slots)))
            self._sizes.append(slots)
            self._paths.append(path)
            return True
        return False


class Disk:
    """Background reads and writes of sealed pages in `segments`.

    channel: makes a channel with a buffer of so many bytes.
    """

    def __init__(
        self,
        segments: Segments,
        record_bytes: int,
        seal: Seal,
        channel: Callable[[int], Channel],
        buffers: tuple[int, int],
    ) -> None:
        self.segments = segments
        self.write_pages, self.read_pages = (max(1, size // record_bytes) for size in buffers)
        self._record_bytes = record_bytes
        self._seal = seal
        self._writing, self._write_threads = _streams(
            channel, WRITERS, self.write_pages * record_bytes, "page-write"
        )
        self._reading, self._read_threads = _streams(
            channel, READERS, self.read_pages * record_bytes, "page-read"
        )

    def write(self, records: list[np.ndarray], slots: list[Slot]) -> Future[None]:
        """Write `records`, uint8 [record bytes] each, which must not change until the result is there.

        The result comes when the pages are known to be on the disk; raises OSError.
        """
        return self._write_threads.submit(self._write, records, slots)

    def read(
        self, keys: list[PageKey], slots: list[Slot], records: list[np.ndarray]
    ) -> list[tuple[list[int], Future[list[TierError | None]]]]:
        """Read the pages `keys` into `records`, uint8 [record bytes] each, in parts that streams share out.

        Returns:
            Per part which of the keys it reads, and its result to come: per page what is wrong with it, if anything.
        """
        longest = min(self.read_pages, -(-len(slots) // READERS))
        parts, part, size = [], list[Run](), 0
        for run in self.segments.runs(slots, longest):
            if part and size + len(run.places) > min(longest, PART_PAGES):
                parts.append(part)
                part, size = [], 0
            part.append(run)
            size += len(run.places)
        parts += [part] if part else []
        return [self._begin(part, keys, records) for part in parts]

    def _begin(
        self, part: list[Run], keys: list[PageKey], records: list[np.ndarray]
    ) -> tuple[list[int], Future[list[TierError | None]]]:
        into = [[(keys[place], records[place]) for place in run.places] for run in part]
        return [place for run in part for place in run.places], self._read_threads.submit(
            self._read, part, into
        )

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        for threads in (self._write_threads, self._read_threads):
            threads.shutdown(cancel_futures=True)
        for channels in (self._writing, self._reading):
            while not channels.empty():
                channels.get().close()

    def _write(self, records: list[np.ndarray], slots: list[Slot]) -> None:
        channel = self._writing.get()
        try:
            rows = channel.buffer.numpy().reshape(-1, self._record_bytes)
            for run in self.segments.runs(slots, self.write_pages):
                for row, place in enumerate(run.places):
                    rows[row] = records[place]
                path = self.segments.path(run.segment)
                offset, count = run.first * self._record_bytes, len(run.places) * self._record_bytes
                if path.stat().st_size < offset + count:
                    raise OSError(f"{path} has been cut short")
                channel.write(path, offset, count)
        finally:
            self._writing.put(channel)

    def _read(self, part: list[Run], into: list[list[tuple[PageKey, np.ndarray]]]) -> list[TierError | None]:
        channel = self._reading.get()
        try:
            return [
                each
                for run, pages in zip(part, into, strict=True)
                for each in self._read_run(channel, run, pages)
            ]
        finally:
            self._reading.put(channel)

    def _read_run(
        self, channel: Channel, run: Run, into: list[tuple[PageKey, np.ndarray]]
    ) -> list[TierError | None]:
        path = self.segments.path(run.segment)
        offset = run.first * self._record_bytes
        try:
            # DeepSpeed aborts the process at the end of a file
            there = (path.stat().st_size - offset) // self._record_bytes
            whole = max(0, min(there, len(into)))
            if whole:
                channel.read(path, offset, whole * self._record_bytes)
        except FileNotFoundError:
            return [_broken(key, path, "is missing") for key, _ in into]
        except OSError as error:
            return [_broken(key, path, f"cannot be read ({error})") for key, _ in into]
        rows = channel.buffer.numpy().reshape(-1, self._record_bytes)
        found = []
        for index, (key, record) in enumerate(into):
            problem = "ends before it" if index >= whole else self._seal.problem(rows[index].data, key)
            found.append(None if problem is None else _broken(key, path, problem))
            if problem is None:
                record[:] = rows[index]
        return found


def _broken(key: PageKey, path: Path, problem: str) -> TierError:
    return TierError(f"the {key} is lost: {path} {problem}.")


def _streams(
    channel: Callable[[int], Channel], count: int, buffer_bytes: int, name: str
) -> tuple[queue.SimpleQueue[Channel], ThreadPoolExecutor]:
    channels: queue.SimpleQueue[Channel] = queue.SimpleQueue()
    for _ in range(count):
        channels.put(channel(buffer_bytes))
    return channels, ThreadPoolExecutor(count, thread_name_prefix=name)
