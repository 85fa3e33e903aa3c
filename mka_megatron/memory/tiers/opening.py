"""Opens a rank's page store as the configuration says."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from mka_megatron.config.schema import MemoryConfig
from mka_megatron.memory.tiers import channels, ssd, writing
from mka_megatron.memory.tiers.channels import Backend
from mka_megatron.memory.tiers.dram import Pool
from mka_megatron.memory.tiers.ownership import Ownership
from mka_megatron.memory.tiers.pages import PageShape, Seal, TierError
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.tiers.writing import ALIGNMENT

_GIB = 1 << 30
_LEAST_ROWS = 4
_log = logging.getLogger(__name__)


def open_store(
    memory: MemoryConfig,
    shape: PageShape,
    run: str,
    rank: int,
    device: torch.device,
    backend: Backend = "auto",
) -> TierStore:
    """An empty store. The budgets are this rank's.

    Args:
        memory: `l3`: placement, budgets, when_full; `ssd_spill_path`.
        run: the same on all ranks of a run, another for every run: letters, digits, '.', '_' and '-'.
        rank: of this process among those of the run.
        device: where pages are wanted; on a CPU there are no hot pages.
        backend: reads the SSD tier's files: DeepSpeed's aio, preadv, or the first where it works.

    Raises:
        TierError: the directory cannot be used or another run uses it, a budget is too small, or `backend` is
            not to be had.
    """
    l3 = memory.l3
    on_disk = l3.placement == "ssd"
    record_bytes = shape.record_bytes(ALIGNMENT if on_disk else 64)
    dram_bytes = None if l3.dram_pool_gib is None else int(l3.dram_pool_gib * _GIB)
    seal = Seal(shape, run, rank)
    hot = None
    if device.type != "cpu":
        begin, end = shape.fields["k"][0], shape.fields["v"][1]
        rows = int(l3.hbm_pool_gib * _GIB) // (end - begin)
        hot = Pool(end - begin, rows, device) if rows else None
    with ExitStack() as on_failure:
        disk, close = None, lambda: None
        if on_disk:
            if memory.ssd_spill_path is None:
                raise TierError(
                    "memory_hierarchy.ssd_spill_path is null: name a directory for the pages on the SSD."
                )
            buffer_bytes = _buffer(dram_bytes, record_bytes)
            if dram_bytes is not None:
                dram_bytes -= ssd.READERS * buffer_bytes
            limit = None if l3.ssd_pool_gib is None else int(l3.ssd_pool_gib * _GIB) // record_bytes
            disk, close = _disk(
                memory.ssd_spill_path, run, rank, limit, record_bytes, seal, backend, buffer_bytes, on_failure
            )
        dram_rows = None if dram_bytes is None else dram_bytes // record_bytes
        if dram_rows is not None and dram_rows < _LEAST_ROWS:
            raise TierError(
                f"memory_hierarchy.l3.dram_pool_gib is {l3.dram_pool_gib}: too small for {_LEAST_ROWS} pages of "
                f"{record_bytes} bytes and the buffers of the SSD tier, raise it."
            )
        dram = Pool(record_bytes, dram_rows, torch.device("cpu"), pin=device.type == "cuda")
        on_failure.pop_all()
    return TierStore(shape, dram, disk, hot, device, l3.when_full, _full(memory), close)


def _disk(
    path: str, run: str, rank: int, limit: int | None, record_bytes: int, seal: Seal, backend: Backend,
    buffer_bytes: int, on_failure: ExitStack,
) -> tuple[ssd.Disk, Callable[[], None]]:  # fmt: skip
    try:
        ownership = Ownership(Path(path), run, rank)
        on_failure.callback(ownership.close)
        chosen, direct, channel = channels.factory(backend, ownership.folder, ssd.READERS * buffer_bytes)
        write = functools.partial(writing.write, direct=direct)
        segments = ssd.Segments(ownership.folder, record_bytes, limit)
        disk = ssd.Disk(segments, record_bytes, seal, channel, buffer_bytes, write)
    except OSError as error:
        raise TierError(
            f"memory_hierarchy.ssd_spill_path is {path}: the directory cannot be used ({error})."
        ) from error
    _log.info("pages in %s by %s; leftovers removed: %d", ownership.folder, chosen, len(ownership.removed))
    return disk, ownership.close


def _buffer(dram_bytes: int | None, record_bytes: int) -> int:
    """Bytes of a reader's buffer: whole records, together at most about an eighth of host memory."""
    size = ssd.READ_BYTES if dram_bytes is None else min(ssd.READ_BYTES, dram_bytes // (8 * ssd.READERS))
    return max(1, size // record_bytes) * record_bytes


def _full(memory: MemoryConfig) -> str:
    l3 = memory.l3
    if l3.placement == "dram":
        budget = f"memory_hierarchy.l3.dram_pool_gib is {l3.dram_pool_gib}"
        return f"{budget}, raise it, set when_full to evict or placement to ssd"
    if l3.ssd_pool_gib is None:
        return f"{memory.ssd_spill_path} is full, free space on its disk or set memory_hierarchy.l3.when_full to evict"
    return (
        f"memory_hierarchy.l3.ssd_pool_gib is {l3.ssd_pool_gib}, raise it if the disk of {memory.ssd_spill_path} has "
        "the space, or set when_full to evict"
    )
