"""Pages between host memory and the disk.

Host memory is a page's home. With a disk, the oldest are written behind, before memory runs short, and stay where
they are until the write is verified; then the row of the one that was used least recently can be taken for another
page. A page that is read comes back to host memory, and its copy on the disk remains good.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mka_megatron.memory.tiers.dram import Pool
from mka_megatron.memory.tiers.pages import PageKey, TierError
from mka_megatron.memory.tiers.ssd import Disk, Slot
from mka_megatron.memory.tiers.statistics import TierStatistics

_CACHED_PAGES = 8
"""Copied before they are hashed: a processor's cache holds them."""


@dataclass(eq=False, slots=True)
class Page:
    """Where a page is."""

    key: PageKey
    tokens: int
    row: int | None
    """In host memory."""
    slot: Slot | None = None
    """On the disk, verified."""
    writing: bool = False
    reading: _Read | None = None
    dropped: bool = False
    """Forgotten while being written or read: its row and slot go when that ends."""

    @property
    def in_memory(self) -> bool:
        """Its row holds it."""
        return self.row is not None and self.reading is None


@dataclass(eq=False, slots=True)
class _Write:
    done: Future[None]
    pages: list[Page]
    slots: list[Slot]


@dataclass(eq=False, slots=True)
class _Read:
    done: Future[list[TierError | None]]
    pages: list[Page]
    into: list[np.ndarray]
    """Where each is read to: its row, or memory of its own."""


