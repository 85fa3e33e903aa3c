"""Where the tensor-parallel shard of a parameter lies among shards of another tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterator

from mka_megatron.model.hf_table import Entry


def regions(new: Entry, new_ranks: int, rank: int, old: Entry, old_ranks: int) -> Iterator[tuple[int, int, int]]:
    """What the shard of `rank` consists of along the entry's `dim`, in order.

    Args:
        new, new_ranks: the parameter where each of `new_ranks` ranks holds a shard.
        rank: one of these.
        old, old_ranks: the same parameter as it was shared before. Both entries come from tables whose vocabulary is
            the padded one: padding has no source and would be left out.

    Yields:
        (old rank, start in its shard, length).
    """
    size = new.shard(new_ranks)[new.dim]
    width = old.shard(old_ranks)[old.dim]
    for run in new.cut(rank * size if new.split else 0, size):
        for start, length in _locate(old, run.source, run.start, run.length):
            end = start + length
            while start < end:
                holder, offset = divmod(start, width)
                taken = min(end - start, width - offset)
                yield holder, offset, taken
                start += taken


def _locate(entry: Entry, source: str, start: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, length) in the whole parameter of rows [start, start + length) of `source`, in the source's order."""
    found, position = [], 0
    for run in entry.runs:
        low, high = max(start, run.start), min(start + length, run.start + run.length)
        if run.source == source and low < high:
            found.append((low, position + low - run.start, high - low))
        position += run.length
    for _, first, count in sorted(found):
        yield first, count
