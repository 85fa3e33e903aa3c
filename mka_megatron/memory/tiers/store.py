"""The paged store of L3: hot pages on the device, a pool in host memory, files on an SSD.

Pages are put once, never change, and are read any number of times. One thread uses a store; the threads that read
and write its files work in the background.

Shapes: P pages, C chunk size, d head channels, W signature words.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mka_megatron.memory.tiers.dram import Pool
from mka_megatron.memory.tiers.pages import PageKey, PageShape, TierError, as_bytes, unpack
from mka_megatron.memory.tiers.paging import Paging
from mka_megatron.memory.tiers.ssd import Disk
from mka_megatron.memory.tiers.statistics import TierStatistics


class TierStore:
    """Pages of one rank, by key; `opening.open_store` makes one.

    Args:
        shape: of the pages.
        dram: rows of a whole record; without `disk` its capacity is the store's.
        disk: the SSD tier, None for none; then the store holds as much as the larger of the two.
        hot: rows of K and V on `device`; None: pages are copied there each time.
        device: where pages are wanted.
        when_full: "stop": refuse pages beyond the capacity; "evict": forget the oldest for them.
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
        when_full: Literal["stop", "evict"],
        full: str,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.shape = shape
        self._row_bytes = dram.row_bytes
        self._paging = Paging(dram, disk, TierStatistics(), full)
        self._hot, self._hot_rows = hot, OrderedDict[PageKey, int]()
        self._device = device
        self._evicts, self._full, self._on_close = when_full == "evict", full, on_close
        self._sequences: dict[int, dict[PageKey, None]] = {}

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
            k, v: [P, C, d] of the store's dtype, on any device.
            lengths: [P] int64 tokens of each.
            mean_k, mean_v: [P, d], the chunks' summaries.
            signature: [P, W]; None for pages without.

        Returns:
            The pages forgotten for them.

        Raises:
            ValueError: a key is held or given twice, or a tensor has another shape or type.
            TierError: there is no room, or the disk fails. Then none of these pages is held, and no page is
                damaged; under "evict" some may have been forgotten.
        """
        if len(set(keys)) < len(keys) or any(map(self.holds, keys)):
            twice = next(key for place, key in enumerate(keys) if self.holds(key) or key in keys[:place])
            raise ValueError(f"the {twice} is put twice: pages never change.")
        values = {"k": k, "v": v, "mean_k": mean_k, "mean_v": mean_v}
        fields = as_bytes(self.shape, values if signature is None else values | {"signature": signature})
        if {len(keys)} != {len(lengths), *(len(value) for _, _, value in fields)}:
            raise ValueError(f"{len(keys)} keys need as many rows of every tensor.")
        self._paging.settle()
        forgotten = self._make_room(len(keys))
        tokens, stored = lengths.tolist(), 0
        try:
            while stored < len(keys):
                new = [(begin, end, value[stored:]) for begin, end, value in fields]
                count = self._paging.hold(keys[stored:], tokens[stored:], new)
                for key in keys[stored : stored + count]:
                    self._sequences.setdefault(key.sequence, {})[key] = None
                stored += count
                if count == 0 and (not self._evicts or len(self._paging.pages) == stored):
                    raise self._no_room()
                if count == 0:
                    forgotten.append(self._forget_oldest())
            self._paging.write_behind()
        except BaseException:
            for key in keys[:stored]:
                self._forget(key)
            raise
        return forgotten

    def prefetch(self, keys: Iterable[PageKey]) -> None:
        """Start to read those of the pages that lie on the SSD alone; keys that are not held are ignored.

        At most half of the host memory is filled so, the rest is read when asked for. Raises TierError when an
        earlier write has failed.
        """
        self._paging.settle()
        self._paging.prefetch(
            [key for key in dict.fromkeys(keys) if self.holds(key) and key not in self._hot_rows]
        )

    def get(self, keys: Sequence[PageKey]) -> tuple[Tensor, Tensor, Tensor]:
        """The pages `keys`, which may repeat.

        Returns:
            k, v [P, C, d] and lengths [P] int64 on the store's device.

        Raises:
            KeyError: a page is not held.
            TierError: a page is lost, or an earlier write has failed; the others are still held.
        """
        self._paging.settle()
        unique = list(dict.fromkeys(keys))
        self._check_held(unique)
        begin, end = self.shape.fields["k"][0], self.shape.fields["v"][1]
        hot = [place for place, key in enumerate(unique) if key in self._hot_rows]
        cold = [place for place, key in enumerate(unique) if key not in self._hot_rows]
        absent = [unique[place] for place in cold]
        found = self._paging.read(absent, begin, end).to(self._device, non_blocking=True)
        if hot and self._hot is not None:
            read, found = found, torch.empty(len(unique), end - begin, dtype=torch.uint8, device=self._device)
            found[cold] = read
            found[hot] = self._hot.read([self._hot_rows[unique[place]] for place in hot])
            for place in hot:
                self._hot_rows.move_to_end(unique[place])
            self._paging.count.hbm_hits += len(hot)
            self._keep_hot(absent, read)
        else:
            self._keep_hot(absent, found)
        tokens = [self._paging.pages[key].tokens for key in keys]
        if len(unique) < len(keys):
            places = {key: place for place, key in enumerate(unique)}
            found = found[torch.tensor([places[key] for key in keys], device=self._device)]
        # [P, 2 C d] bytes -> [P, 2, C, d]
        both = found.view(self.shape.dtype).unflatten(1, (2, self.shape.chunk_size, self.shape.head_dim))
        return both[:, 0], both[:, 1], torch.tensor(tokens, dtype=torch.int64, device=self._device)

    def read_all(self, keys: Sequence[PageKey]) -> dict[str, Tensor]:
        """Everything of different pages, in host memory: the arguments of :meth:`put` by name. Raises as `get`."""
        self._paging.settle()
        self._check_held(keys)
        values = unpack(self.shape, self._paging.read(keys, 0, self._row_bytes))
        tokens = [self._paging.pages[key].tokens for key in keys]
        return values | {"lengths": torch.tensor(tokens, dtype=torch.int64)}

    def drop(self, sequence: int) -> None:
        """Give up all pages of a sequence, which has ended. Raises TierError when an earlier write has failed."""
        for key in list(self._sequences.get(sequence, ())):
            self._forget(key)
        self._paging.settle()

    def holds(self, key: PageKey) -> bool:
        """Whether the page can be asked for."""
        return key in self._paging.pages

    def keys(self) -> list[PageKey]:
        """The pages held, oldest first."""
        return list(self._paging.pages)

    def statistics(self) -> TierStatistics:
        """Of this moment, and of the time since :meth:`reset_statistics`."""
        dram, ssd, hbm = self._paging.dram_pages, self._paging.disk_pages, len(self._hot_rows)
        return replace(
            self._paging.count,
            pages=len(self._paging.pages), hbm_pages=hbm, dram_pages=dram, ssd_pages=ssd,
            hbm_bytes=hbm * (self._hot.row_bytes if self._hot else 0),
            dram_bytes=dram * self._row_bytes, ssd_bytes=ssd * self._row_bytes,
        )  # fmt: skip

    def reset_statistics(self) -> None:
        """Count from zero."""
        for each in fields_of(TierStatistics):
            setattr(self._paging.count, each.name, each.default)

    def close(self) -> None:
        """End the store: wait for its threads, keep nothing, in memory or on the disk. Again does nothing."""
        self._paging.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()

    def __enter__(self) -> TierStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_held(self, keys: Sequence[PageKey]) -> None:
        for key in keys:
            if not self.holds(key):
                raise KeyError(f"the {key} is not held: it was never put, or dropped or forgotten.")

    def _make_room(self, count: int) -> list[PageKey]:
        """Pages forgotten so that `count` more stay within the capacity."""
        capacity, held = self._paging.capacity, len(self._paging.pages)
        if capacity is None or held + count <= capacity:
            return []
        if not self._evicts or count > capacity:
            raise self._no_room()
        return [self._forget_oldest() for _ in range(held + count - capacity)]

    def _no_room(self) -> TierError:
        return TierError(f"no room for another page: {self._full}.")

    def _forget_oldest(self) -> PageKey:
        key = next(iter(self._paging.pages))
        self._forget(key)
        self._paging.count.forgotten += 1
        return key

    def _forget(self, key: PageKey) -> None:
        self._paging.forget(key)
        sequence = self._sequences[key.sequence]
        del sequence[key]
        if not sequence:
            del self._sequences[key.sequence]
        row = self._hot_rows.pop(key, None)
        if row is not None and self._hot is not None:
            self._hot.give_back(row)

    def _keep_hot(self, keys: list[PageKey], values: Tensor) -> None:
        """Copies of pages just read stay on the device, instead of those used least recently."""
        if self._hot is None or self._hot.capacity is None or not keys:
            return
        keys, values = keys[-self._hot.capacity :], values[-self._hot.capacity :]
        rows = []
        for key in keys:
            row = self._hot.take()
            if row is None:
                _, row = self._hot_rows.popitem(last=False)
            self._hot_rows[key] = row
            rows.append(row)
        self._hot.write(rows, values)
