"""Random pages, and stores for them whose budgets are given in pages and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mka_megatron.config.schema import L3Config, MemoryConfig
from mka_megatron.memory.tiers import ssd
from mka_megatron.memory.tiers.opening import open_store
from mka_megatron.memory.tiers.pages import PageKey, PageShape
from mka_megatron.memory.tiers.store import TierStore

CPU = torch.device("cpu")
SMALL = PageShape(chunk_size=8, head_dim=6, dtype=torch.float32, signature_words=2)
RECORD = SMALL.record_bytes(4096)
IO_BUFFERS = ssd.READERS
"""Of one page each, when host memory is this small."""
GIB = 1 << 30


def store(
    directory: Path | None, rows: int | None, slots: int | None = None, *, shape: PageShape = SMALL, run: str = "run",
    rank: int = 0, when_full: str = "stop", backend: str = "plain",
) -> TierStore:  # fmt: skip
    """A store with `rows` pages of host memory and, in `directory` unless it is None, `slots` pages of disk."""
    record = shape.record_bytes(64 if directory is None else 4096)
    buffers = 0 if directory is None else IO_BUFFERS
    l3 = L3Config(
        enabled=True,
        placement="dram" if directory is None else "ssd",
        # half a page more, against the rounding of GiB to bytes
        dram_pool_gib=None if rows is None else (rows + buffers + 0.5) * record / GIB,
        ssd_pool_gib=None if slots is None else (slots + 0.5) * record / GIB,
        when_full=when_full,  # type: ignore[arg-type]
    )
    memory = MemoryConfig(l3=l3, ssd_spill_path=None if directory is None else str(directory))
    return open_store(memory, shape, run, rank, CPU, backend)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Content:
    """Pages by the arguments of `TierStore.put`."""

    keys: list[PageKey]
    k: Tensor
    v: Tensor
    lengths: Tensor
    mean_k: Tensor
    mean_v: Tensor
    signature: Tensor | None

    def put_into(self, pages: TierStore) -> list[PageKey]:
        """Put them all at once."""
        return pages.put(self.keys, self.k, self.v, self.lengths, self.mean_k, self.mean_v, self.signature)

    def part(self, *places: int) -> Content:
        """Some of them."""
        at = list(places)
        signature = None if self.signature is None else self.signature[at]
        return Content(
            [self.keys[place] for place in at], self.k[at], self.v[at], self.lengths[at], self.mean_k[at],
            self.mean_v[at], signature,
        )  # fmt: skip

    def same(self, pages: TierStore, keys: list[PageKey]) -> None:
        """Assert that the store returns `keys`, some of these, bit for bit."""
        at = [self.keys.index(key) for key in keys]
        k, v, lengths = pages.get(keys)
        assert bits(k).equal(bits(self.k[at])) and bits(v).equal(bits(self.v[at]))
        assert lengths.equal(self.lengths[at])


def bits(x: Tensor) -> Tensor:
    """Compare these, not numbers: NaN is never equal, -0 equals 0."""
    return x.contiguous().view(torch.uint8)


def content(count: int, seed: int = 0, *, shape: PageShape = SMALL, sequence: int = 1, generation: int = 0) -> Content:
    """Pages with random bits, NaN and infinities among them, of one sequence."""
    generator = torch.Generator().manual_seed(seed)

    def values(*dims: int) -> Tensor:
        raw = torch.randint(0, 256, (count, *dims, shape.dtype.itemsize), generator=generator, dtype=torch.uint8)
        return raw.view(shape.dtype).squeeze(-1)

    signature = None
    if shape.signature_words:
        dims = (count, shape.signature_words, shape.signature_dtype.itemsize)
        raw = torch.randint(0, 256, dims, generator=generator, dtype=torch.uint8)
        signature = raw.view(shape.signature_dtype).squeeze(-1)
    return Content(
        [PageKey(generation, sequence, number % 3, number % 2, number) for number in range(count)],
        values(shape.chunk_size, shape.head_dim), values(shape.chunk_size, shape.head_dim),
        torch.randint(1, shape.chunk_size + 1, (count,), generator=generator),
        values(shape.head_dim), values(shape.head_dim), signature,
    )  # fmt: skip
