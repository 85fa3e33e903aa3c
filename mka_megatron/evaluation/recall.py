"""How well hashed selection finds the chunks that exact products would recall.

Shapes: B batch, S slots, n chunks, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector, planes, recall_at, recent


@dataclass(frozen=True)
class LayerInputs:
    """What one layer selects by."""

    q: Tensor
    """[B, S, H, d] queries after q-norm, before RoPE."""
    k: Tensor
    """[B, S, G, d] keys after k-norm, before RoPE."""
    key_bias: Tensor | None
    """[G, d] that all keys share."""


def hash_recall(
    layers: list[LayerInputs],
    documents: Documents,
    chunks: Chunks,
    *,
    window_chunks: int,
    recalled: int,
    candidates: int,
    codes: Sequence[tuple[int, int]],
    seed: int,
) -> list[float]:
    """Share of the `recalled` chunks that exact products choose which the hash chooses too, for each of the `codes`.

    Over all layers, KV heads and those query chunks that choose among at least `candidates` chunks of their document.
    A code is (bits, tables), its planes drawn from `seed`. Raises ValueError where no chunk has so many candidates.
    """
    # chunks of the own document before the window; documents begin on chunk boundaries
    earlier = chunks.at_hand(chunks.first_positions) // chunks.size + 1 - window_chunks
    asked = (earlier >= candidates) & (chunks.at_hand(chunks.documents) >= 0)
    if not bool(asked.any()):
        raise ValueError(f"no chunk has {candidates} candidates: give longer documents.")

    def chosen(layer: LayerInputs, selector: Selector) -> Tensor:
        queries = recent(selector.queries(layer.q, layer.k.shape[2]), None, documents, chunks)
        return selector.select(queries, selector.signature(layer.k, chunks), chunks, window_chunks)[asked]

    wanted = torch.cat([chosen(layer, Selector("exact", recalled, None, layer.key_bias)) for layer in layers])
    recalls = []
    for bits, tables in codes:
        drawn = planes(seed, tables, bits, layers[0].k.shape[-1])
        found = [chosen(layer, Selector("hash", recalled, drawn, layer.key_bias)) for layer in layers]
        recalls.append(recall_at(torch.cat(found), wanted))
    return recalls
