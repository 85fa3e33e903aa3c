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

from mka_megatron.memory.tiers.channels import Channel, Stretch
from mka_megatron.memory.tiers.pages import PageKey, Seal, TierError
from mka_megatron.memory.tiers.writing import ALIGNMENT

SEGMENT_BYTES = 64 << 20
WRITERS = 8
READERS = 8
WRITE_BYTES = 4 << 20
READ_BYTES = 2 << 20
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

    Args:
        channel: makes a channel with a buffer of so many bytes.
        buffer_bytes: of each channel, whole records.
        write: what `writing.write` does, for this disk.
    """

    def __init__(
        self,
        segments: Segments,
        record_bytes: int,
        seal: Seal,
        channel: Callable[[int], Channel],
        buffer_bytes: int,
        write: Callable[[Path, int, list[np.ndarray]], None],
    ) -> None:
        self.segments = segments
        self.write_pages, self.read_pages = max(1, WRITE_BYTES // record_bytes), buffer_bytes // record_bytes
        self._record_bytes = record_bytes
        self.seal, self._write_records = seal, write
        self._reading: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        for _ in range(READERS):
            self._reading.put(channel(buffer_bytes))
        self._write_threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="page-write")
        self._read_threads = ThreadPoolExecutor(READERS, thread_name_prefix="page-read")

    def write(self, records: list[np.ndarray], slots: list[Slot]) -> Future[None]:
        """Write `records`, sealed, uint8 [record bytes] each, which must not change until the result is there.

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
            if part and size + len(run.places) > longest:
                parts.append(part)
                part, size = [], 0
            part.append(run)
            size += len(run.places)
        parts += [part] if part else []
        return [self._begin(part, keys, records) for part in parts]

    def _begin(
        self, part: list[Run], keys: list[PageKey], records: list[np.ndarray]
    ) -> tuple[list[int], Future[list[TierError | None]]]:
        places = [place for run in part for place in run.places]
        into = [(keys[place], records[place]) for place in places]
        return places, self._read_threads.submit(self._read, part, into)

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        for threads in (self._write_threads, self._read_threads):
            threads.shutdown(cancel_futures=True)
        while not self._reading.empty():
            self._reading.get().close()

    def _write(self, records: list[np.ndarray], slots: list[Slot]) -> None:
        for run in self.segments.runs(slots, self.write_pages):
            path, offset, _ = self._stretch(run, len(run.places))
            self._write_records(path, offset, [records[place] for place in run.places])

    def _read(self, part: list[Run], into: list[tuple[PageKey, np.ndarray]]) -> list[TierError | None]:
        """`into`: keys and memory of the runs' pages, one run behind the other."""
        channel = self._reading.get()
        try:
            records = self._records(channel)
            # what a read fails to bring must not be taken for an earlier page of that name
            records[: len(into), :ALIGNMENT] = 0
            found: list[TierError | None] = []
            stretches, arriving = [], []
            for run in part:
                there, lack = self._there(run)
                places = range(len(found), len(found) + there)
                missing = into[len(found) + there : len(found) + len(run.places)]
                found += [None] * there + [
                    _broken(key, self.segments.path(run.segment), lack) for key, _ in missing
                ]
                if there:
                    stretches.append(self._stretch(run, there))
                    arriving.append(places)
            rows = iter(records)
            for stretch, places, error in zip(stretches, arriving, channel.read(stretches), strict=True):
                for place, record in zip(places, rows, strict=False):
                    key, page = into[place]
                    problem = f"cannot be read ({error})" if error else self.seal.problem(record.data, key)
                    if problem is None:
                        page[:] = record
                    else:
                        found[place] = _broken(key, stretch.path, problem)
            return found
        finally:
            self._reading.put(channel)

    def _there(self, run: Run) -> tuple[int, str]:
        """How many of a run's pages its file reaches, and why not the others. (DeepSpeed aborts the process at the end
        of a file.)"""
        try:
            size = self.segments.path(run.segment).stat().st_size
        except FileNotFoundError:
            return 0, "is missing"
        except OSError as error:
            return 0, f"cannot be read ({error})"
        return max(0, min(size // self._record_bytes - run.first, len(run.places))), "ends before it"

    def _stretch(self, run: Run, pages: int) -> Stretch:
        """The first `pages` of a run."""
        path, offset = self.segments.path(run.segment), run.first * self._record_bytes
        return Stretch(path, offset, pages * self._record_bytes)

    def _records(self, channel: Channel) -> np.ndarray:
        """A channel's buffer, uint8 [P, record bytes]."""
        return channel.buffer.numpy().reshape(-1, self._record_bytes)


def _broken(key: PageKey, path: Path, problem: str) -> TierError:
    return TierError(f"the {key} is lost: {path} {problem}.")
