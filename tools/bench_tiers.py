"""Throughput of the page store's SSD tier, against DeepSpeed's aio handle on the same disk in the same run.

    python tools/bench_tiers.py --directory /mnt/nvme/spill [--gib 2] [--repeats 5] [--json out.json]

The peer is a bare loop over `aio_handle`, what DeepSpeed's ds_io times, with O_DIRECT, as many threads as the store has
and operations as large, from and to one locked buffer each, on new files whose space both claim while they write. Store
and peer take turns, figures are medians, and the data are larger than the store's host memory many times over, which
is full when the time begins. The store packs, seals, verifies and copies every page besides; its bytes are those of
whole records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from mka_megatron.config.schema import L3Config, MemoryConfig
from mka_megatron.memory.tiers import channels, ssd, writing
from mka_megatron.memory.tiers.opening import open_store
from mka_megatron.memory.tiers.pages import PageKey, PageShape
from mka_megatron.memory.tiers.store import TierStore

BATCH = 256
"""Pages per call of the store."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=2.0, help="data written and read in each repeat")
    parser.add_argument("--dram-gib", type=float, default=0.125, help="host memory of the store")
    parser.add_argument("--repeats", type=int, default=5, help="turns of store and peer")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a page")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a page, in bf16")
    parser.add_argument("--backend", choices=("auto", "aio", "plain"), default="auto", help="of the store")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    shape = PageShape(options.chunk, options.head_dim, torch.bfloat16, 1)
    record = shape.record_bytes(writing.ALIGNMENT)
    pages = int(options.gib * (1 << 30)) // record // BATCH * BATCH
    turns = []
    for turn in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            parts = [lambda: peer(Path(folder), record, pages), lambda: store(Path(folder), shape, pages, options)]
            found: dict[str, float] = {}
            for part in parts if turn % 2 == 0 else parts[::-1]:
                found |= part()
            turns.append(found)
            print(f"turn {turn}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    figures = summary(turns, options, record, pages, shape)
    print(json.dumps({name: figures[name] for name in ("gb_per_second", "ratios")}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def summary(turns: list[dict[str, float]], options: argparse.Namespace, record: int, pages: int, shape: PageShape) -> dict:
    """Medians, and medians of the ratios turn by turn."""
    kinds = ("write", "read in order", "read at random")
    ratios = {kind: [turn[f"store {kind}"] / turn[f"peer {kind}"] for turn in turns] for kind in kinds}
    return {
        "page_bytes": record,
        "payload_share": 2 * shape.chunk_size * shape.head_dim * shape.dtype.itemsize / record,
        "gib": pages * record / (1 << 30),
        "dram_gib": options.dram_gib,
        "backend": options.backend,
        "repeats": len(turns),
        "gb_per_second": {name: round(statistics.median(turn[name] for turn in turns), 3) for name in turns[0]},
        "ratios": {kind: round(statistics.median(values), 3) for kind, values in ratios.items()},
        "ratio_ranges": {kind: [round(min(values), 3), round(max(values), 3)] for kind, values in ratios.items()},
    }


def store(folder: Path, shape: PageShape, count: int, options: argparse.Namespace) -> dict[str, float]:
    """GB/s of records through the store."""
    l3 = L3Config(enabled=True, placement="ssd", dram_pool_gib=options.dram_gib)
    memory = MemoryConfig(l3=l3, ssd_spill_path=str(folder / "spill"))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(BATCH, shape.chunk_size, shape.head_dim, generator=generator).bfloat16() for _ in range(2))
    rest = (torch.full((BATCH,), shape.chunk_size), k[:, 0], v[:, 0], torch.zeros(BATCH, 1, dtype=torch.int64))
    keys = [PageKey(0, 0, 0, 0, chunk) for chunk in range(count)]
    with open_store(memory, shape, "bench", 0, torch.device("cpu"), options.backend) as pages:
        full = int(options.dram_gib * (1 << 30)) // shape.record_bytes(writing.ALIGNMENT)
        for first in range(0, count, BATCH):
            if first <= full:
                pages.reset_statistics()
                begin = time.perf_counter()
            pages.put(keys[first : first + BATCH], k, v, *rest)
        found = {"store write": pages.statistics().written_bytes / (time.perf_counter() - begin) / 1e9}
        found["store read in order"] = read(pages, keys)
        random.Random(0).shuffle(keys)  # noqa: S311
        found["store read at random"] = read(pages, keys)
    return found


def read(pages: TierStore, keys: list[PageKey]) -> float:
    """GB/s of reading `keys`, the next batch while one is used."""
    pages.reset_statistics()
    begin = time.perf_counter()
    for first in range(0, len(keys), BATCH):
        pages.prefetch(keys[first : first + 2 * BATCH])
        pages.get(keys[first : first + BATCH])
    return pages.statistics().read_bytes / (time.perf_counter() - begin) / 1e9


def peer(folder: Path, record: int, count: int) -> dict[str, float]:
    """GB/s of bare handles: as many, and with operations as large, as the store uses."""
    operations, reason = channels._deepspeed()
    if operations is None:
        raise SystemExit(f"the peer needs DeepSpeed's aio: {reason}.")
    path = folder / "peer"
    large = ssd.WRITE_BYTES // record * record
    middle = ssd.READ_BYTES // record * record
    at_random = list(range(count))
    random.Random(0).shuffle(at_random)  # noqa: S311
    plans = {
        "peer write": (ssd.WRITERS, large, [(offset, "pwrite") for offset in range(0, count * record - large, large)]),
        "peer read in order": (
            ssd.READERS, middle, [(offset, "pread") for offset in range(0, count * record - middle, middle)],
        ),
        "peer read at random": (ssd.READERS, record, [(number * record, "pread") for number in at_random]),
    }  # fmt: skip
    found = {name: loop(operations, path, count * record, *plan) for name, plan in plans.items()}
    path.unlink()
    return found


def loop(operations: object, path: Path, space: int, handles: int, size: int, work: list[tuple[int, str]]) -> float:
    """GB/s of `work` on a file of `space` bytes shared out to threads with a handle and a buffer each."""
    made = [operations.aio_handle(1 << 20, 32, False, True, 1) for _ in range(handles)]  # type: ignore[attr-defined]
    buffers = [handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)).fill_(7) for handle in made]

    def part(number: int) -> None:
        moves: dict[str, Callable[..., int]] = {
            "pwrite": made[number].sync_pwrite, "pread": made[number].sync_pread}  # fmt: skip
        for offset, kind in work[number::handles]:
            if moves[kind](buffers[number], str(path), offset) != 1:
                raise SystemExit(f"{kind} at {offset} of {path} failed")

    # two threads that come together to a process's first write wait for each other for ever
    made[0].sync_pwrite(buffers[0], str(path.with_name("first")), 0)
    with ThreadPoolExecutor(handles) as threads:
        begin = time.perf_counter()
        with open(path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, space)
        list(threads.map(part, range(handles)))
        seconds = time.perf_counter() - begin
    for handle, buffer in zip(made, buffers, strict=True):
        handle.free_cpu_locked_tensor(buffer)
    return len(work) * size / seconds / 1e9


if __name__ == "__main__":
    sys.exit(main())
