"""Random arguments of the block core, over rows that are written down chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mka_megatron.ops.block_attention import block_attention
from tests.helpers import block_oracle
from tests.helpers.block_oracle import Pages, Table


@dataclass
class Case:
    """Random arguments of the block core."""

    table: Table
    q: Tensor
    k: Tensor
    v: Tensor
    summaries: tuple[Tensor, Tensor] | None
    pages: Pages | None
    bias: Tensor | None
    window: int

    @property
    def tensors(self) -> list[Tensor]:
        pages = [] if self.pages is None or not self.pages.k.numel() else [self.pages.k, self.pages.v]
        found = [self.q, self.k, self.v, *(self.summaries or ()), *pages, self.bias]
        return [x for x in found if x is not None]

    @property
    def arguments(self) -> tuple:
        return self.q, self.k, self.v, self.summaries, self.pages, self.bias

    def run(self, backend: str = "reference") -> Tensor:
        return block_attention(
            *self.arguments,
            chunks=self.table,
            window=self.window,
            scale=self.q.shape[-1] ** -0.5,
            backend=backend,
        )

    def oracle(self) -> Tensor:
        return block_oracle.attention(*self.arguments, self.table, self.window, self.q.shape[-1] ** -0.5)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same numbers in `dtype`, as new leaves; the bias in fp32 at least."""

        def leaf(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return x.detach().to(device, dtype).requires_grad_()

        wide = dtype if dtype == torch.float64 else torch.float32
        pages, table = self.pages, self.table
        if pages is not None:
            pages = replace(pages, lengths=pages.lengths.to(device), index=pages.index.to(device))
        return replace(
            self,
            table=replace(table, lengths=table.lengths.to(device), documents=table.documents.to(device)),
            q=leaf(self.q),
            k=leaf(self.k),
            v=leaf(self.v),
            summaries=None if self.summaries is None else (leaf(self.summaries[0]), leaf(self.summaries[1])),
            pages=None if pages is None else replace(pages, k=leaf(pages.k), v=leaf(pages.v)),
            bias=None if self.bias is None else leaf(self.bias, wide),
        )


def make_case(
    size: int,
    rows: Sequence[Sequence[tuple[int, int]]],
    *,
    window: int = 2,
    first: int = 0,
    missing: int = 0,
    heads: tuple[int, int] = (4, 2),
    channels: int = 16,
    recalled: int = 2,
    summaries: bool = True,
    bias: str = "groups",
    seed: int = 0,
) -> Case:
    """Arguments in fp64.

    size: C. rows: as block_oracle.Table.of takes them. window: in chunks. first: of the chunks at hand. missing: slots
    that the row ends before its last chunk does. heads: of queries and of keys. bias: "none", "shared" or "groups".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    table = Table.of(size, rows, first)
    (batch, number), (query_heads, groups) = table.lengths.shape, heads
    slots, halo = table.count * size - missing, min(window - 1, first)
    biases = {"none": None, "shared": (batch, slots, 1, 3), "groups": (batch, slots, groups, 3)}[bias]
    return Case(
        table=table,
        q=normal(batch, slots, query_heads, channels),
        k=normal(batch, halo * size + slots, groups, channels),
        v=normal(batch, halo * size + slots, groups, channels),
        summaries=tuple(normal(batch, number, groups, channels) for _ in range(2)) if summaries else None,
        pages=recall(table, window, groups, channels, recalled, generator) if recalled else None,
        bias=None if biases is None else normal(*biases),
        window=window * size,
    )


def recall(
    table: Table, window: int, groups: int, channels: int, recalled: int, generator: torch.Generator
) -> Pages:
    """Random chunks out of those that may be recalled; those that are neither at hand nor in the halo are pages."""
    batch = len(table.lengths)
    halo = min(window - 1, table.first)
    stored = max(table.first - halo, 0)
    index = torch.full((batch, table.count, groups, recalled), -1)
    for row in range(batch):
        for here in range(table.count):
            for group in range(groups):
                chunk = table.first + here
                document = table.documents[row, chunk]
                old = [
                    c
                    for c in range(chunk - window + 1)
                    if document >= 0 and table.documents[row, c] == document
                ]
                picked = torch.randperm(len(old), generator=generator)[:recalled].sort().values
                places = [old[p] - table.first + halo for p in picked]
                # pages lie behind those at hand, here in descending order
                places = [p if p >= 0 else halo + table.count - 1 - p for p in places]
                index[row, here, group, : len(places)] = torch.tensor(places, dtype=torch.int64)
    order = list(range(stored))[::-1]
    k, v = (
        torch.randn(
            batch, groups, stored, table.size, channels, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for _ in range(2)
    )
    lengths = table.lengths[:, order][:, None].expand(batch, groups, stored).contiguous()
    return Pages(k, v, lengths, index)
