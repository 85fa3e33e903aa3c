"""Rows of bytes on a device or in host memory, handed out one by one: the memory of the upper tiers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

_SLAB_BYTES = 16 << 20
_PAGE_BYTES = 4096


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
        self._arrays: list[np.ndarray] = []
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
            # direct I/O asks for rows that begin on a memory page, if their size lets them
            memory = self.empty(1, self._per_slab * self.row_bytes + _PAGE_BYTES)[0]
            begin = -memory.data_ptr() % _PAGE_BYTES
            slab = memory[begin : begin + self._per_slab * self.row_bytes].view(
                self._per_slab, self.row_bytes
            )
            self._slabs.append(slab)
            if self._device.type == "cpu":
                self._arrays.append(slab.numpy())
        self._fresh += 1
        return self._fresh - 1

    def give_back(self, row: int) -> None:
        """`row` may be handed out again."""
        self._returned.append(row)

    def runs(self, rows: list[int], longest: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """`rows` as uint8 [n, row_bytes], the rows themselves, consecutive ones together, up to `longest`, each with
        which of `rows` they are; host memory only."""
        begin = 0
        while begin < len(rows):
            slab, index = divmod(rows[begin], self._per_slab)
            most = min(len(rows) - begin, self._per_slab - index, longest or len(rows))
            count = 1
            while count < most and rows[begin + count] == rows[begin] + count:
                count += 1
            yield slice(begin, begin + count), self._arrays[slab][index : index + count]
            begin += count

    def row(self, row: int) -> np.ndarray:
        """uint8 [row_bytes], the row itself; host memory only."""
        slab, index = divmod(row, self._per_slab)
        return self._arrays[slab][index]

    def empty(self, rows: int, width: int) -> Tensor:
        """uint8 [rows, width] outside the pool, in memory of the same kind."""
        return torch.empty(rows, width, dtype=torch.uint8, device=self._device, pin_memory=self._pin)

    def read(self, rows: list[int]) -> Tensor:
        """A copy of `rows`, uint8 [rows, row_bytes] on the pool's device."""
        out = self.empty(len(rows), self.row_bytes)
        for slab, index, places in self._by_slab(rows):
            out[places] = slab.index_select(0, index)
        return out

    def write(self, rows: list[int], values: Tensor) -> None:
        """Copy `values`, uint8 [rows, row_bytes] on the pool's device, to `rows`."""
        for slab, index, places in self._by_slab(rows):
            slab.index_copy_(0, index, values[places])

    def _by_slab(self, rows: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        order = sorted(range(len(rows)), key=lambda place: rows[place] // self._per_slab)
        found = []
        for slab, group in groupby(order, key=lambda place: rows[place] // self._per_slab):
            places = list(group)
            index = [rows[place] % self._per_slab for place in places]
            both = torch.tensor([index, places], device=self._device)
            found.append((self._slabs[slab], both[0], both[1]))
        return found
