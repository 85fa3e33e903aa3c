"""Context parallelism's recall without data: which chunks travel is fixed, the most that can.

Every chunk recalls R chunks that no other chunk of its rank recalls, the nearest before the halo, so a rank asks for
min(all earlier chunks, chunks at hand * R) of every KV head: no selection asks for more.

Shapes: B batch, G KV heads, C chunk size, n chunks at hand, R recalled chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mka_megatron.config.schema import Config
from mka_megatron.config.variants import needs_chunks
from mka_megatron.dry_run.tensors import Absent
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Pages
from mka_megatron.parallel.context import RankHistory, RankView
from mka_megatron.parallel.exchange import Traffic
from mka_megatron.parallel.groups import Topology


@dataclass(frozen=True)
class FullView(RankView):
    """A rank's view of rows of one document each, of which the most is recalled."""

    window: int
    """Chunks."""
    recalled: int
    """R."""
    absent: Absent

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """As RankView's, for the fixed selection in place of `recalled` [B, n, G, R]."""
        batch, chunks, groups, count = recalled.shape
        begin, end = wanted(self._table.first, chunks, count, self.window)
        with self.absent.real():
            numbers = torch.arange(end - 1, end - 1 - chunks * count, -1)
            numbers = numbers.masked_fill(numbers < begin, -1).view(1, chunks, 1, count)
            return super().pages(numbers.expand(batch, chunks, groups, count), halo, k, v)

    def _ask(self, wants: Tensor) -> tuple[Tensor, Tensor]:
        asked, answered = super()._ask(wants)
        table = self._table
        answered = torch.zeros_like(answered)
        for other in range(self.group.rank() + 1, self.group.size()):
            begin, end = wanted(other * table.count, table.count, self.recalled, self.window)
            answered[other, ..., max(0, begin - table.first) : max(0, end - table.first)] = True
        return asked, answered


def wanted(first: int, chunks: int, recalled: int, window: int) -> tuple[int, int]:
    """[begin, end) of the chunks that the rank asks for whose chunks at hand are [first, first + chunks)."""
    end = first - min(window - 1, first)
    return max(0, end - chunks * recalled), end


@dataclass(frozen=True)
class FullHistory(RankHistory):
    """The views of all layers."""

    window: int
    recalled: int
    absent: Absent

    def view(self, layer: int) -> FullView:
        """The view of `layer`, counted from 0."""
        return FullView(
            self.group, self.documents, self.chunks, self.traffic[layer], self.window, self.recalled, self.absent
        )


def recall_most(model: nn.Module, config: Config, topology: Topology, absent: Absent) -> None:
    """Have every forward of `model` see the other ranks' shards through a :class:`FullHistory`."""
    if topology.cp_size == 1:
        return
    levels = config.memory_hierarchy
    size = levels.l1.chunk_size
    window = (levels.l1.window or config.data.sequence_length) // size
    traffic: Sequence[Traffic] = [Traffic() for _ in range(config.model.num_layers)]
    group: dist.ProcessGroup = topology.cp_group

    def add_history(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        documents: Documents = arguments[1]
        chunks = Chunks.of(documents, size) if needs_chunks(config) else None
        history = FullHistory(group, documents, chunks, traffic, window, levels.l3.recalled_chunks, absent)
        return arguments, {**keywords, "history": history}

    model.register_forward_pre_hook(add_history, with_kwargs=True)