class Paging:
    """Pages in the rows of `dram` and, unless it is None, on `disk`; `count` is kept.

    full: how a failed write's message ends, naming the budget.
    """

    def __init__(self, dram: Pool, disk: Disk | None, count: TierStatistics, full: str) -> None:
        self.pages: dict[PageKey, Page] = {}
        """Those held, oldest first."""
        self.count = count
        self._dram, self._disk, self._full = dram, disk, full
        # in memory and neither being written nor read, least recently used first: only there, and on the disk too
        self._dirty: OrderedDict[PageKey, Page] = OrderedDict()
        self._clean: OrderedDict[PageKey, Page] = OrderedDict()
        self._writes: deque[_Write] = deque()
        self._reads: list[_Read] = []
        self._wished: list[PageKey] = []

    @property
    def capacity(self) -> int | None:
        """Pages that can be held; None: as many as memory or the disk has room for."""
        if self._disk is None:
            return self._dram.capacity
        if self._dram.capacity is None or self._disk.segments.limit is None:
            return None
        return max(self._dram.capacity, self._disk.segments.limit)

    @property
    def dram_pages(self) -> int:
        """Rows of host memory in use."""
        return self._dram.used

    @property
    def disk_pages(self) -> int:
        """Slots of the disk in use."""
        return self._disk.segments.used if self._disk else 0

    def hold(
        self, keys: Sequence[PageKey], tokens: Sequence[int], fields: list[tuple[int, int, np.ndarray]]
    ) -> int:
        """Keep new pages, as many as there is room for at once; returns how many: the first of them.

        0: neither memory nor the disk has room. Raises TierError for an earlier write that failed.

        fields: first byte in a row, the byte behind it, and uint8 [P, bytes].
        """
        rows = self._rows(len(keys))
        while not rows:
            if self._writes:
                self._wait(self._writes[0].done)
                self.settle()
            elif self._reads:
                self._finish(self._reads[0])
            elif not self._start_writing():
                return 0
            rows = self._rows(len(keys))
        for places, memory in self._dram.runs(rows, longest=_CACHED_PAGES):
            for begin, end, values in fields:
                memory[:, begin:end] = values[places]
            if self._disk is not None:
                # here rather than by the threads that write: hashing keeps the interpreter, which they would fight for
                for key, count, record in zip(keys[places], tokens[places], memory, strict=True):
                    self._disk.seal.close(record.data, key, count)
        for key, count, row in zip(keys, tokens, rows, strict=False):
            self.pages[key] = self._dirty[key] = Page(key, count, row)
        return len(rows)

    def forget(self, key: PageKey) -> None:
        """Hold the page no longer."""
        page = self.pages.pop(key)
        self._dirty.pop(key, None)
        self._clean.pop(key, None)
        page.dropped = True
        if not page.writing and page.reading is None:
            self._release(page)

    def write_behind(self) -> None:
        """Write the oldest pages until half of the rows are free or could be: new pages and prefetches do not wait."""
        if self._disk is None or self._dram.capacity is None:
            return
        ready = (self._dram.free or 0) + len(self._clean) + sum(len(write.pages) for write in self._writes)
        while ready < self._dram.capacity // 2:
            started = self._start_writing()
            if not started:
                return
            ready += started

    def prefetch(self, keys: Sequence[PageKey]) -> None:
        """Start to read those of the pages that are on the disk alone, into up to half of the rows.

        Those for which no row can be had yet follow at the next call, unless others are then wanted instead.
        """
        self._wished = list(keys)
        self._grant_wishes()

    def _grant_wishes(self) -> None:
        pages = [self.pages[key] for key in self._wished if key in self.pages]
        wanted = [page for page in pages if page.row is None and page.reading is None]
        room = len(wanted)
        if self._dram.capacity is not None:
            room = max(0, self._dram.capacity // 2 - sum(len(read.pages) for read in self._reads))
        started = self._start_reading(wanted[:room], loose=0)
        self._wished = [page.key for page in wanted[started:]]

    def read(self, keys: Sequence[PageKey], begin: int, end: int) -> Tensor:
        """Bytes [begin, end) of different pages' rows, uint8 [P, bytes] in host memory.

        Raises TierError for the first that is lost, when all have been read.
        """
        pages = [self.pages[key] for key in keys]
        present = [place for place, page in enumerate(pages) if page.in_memory]
        missing = [place for place, page in enumerate(pages) if not page.in_memory]
        self.count.dram_hits += len(present)
        self.count.misses += len(missing)
        out = self._dram.empty(len(pages), end - begin)
        into = out.numpy()
        for at, memory in self._dram.runs([pages[place].row for place in present]):  # type: ignore[misc]
            into[present[at]] = memory[:, begin:end]
        for place in present:
            for order in (self._dirty, self._clean):
                if keys[place] in order:
                    order.move_to_end(keys[place])
        problem: TierError | None = None
        while missing:
            idle = [pages[place] for place in missing if pages[place].reading is None]
            self._start_reading(idle, loose=self._disk.read_pages)  # type: ignore[union-attr]
            places = {pages[place]: place for place in missing if pages[place].reading is not None}
            reads = {id(page.reading): page.reading for page in places}
            for read in reads.values():
                assert read is not None
                for page, record, wrong in zip(read.pages, read.into, self._finish(read), strict=True):
                    if page in places and wrong is None:
                        into[places[page]] = record[begin:end]
                    elif page in places:
                        problem = problem or wrong
            missing = [place for place in missing if place not in set(places.values())]
        if problem is not None:
            raise problem
        return out

    def settle(self) -> None:
        """Note the reads and writes that have ended. Raises TierError for a write that failed."""
        failure: BaseException | None = None
        while self._writes and self._writes[0].done.done():
            write = self._writes.popleft()
            error = write.done.exception()
            failure = failure or error
            if error is not None:
                self._disk.segments.release(write.slots)  # type: ignore[union-attr]
            else:
                self.count.written_bytes += len(write.slots) * self._dram.row_bytes
            for page, slot in zip(write.pages, write.slots, strict=True):
                page.writing = False
                page.slot = slot if error is None else None
                if page.dropped:
                    self._release(page)
                else:
                    (self._clean if error is None else self._dirty)[page.key] = page
        for read in [read for read in self._reads if read.done.done()]:
            self._finish(read)
        if self._wished:
            self._grant_wishes()
        if failure is not None:
            raise TierError(f"a page cannot be written ({failure}): {self._full}.") from failure

    def close(self) -> None:
        """Wait for the disk's threads; the pages are gone."""
        if self._disk is not None:
            self._disk.close()
        for order in (self.pages, self._dirty, self._clean):
            order.clear()

    @property
    def _batch(self) -> int:
        """Pages of a write: large writes, but not most of the rows at once."""
        assert self._disk is not None
        most = self._disk.write_pages
        return most if self._dram.capacity is None else max(1, min(most, self._dram.capacity // 4))

    def _row(self) -> int | None:
        """A free row, or that of the least recently used page which is on the disk too."""
        row = self._dram.take()
        if row is None and self._clean:
            _, page = self._clean.popitem(last=False)
            row, page.row = page.row, None
            self.count.evictions += 1
        return row

    def _rows(self, most: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < most and (row := self._row()) is not None:
            rows.append(row)
        return rows

    def _release(self, page: Page) -> None:
        if page.row is not None:
            self._dram.give_back(page.row)
        if page.slot is not None:
            self._disk.segments.release([page.slot])  # type: ignore[union-attr]
        page.row = page.slot = None

    def _wait(self, done: Future) -> None:
        if done.done():
            return
        begin = time.perf_counter()
        done.exception()
        self.count.stall_seconds += time.perf_counter() - begin

    def _start_writing(self) -> int:
        """Start to write a batch of the oldest pages that are in memory alone; returns how many."""
        if self._disk is None or not self._dirty:
            return 0
        try:
            slots = self._disk.segments.allocate(min(self._batch, len(self._dirty)))
        except OSError as error:
            raise TierError(f"a file for pages cannot be made ({error}): {self._full}.") from error
        if slots:
            pages = [self._dirty.popitem(last=False)[1] for _ in slots]
            for page in pages:
                page.writing = True
            rows = [self._dram.row(page.row) for page in pages]  # type: ignore[arg-type]
            self._writes.append(_Write(self._disk.write(rows, slots), pages, slots))
        return len(slots)

    def _start_reading(self, wanted: list[Page], loose: int) -> int:
        """Start to read pages from the disk, into rows and up to `loose` into memory of their own.

        Returns how many: the first of those wanted.
        """
        pages: list[Page] = []
        into: list[np.ndarray] = []
        for page in wanted:
            page.row = self._row()
            if page.row is not None:
                into.append(self._dram.row(page.row))
            elif loose:
                into.append(np.empty(self._dram.row_bytes, dtype=np.uint8))
                loose -= 1
            else:
                break
            pages.append(page)
        if not pages:
            return 0
        assert self._disk is not None
        slots = [page.slot for page in pages]
        parts = self._disk.read([page.key for page in pages], slots, into)  # type: ignore[arg-type]
        for places, done in parts:
            read = _Read(done, [pages[place] for place in places], [into[place] for place in places])
            self._reads.append(read)
            for page in read.pages:
                page.reading = read
        return len(pages)

    def _finish(self, read: _Read) -> list[TierError | None]:
        """Wait for a read and note its end; returns per page what is wrong with it, if anything."""
        self._wait(read.done)
        problems = read.done.result()
        self._reads.remove(read)
        self.count.read_bytes += len(read.pages) * self._dram.row_bytes
        for page, problem in zip(read.pages, problems, strict=True):
            page.reading = None
            if page.dropped:
                self._release(page)
            elif page.row is not None and problem is None:
                self._clean[page.key] = page
            elif page.row is not None:
                self._dram.give_back(page.row)
                page.row = None
        return problems
