"""What the model is fed: token ids, next-token labels and document boundaries.

Legend: B batch (rows), S sequence (slots of a row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.memory.documents import Documents

IGNORE = -100
"""Label of a slot without a loss."""


class DataError(ConfigError):
    """A data source, tokenizer or cache that cannot be used; the message is one sentence with the fix."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: Tensor
    """[B,S] int64 token ids; 0 in padding slots."""
    labels: Tensor
    """[B,S] int64: the next token of the same document, IGNORE where there is no loss."""
    documents: Documents
    """Where documents begin and which slots are padding."""

    def part(self, begin: int, end: int) -> Batch:
        """The slots [begin, end) of every row; raises ValueError where they are not there."""
        documents = self.documents.part(begin, end)
        return Batch(self.tokens[:, begin:end], self.labels[:, begin:end], documents)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.documents.to(device, non_blocking),
        )
