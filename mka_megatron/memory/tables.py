"""Tables of chunks that grow in place. Shapes: B rows, N chunks, G KV heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.memory.rows import Joining


@dataclass
class Table:
    """[B, N, G, ...] of one layer's chunks. A head's entries lie one behind the other, as attention reads them."""

    storage: Tensor
    """[B, G, >= N, ...]."""
    count: int
    """N."""

    @staticmethod
    def of(x: Tensor) -> Table:
        """A copy of x [B, N, G, ...]."""
        return Table(headed(x), x.shape[1])

    @property
    def rows(self) -> Tensor:
        """[B, N, G, ...], not a copy."""
        return self.storage[:, :, : self.count].transpose(1, 2)

    def join(self, new: Tensor, joining: Joining) -> None:
        """Put the chunks at hand [B, n, G, ...] that `joining` adds behind those known."""
        if joining.index is not None:
            both = joining.joined(self.rows, new)
            self.storage, self.count = headed(both), both.shape[1]
            return
        end = self.count + joining.added[0]
        if self.storage.shape[2] < end:
            # a fourth more than is needed, so that growing stays rare
            shape = (*self.storage.shape[:2], end + end // 4 + 4, *self.storage.shape[3:])
            larger = self.storage.new_zeros(shape)
            larger[:, :, : self.count] = self.storage[:, :, : self.count]
            self.storage = larger
        self.storage[:, :, self.count : end] = new[:, : joining.added[0]].transpose(1, 2)
        self.count = end


def headed(x: Tensor) -> Tensor:
    """A copy of x [B, N, G, ...] as contiguous [B, G, N, ...]."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)
