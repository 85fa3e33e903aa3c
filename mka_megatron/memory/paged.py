"""Recalled chunks out of a page store, as a view gives them.

Shapes: B batch, G KV heads, d head channels, C chunk size, n chunks at hand, R recalled chunks, M pages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mka_megatron.memory.tiers.pages import PageKey
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Pages

Key = Callable[[int, int, int], PageKey]
"""(row, KV head of this rank, number of the chunk in the row) -> its page."""


def stored_pages(store: TierStore, key: Key, recalled: Tensor, end: int) -> list[tuple[int, int, int, int]]:
    """(row, KV head, number among that head's, chunk) of the chunks `recalled` [B, n, G, R] before `end`, those from
    which on lie in the halo or at hand, as far as the store holds them."""
    numbers = recalled.cpu()
    batch, _, groups, _ = numbers.shape

    def stored(row: int, head: int) -> list[int]:
        chunks = [chunk for chunk in numbers[row, :, head].unique().tolist() if 0 <= chunk < end]
        return [chunk for chunk in chunks if store.holds(key(row, head, chunk))]

    return [
        (row, head, page, chunk) for row in range(batch) for head in range(groups)
        for page, chunk in enumerate(stored(row, head))
    ]  # fmt: skip


def read_pages(
    store: TierStore, key: Key, recalled: Tensor, k: Tensor, *, known: int, halo: int, size: int
) -> Pages:
    """The chunks `recalled` that lie before the halo.

    Args:
        recalled: [B, n, G, R] int64 numbers in the row, -1 = none.
        k: [B, S, G, d] keys at hand, for their shape, dtype and device.
        known: chunks before those at hand. halo: the last ones of them, which are held. size: C.

    Returns:
        the pages; a chunk whose page the store has forgotten is recalled as none.
    """
    batch, _, groups, channels = k.shape
    numbers = recalled.cpu()
    at_hand = recalled.shape[1]
    held = known - halo
    where = stored_pages(store, key, numbers, held)
    most = 1 + max((page for _, _, page, _ in where), default=-1)
    lengths = numbers.new_zeros(batch, groups, most)
    paged_k = k.new_zeros(batch, groups, most, size, channels)
    paged_v = torch.zeros_like(paged_k)
    # chunk number -> place among (halo, chunks at hand, pages)
    places = numbers.new_full((batch, groups, known + at_hand), -1)
    places[:, :, held:] = torch.arange(halo + at_hand)
    if where:
        rows, heads, pages, chunks = (list(each) for each in zip(*where, strict=True))
        read = store.get([key(row, head, chunk) for row, head, _, chunk in where])
        paged_k[rows, heads, pages], paged_v[rows, heads, pages] = read[0], read[1]
        lengths[rows, heads, pages] = read[2].cpu()
        places[rows, heads, chunks] = torch.tensor(pages) + halo + at_hand
    # [B, n, G, R]
    row, head = torch.arange(batch)[:, None, None, None], torch.arange(groups)[:, None]
    index = places[row, head, numbers.clamp_min(0)].masked_fill(numbers < 0, -1)
    return Pages(paged_k, paged_v, lengths.to(k.device), index.to(k.device))
