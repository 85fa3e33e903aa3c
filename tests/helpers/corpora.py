"""Small corpora on disk, written with Megatron's own builder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

STRIDE = 10_000


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.int32) -> str:
    """`prefix`.bin/.idx, one sequence and one document each; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents whose ids say where they come from: token p of document d is (d + 1) * STRIDE + p."""
    return [[(d + 1) * STRIDE + p for p in range(length)] for d, length in enumerate(lengths)]
