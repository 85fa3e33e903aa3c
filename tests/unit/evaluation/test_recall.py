"""Recall of the hash against exact selection, from a plain count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mka_megatron.evaluation.recall import LayerInputs, hash_recall
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import planes

SIZE, WINDOW, RECALLED, CANDIDATES = 4, 2, 3, 10


def layers(seed: int, slots: int) -> list[LayerInputs]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    bias = draw(2, 16)
    return [LayerInputs(draw(2, slots, 4, 16), bias + draw(2, slots, 2, 16), bias) for _ in range(2)]


def counted(layer: LayerInputs, bits: int, seed: int) -> tuple[int, int]:
    """(chunks that the hash found, chunks that exact products choose), one document per row."""
    hits = total = 0
    drawn = planes(seed, 1, bits, 16)[0].double().numpy()
    for row in range(2):
        for group in range(2):
            keys = (layer.k[row, :, group] - layer.key_bias[group]).double().numpy().reshape(-1, SIZE, 16).mean(1)
            heads = layer.q[row, :, 2 * group : 2 * group + 2].double().numpy().sum(1)
            for chunk in range(CANDIDATES + WINDOW - 1, len(keys)):
                query = heads[max(0, chunk * SIZE - 16) : chunk * SIZE].sum(0)
                among = keys[: chunk - WINDOW + 1]
                wanted = np.argsort(-(among @ query), kind="stable")[:RECALLED]
                distance = ((among @ drawn.T >= 0) != (drawn @ query >= 0)).sum(1)
                found = np.argsort(distance, kind="stable")[:RECALLED]
                hits += len(set(wanted) & set(found))
                total += RECALLED
    return hits, total


def measured(inputs: list[LayerInputs], documents: Documents, *bits: int) -> list[float]:
    return hash_recall(
        inputs, documents, Chunks.of(documents, SIZE), window_chunks=WINDOW, recalled=RECALLED, candidates=CANDIDATES,
        codes=[(each, 1) for each in bits], seed=5,
    )  # fmt: skip


def test_equals_a_plain_count_over_layers_rows_and_heads() -> None:
    inputs = layers(0, 20 * SIZE)
    expected = []
    for bits in (64, 256):
        counts = [counted(layer, bits, 5) for layer in inputs]
        expected.append(sum(hits for hits, _ in counts) / sum(total for _, total in counts))
    assert measured(inputs, Documents.unpacked(2, 20 * SIZE), 64, 256) == expected
    assert RECALLED / CANDIDATES < expected[0] < expected[1] < 1


def test_longer_codes_find_more() -> None:
    inputs, documents = layers(1, 40 * SIZE), Documents.unpacked(2, 40 * SIZE)
    short, long, longest = measured(inputs, documents, 64, 512, 4096)
    assert short < long < longest


def test_candidates_are_of_the_own_document() -> None:
    starts = torch.zeros(2, 22 * SIZE, dtype=torch.bool)
    starts[:, [0, 11 * SIZE]] = True
    with pytest.raises(ValueError, match="no chunk has 10 candidates"):
        measured(layers(2, 22 * SIZE), Documents.from_starts(starts), 64)
    assert 0 < measured(layers(2, 22 * SIZE), Documents.unpacked(2, 22 * SIZE), 64)[0] < 1
