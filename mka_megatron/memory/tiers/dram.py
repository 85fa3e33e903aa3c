"""Rows of bytes on a device or in host memory, handed out one by one: the memory of the upper tiers."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

_SLAB_BYTES = 16 << 20


class Pool:
    """Up to `capacity` rows of `row_bytes` bytes, allocated in slabs when first needed and never given back.

    capacity None: as many as memory allows. pin: page-locked host memory, from which a GPU copies by itself.
    """

    def __init__(self, row_bytes: int, capacity: int | None, device: torch.device, pin: bool = False) -> None:
        self.row_bytes = row_bytes
        self.capacity = capacity
        self._device, self._pin = device, pin
        self._per_slab = max(1, _SLAB_BYTES // row_bytes)
        if capacity is not None:
            self._per_slab = max(1, min(self._per_slab, capacity))
        self._slabs: list[Tensor] = []
        self._returned: list[int] = []
        self._fresh = 0

    @property
    def used(self) -> int:
        """Rows handed out."""
        return self._fresh - len(self._returned)

    @property
    def free(self) -> int | None:
        """Rows that can still be handed out; None: no limit."""
        return None if self.capacity is None else self.capacity - self.used

    def take(self) -> int | None:
        """A row's number, contents undefined; None when all are handed out."""
        if self._returned:
            return self._returned.pop()
        if self._fresh == self.capacity:
            return None
        if self._fresh == len(self._slabs) * self._per_slab:
            self._slabs.append(self.empty(self._per_slab, self.row_bytes))
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, row: int) -> None:
        """`row` may be handed out again."""
        self._returned.append(row)

    def row(self, row: int) -> Tensor:
        """uint8 [row_bytes], the row itself."""
        slab, index = divmod(row, self._per_slab)
        return self._slabs[slab][index]

    def empty(self, rows: int, width: int) -> Tensor:
        """uint8 [rows, width] outside the pool, in memory of the same kind."""
        return torch.empty(rows, width, dtype=torch.uint8, device=self._device, pin_memory=self._pin)

    def read(self, rows: list[int], begin: int, end: int) -> Tensor:
        """A copy of bytes [begin, end) of `rows`, uint8 [rows, end - begin], on the pool's device."""
        out = self.empty(len(rows), end - begin)
        for slab, index, places in self._by_slab(rows):
            if len(places) == len(rows):
                torch.index_select(slab[:, begin:end], 0, index, out=out)
            else:
                out[places] = slab[:, begin:end].index_select(0, index)
        return out

    def write(self, rows: list[int], values: Tensor) -> None:
        """Copy `values`, uint8 [rows, bytes] on the pool's device, to the head of `rows`."""
        for slab, index, places in self._by_slab(rows):
            part = values if len(places) == len(rows) else values[places]
            slab[:, : values.shape[1]].index_copy_(0, index, part)

    def _by_slab(self, rows: list[int]) -> list[tuple[Tensor, Tensor, list[int]]]:
        order = sorted(range(len(rows)), key=lambda place: rows[place] // self._per_slab)
        found = []
        for slab, group in groupby(order, key=lambda place: rows[place] // self._per_slab):
            places = list(group)
            index = torch.tensor([rows[place] % self._per_slab for place in places], device=self._device)
            found.append((self._slabs[slab], index, places))
        return found
