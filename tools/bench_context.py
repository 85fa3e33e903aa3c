"""Bytes that context-parallel ranks exchange in one layer, forward and backward: dense attention against the block core.

    python tools/bench_context.py --ranks 4 --seq 16384 --json out.json

Real ranks (gloo), one row, random keys and queries. Dense attention sends every rank all keys and values. The block
core sends window halo, chunk summaries, codes and the recalled chunks; random ones are the worst case: hardly two
chunks recall the same, so nearly every chunk is recalled by some chunk of every later rank. Query heads change
nothing, so there is one per KV head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mka_megatron.attention.registry import VARIANTS, Finish
from mka_megatron.config.load import load_config
from mka_megatron.config.variants import needs_chunks, recalls
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Memory
from mka_megatron.parallel.context import RankView
from mka_megatron.parallel.exchange import Traffic

MIB = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VARIANT_NAMES = {
    "gqa": ["attention.variant=gqa"],
    "blockmka without L3": ["attention.variant=blockmka"],
    "blockmka": ["attention.variant=blockmka", "memory_hierarchy.l3.enabled=true"],
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel ranks")
    parser.add_argument("--seq", type=int, default=16384, help="slots of the row, over all ranks")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads of a rank")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--recalled", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, help="write the bytes here")
    chosen = parser.parse_args()
    if chosen.seq % (chosen.ranks * chosen.chunk):
        parser.error(f"--seq {chosen.seq} is no multiple of --ranks x --chunk ({chosen.ranks * chosen.chunk})")
    if chosen.window % chosen.chunk:
        parser.error(f"--window {chosen.window} is no multiple of --chunk ({chosen.chunk})")
    return chosen


def one_rank(rank: int, chosen: argparse.Namespace, folder: str) -> None:
    """One layer of every variant on this rank; rank 0 writes what each rank sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=chosen.ranks)
    found: dict[str, list[Any]] = {}
    for name, variant in VARIANT_NAMES.items():
        every: list[Any] = [None] * chosen.ranks
        dist.all_gather_object(every, dict(layer(variant, chosen, dist.group.WORLD).sent))
        found[name] = every
    if rank == 0:
        (Path(folder) / "sent.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def layer(variant: list[str], chosen: argparse.Namespace, group: dist.ProcessGroup) -> Traffic:
    """Forward and backward of the variant's attention over this rank's shard."""
    config = load_config([], [
        *variant, f"memory_hierarchy.l1.chunk_size={chosen.chunk}", f"memory_hierarchy.l1.window={chosen.window}",
        f"memory_hierarchy.l3.recalled_chunks={chosen.recalled}", "data.pad_documents_to_chunks=true",
        f"data.sequence_length={chosen.seq}", f"model.max_position_embeddings={chosen.seq}",
    ] if "gqa" not in variant[0] else variant)  # fmt: skip
    slots = chosen.seq // chosen.ranks
    begin = group.rank() * slots
    documents = Documents.unpacked(1, chosen.seq).part(begin, begin + slots)
    chunks = Chunks.of(documents, chosen.chunk) if needs_chunks(config) else None
    selector = None
    if recalls(config):
        l3 = config.memory_hierarchy.l3
        planes = hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, chosen.head_dim)
        selector = hashing.Selector(l3.selection, l3.recalled_chunks, planes)
    traffic = Traffic()
    memory = Memory(RankView(group, documents, chunks, traffic), chunks, selector)
    generator = torch.Generator().manual_seed(group.rank())
    shape = (1, slots, chosen.kv_heads, chosen.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[chosen.dtype]).requires_grad_() for _ in range(3))
    out, *_ = VARIANTS[config.attention.variant].attend(
        q, k, v, finish=Finish(_same, _same, _unrotated), route=None, documents=documents,
        scale=chosen.head_dim**-0.5, config=config, memory=memory,
    )  # fmt: skip
    out.float().square().sum().backward()
    return traffic


def _same(x: Tensor) -> Tensor:
    return x


def _unrotated(x: Tensor, positions: Tensor | None) -> Tensor:
    return x


def main() -> None:
    chosen = options()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (chosen, folder), chosen.ranks)
        found = json.loads((Path(folder) / "sent.json").read_text())
    print(f"one layer, {chosen.seq:,} slots over {chosen.ranks} ranks, {chosen.kv_heads} KV heads x {chosen.head_dim}, "
          f"{chosen.dtype}; chunk {chosen.chunk}, window {chosen.window}, {chosen.recalled} recalled")  # fmt: skip
    for name, ranks in found.items():
        totals = [sum(sent.values()) for sent in ranks]
        print(f"\n{name}: {sum(totals) / MIB:.3f} MiB, at most {max(totals) / MIB:.3f} MiB from one rank")
        for purpose in dict.fromkeys(key for sent in ranks for key in sent):
            print(f"  {purpose:26} {sum(sent.get(purpose, 0) for sent in ranks) / MIB:10.3f} MiB")
    if chosen.json:
        settings = {key: value for key, value in vars(chosen).items() if key != "json"}
        chosen.json.write_text(json.dumps({"settings": settings, "sent": found}, indent=2))


if __name__ == "__main__":
    main()
