"""The paged store of L3: hot pages on the device, a pool in host memory, files on an SSD.

Pages are put once, never change, and are read any number of times. Host memory is their home; with an SSD tier they
are written behind, oldest first, so that a page's row can be reused when memory runs short, the least recently used
first; a page stays in memory until its write is verified. Pages read from the SSD come back to memory, and copies of
the last ones read stay on the device. One thread uses a store; its files are read and written by threads of its own.

Shapes: P pages, C chunk size, d head channels, W signature words.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mka_megatron.memory.tiers import pages as records
from mka_megatron.memory.tiers.dram import Pool
from mka_megatron.memory.tiers.pages import PageKey, PageShape, Seal, TierError
from mka_megatron.memory.tiers.ssd import Disk, Slot
from mka_megatron.memory.tiers.statistics import TierStatistics


@dataclass(eq=False)
class _Page:
    key: PageKey
    tokens: int
    row: int | None
    """In the pool of host memory."""
    slot: Slot | None = None
    """On the disk, verified."""
    writing: bool = False
    reading: _Read | None = None
    dropped: bool = False
    """Given up while being written or read: its row and slot go when that ends."""

    @property
    def in_memory(self) -> bool:
        return self.row is not None and self.reading is None


@dataclass(eq=False)
class _Write:
    done: Future[None]
    pages: list[_Page]
    slots: list[Slot]


@dataclass(eq=False)
class _Read:
    done: Future[list[TierError | None]]
    pages: list[_Page]
    into: list[Tensor]
    """Where each is read to: its row, or memory of its own."""


class TierStore:
    """Pages of one rank, by key.

    Args:
        shape: of the pages.
        dram: rows of :meth:`PageShape.record_bytes`; without `disk` its capacity is the store's.
        disk: the SSD tier, None for none; then the store's capacity is that of the larger of the two.
        hot: rows of K and V on `device`; None: pages are copied there each time.
        device: where pages are wanted.
        seal: makes and checks the pages' headers.
        when_full: "stop": refuse pages beyond the capacity; "evict": forget the oldest instead.
        full: how a refusal goes on after "no room for another page: ", naming the budget.
        on_close: called last by :meth:`close`.
    """

    def __init__(
        self,
        shape: PageShape,
        dram: Pool,
        disk: Disk | None,
        hot: Pool | None,
        device: torch.device,
        seal: Seal,
        when_full: Literal["stop", "evict"],
        full: str,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.shape = shape
        self._dram, self._disk, self._hot = dram, disk, hot
        self._device, self._seal = device, seal
        self._evicts, self._full, self._on_close = when_full == "evict", full, on_close
        self._pages: dict[PageKey, _Page] = {}
        self._sequences: dict[int, dict[PageKey, None]] = {}
        # in memory and not busy, least recently used first: only there, and on the disk as well
        self._dirty: OrderedDict[PageKey, _Page] = OrderedDict()
        self._clean: OrderedDict[PageKey, _Page] = OrderedDict()
        self._hot_rows: OrderedDict[PageKey, int] = OrderedDict()
        self._writes: deque[_Write] = deque()
        self._reads: list[_Read] = []
        self._count = TierStatistics()

    # -- what a caller does

    def put(
        self,
        keys: Sequence[PageKey],
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        mean_k: Tensor,
        mean_v: Tensor,
        signature: Tensor | None = None,
    ) -> list[PageKey]:
        """Keep copies of new pages.

        Args:
            keys: P of them, none held already.
            k, v: [P, C, d] of the store's dtype, on any device; detached.
            lengths: [P] int64 tokens of each.
            mean_k, mean_v: [P, d], the chunks' summaries.
            signature: [P, W]; None without recall.

        Returns:
            The pages forgotten for them. Raises ValueError for a key that is held, TierError when there is no
            room or the disk fails; then none of these pages is kept, and every other is as it was.
        """
        for key in keys:
            if key in self._pages:
                raise ValueError(f"the {key} is already held: pages never change.")
        self._settle()
        forgotten = self._make_room(len(keys))
        values = {"k": k, "v": v, "mean_k": mean_k, "mean_v": mean_v}
        if signature is not None:
            values["signature"] = signature
        fresh = torch.empty(len(keys), self._dram.row_bytes, dtype=torch.uint8)
        fresh[:, self.shape.used_bytes :] = 0
        records.pack(self.shape, fresh, **{name: value.detach() for name, value in values.items()})
        stored: list[PageKey] = []
        try:
            for index, (key, tokens) in enumerate(zip(keys, lengths.tolist(), strict=True)):
                row = self._row_for_new(stored, forgotten)
                if self._disk is not None:
                    self._seal.close(fresh[index].numpy().data, key, tokens)
                self._dram.row(row).copy_(fresh[index])
                self._pages[key] = self._dirty[key] = _Page(key, tokens, row)
                self._sequences.setdefault(key.sequence, {})[key] = None
                stored.append(key)
        except BaseException:
            for key in stored:
                self._forget(key)
            raise
        self._write_behind()
        return forgotten

    def prefetch(self, keys: Iterable[PageKey]) -> None:
        """Start reading those of the pages that lie on the SSD alone; keys that are not held are ignored.

        At most half of the host memory is filled so; the rest is read when asked for. Raises TierError when an
        earlier write has failed.
        """
        self._settle()
        pages = [
            self._pages[key]
            for key in dict.fromkeys(keys)
            if key in self._pages and key not in self._hot_rows
        ]
        wanted = [page for page in pages if page.row is None and page.reading is None]
        if self._dram.capacity is not None:
            under_way = sum(len(read.pages) for read in self._reads)
            wanted = wanted[: max(0, self._dram.capacity // 2 - under_way)]
        self._start_reading(wanted, loose=0)

    def get(self, keys: Sequence[PageKey]) -> tuple[Tensor, Tensor, Tensor]:
        """The pages `keys`, which may repeat.

        Returns:
            k, v [P, C, d] and lengths [P] int64 on the store's device. Raises KeyError for a page that is not held,
            TierError for one that is lost; the others remain.
        """
        self._settle()
        unique = list(dict.fromkeys(keys))
        pages = self._held(unique)
        begin, end = self.shape.fields["k"][0], self.shape.fields["v"][1]
        hot = [place for place, key in enumerate(unique) if key in self._hot_rows]
        cold = [place for place, key in enumerate(unique) if key not in self._hot_rows]
        found = torch.empty(len(unique), end - begin, dtype=torch.uint8, device=self._device)
        if hot:
            rows = [self._hot_rows[unique[place]] for place in hot]
            found[hot] = self._hot.read(rows, 0, end - begin)  # type: ignore[union-attr]
            for place in hot:
                self._hot_rows.move_to_end(unique[place])
            self._count.hbm_hits += len(hot)
        if cold:
            read = self._collect([pages[place] for place in cold], begin, end).to(
                self._device, non_blocking=True
            )
            if len(cold) == len(unique):
                found = read
            else:
                found[cold] = read
            self._keep_hot([unique[place] for place in cold], read)
        lengths = torch.tensor([page.tokens for page in pages], dtype=torch.int64, device=self._device)
        if len(unique) < len(keys):
            places = {key: place for place, key in enumerate(unique)}
            index = torch.tensor([places[key] for key in keys], device=self._device)
            found, lengths = found[index], lengths[index]
        # [P, 2 C d] bytes -> [P, 2, C, d]
        both = found.view(self.shape.dtype).unflatten(1, (2, self.shape.chunk_size, self.shape.head_dim))
        return both[:, 0], both[:, 1], lengths

    def read_all(self, keys: Sequence[PageKey]) -> dict[str, Tensor]:
        """Everything of different pages, in host memory: the arguments of :meth:`put` by name. Raises as `get`."""
        self._settle()
        whole = self._collect(self._held(keys), 0, self._dram.row_bytes)
        values = {name: records.field(self.shape, whole, name) for name in self.shape.fields}
        return values | {
            "lengths": torch.tensor([self._pages[key].tokens for key in keys], dtype=torch.int64)
        }

    def _held(self, keys: Sequence[PageKey]) -> list[_Page]:
        for key in keys:
            if key not in self._pages:
                raise KeyError(f"the {key} is not held: it was never put, or dropped or forgotten.")
        return [self._pages[key] for key in keys]

    def drop(self, sequence: int) -> None:
        """Give up all pages of a sequence, which has ended."""
        self._settle()
        for key in list(self._sequences.get(sequence, ())):
            self._forget(key)

    def __contains__(self, key: PageKey) -> bool:
        return key in self._pages

    def keys(self) -> list[PageKey]:
        """The pages held, oldest first."""
        return list(self._pages)

    def statistics(self) -> TierStatistics:
        """Of this moment, and of the time since :meth:`reset_statistics`."""
        ssd = self._disk.segments.used if self._disk else 0
        width = self._dram.row_bytes
        hot = self._hot.row_bytes if self._hot else 0
        return replace(
            self._count,
            pages=len(self._pages), hbm_pages=len(self._hot_rows), dram_pages=self._dram.used, ssd_pages=ssd,
            hbm_bytes=len(self._hot_rows) * hot, dram_bytes=self._dram.used * width, ssd_bytes=ssd * width,
        )  # fmt: skip

    def reset_statistics(self) -> None:
        """Count from zero."""
        self._count = TierStatistics()

    def close(self) -> None:
        """End the store: wait for its threads, keep nothing, in memory or on the disk. Again does nothing."""
        if self._disk is not None:
            self._disk.close()
        self._pages.clear()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def __enter__(self) -> TierStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- memory

    def _make_room(self, count: int) -> list[PageKey]:
        """Pages forgotten so that `count` more stay within the capacity."""
        capacity = self._capacity()
        forgotten: list[PageKey] = []
        if capacity is None:
            return forgotten
        if len(self._pages) + count > capacity and (not self._evicts or count > capacity):
            raise self._no_room()
        while len(self._pages) + count > capacity:
            forgotten.append(self._forget_oldest())
        return forgotten

    def _capacity(self) -> int | None:
        if self._disk is None:
            return self._dram.capacity
        if self._dram.capacity is None or self._disk.segments.limit is None:
            return None
        return max(self._dram.capacity, self._disk.segments.limit)

    def _row_for_new(self, stored: list[PageKey], forgotten: list[PageKey]) -> int:
        while True:
            row = self._row()
            if row is not None:
                return row
            if self._writes:
                self._wait_for_writes(1)
            elif self._reads:
                self._finish(self._reads[0])
            elif not self._start_writing():
                # the disk has no room left for what memory holds
                if not self._evicts or len(self._pages) == len(stored):
                    raise self._no_room()
                forgotten.append(self._forget_oldest())

    def _row(self) -> int | None:
        """A row of host memory, if need be that of the least recently used page which is on the disk as well."""
        row = self._dram.take()
        if row is None and self._clean:
            _, page = self._clean.popitem(last=False)
            row, page.row = page.row, None
            self._count.evictions += 1
        return row

    def _forget_oldest(self) -> PageKey:
        key = next(iter(self._pages))
        self._forget(key)
        self._count.forgotten += 1
        return key

    def _forget(self, key: PageKey) -> None:
        page = self._pages.pop(key)
        sequence = self._sequences[key.sequence]
        del sequence[key]
        if not sequence:
            del self._sequences[key.sequence]
        hot = self._hot_rows.pop(key, None)
        if hot is not None:
            self._hot.give_back(hot)  # type: ignore[union-attr]
        self._dirty.pop(key, None)
        self._clean.pop(key, None)
        page.dropped = True
        if not page.writing and page.reading is None:
            self._release(page)

    def _release(self, page: _Page) -> None:
        if page.row is not None:
            self._dram.give_back(page.row)
        if page.slot is not None:
            self._disk.segments.release([page.slot])  # type: ignore[union-attr]
        page.row = page.slot = None

    def _no_room(self) -> TierError:
        return TierError(f"no room for another page: {self._full}.")

    def _keep_hot(self, keys: list[PageKey], values: Tensor) -> None:
        if self._hot is None:
            return
        assert self._hot.capacity is not None
        keys, values = keys[-self._hot.capacity :], values[-self._hot.capacity :]
        rows = []
        for key in keys:
            row = self._hot.take()
            if row is None:
                _, row = self._hot_rows.popitem(last=False)
            self._hot_rows[key] = row
            rows.append(row)
        self._hot.write(rows, values)

    # -- writing

    def _write_behind(self) -> None:
        """Write the oldest pages while so few rows are free or clean that the next ones might have to wait."""
        if self._disk is None or self._dram.capacity is None:
            return
        batch = self._batch()
        reserve = min(2 * batch, self._dram.capacity // 2)
        under_way = sum(len(write.pages) for write in self._writes)
        ready = (self._dram.free or 0) + len(self._clean) + under_way
        while ready < reserve and self._dirty:
            started = self._start_writing()
            if not started:
                return
            ready += started

    def _batch(self) -> int:
        assert self._disk is not None and self._dram.capacity is not None
        return max(1, min(self._disk.write_pages, self._dram.capacity // 4))

    def _start_writing(self) -> int:
        """Start to write a batch of the oldest pages that are in memory alone; returns how many."""
        if self._disk is None or not self._dirty:
            return 0
        try:
            slots = self._disk.segments.allocate(min(self._batch(), len(self._dirty)))
        except OSError as error:
            raise TierError(f"the SSD tier cannot make a file ({error}): {self._full}.") from error
        if not slots:
            return 0
        moving = [self._dirty.popitem(last=False)[1] for _ in slots]
        for page in moving:
            page.writing = True
        rows = [self._dram.row(page.row) for page in moving]  # type: ignore[arg-type]
        self._writes.append(_Write(self._disk.write(rows, slots), moving, slots))
        return len(slots)

    def _wait_for_writes(self, count: int) -> None:
        begin = time.perf_counter()
        for write in list(self._writes)[:count]:
            write.done.exception()
        self._count.stall_seconds += time.perf_counter() - begin
        self._settle()

    def _settle(self) -> None:
        """Take note of the reads and writes that have ended. Raises TierError for a write that failed."""
        failure: BaseException | None = None
        while self._writes and self._writes[0].done.done():
            write = self._writes.popleft()
            error = write.done.exception()
            failure = failure or error
            if error is not None:
                self._disk.segments.release(write.slots)  # type: ignore[union-attr]
            else:
                self._count.written_bytes += len(write.slots) * self._dram.row_bytes
            for page, slot in zip(write.pages, write.slots, strict=True):
                page.writing = False
                if error is None:
                    page.slot = slot
                if page.dropped:
                    self._release(page)
                else:
                    (self._dirty if error is not None else self._clean)[page.key] = page
        for read in [read for read in self._reads if read.done.done()]:
            self._finish(read)
        if failure is not None:
            raise TierError(f"a page cannot be written ({failure}): {self._full}.") from failure

    # -- reading

    def _start_reading(self, wanted: list[_Page], loose: int) -> None:
        """Start to read pages from the disk, into rows of host memory and up to `loose` into memory of their own."""
        pages: list[_Page] = []
        into: list[Tensor] = []
        for page in wanted:
            page.row = self._row()
            if page.row is not None:
                into.append(self._dram.row(page.row))
            elif loose:
                into.append(torch.empty(self._dram.row_bytes, dtype=torch.uint8))
                loose -= 1
            else:
                break
            pages.append(page)
        if not pages:
            return
        slots = [page.slot for page in pages]
        for places, done in self._disk.read([page.key for page in pages], slots, into):  # type: ignore[union-attr, arg-type]
            read = _Read(done, [pages[place] for place in places], [into[place] for place in places])
            self._reads.append(read)
            for page in read.pages:
                page.reading = read

    def _finish(self, read: _Read) -> list[TierError | None]:
        """Wait for a read and note its end; returns per page what is wrong with it, if anything."""
        problems = read.done.result()
        self._reads.remove(read)
        self._count.read_bytes += len(read.pages) * self._dram.row_bytes
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

    def _collect(self, pages: list[_Page], begin: int, end: int) -> Tensor:
        """Bytes [begin, end) of the records of different pages, uint8 [P, bytes] in host memory."""
        present = [place for place, page in enumerate(pages) if page.in_memory]
        missing = [place for place, page in enumerate(pages) if not page.in_memory]
        self._count.dram_hits += len(present)
        self._count.misses += len(missing)
        found = self._dram.read([pages[place].row for place in present], begin, end)  # type: ignore[misc]
        for place in present:
            key = pages[place].key
            for order in (self._dirty, self._clean):
                if key in order:
                    order.move_to_end(key)
        if not missing:
            return found
        out = self._dram.empty(len(pages), end - begin)
        out[present] = found
        problem: TierError | None = None
        begun = time.perf_counter()
        while missing:
            idle = [pages[place] for place in missing if pages[place].reading is None]
            self._start_reading(idle, loose=self._disk.read_pages)  # type: ignore[union-attr]
            places = {pages[place]: place for place in missing if pages[place].reading is not None}
            for read in {id(page.reading): page.reading for page in places}.values():
                assert read is not None
                for page, into, wrong in zip(read.pages, read.into, self._finish(read), strict=True):
                    problem = problem or (wrong if page in places else None)
                    if page in places and wrong is None:
                        out[places[page]] = into[begin:end]
            done = set(places.values())
            missing = [place for place in missing if place not in done]
        self._count.stall_seconds += time.perf_counter() - begun
        if problem is not None:
            raise problem
        return out
