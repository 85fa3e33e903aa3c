"""Worker: every collective and view of context parallelism on this world's ranks; each rank writes what it got.

python -m torch.distributed.run --nproc_per_node=N context_worker.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import SELECTING_QUERIES
from mka_megatron.memory.summary import ema
from mka_megatron.memory.view import Summaries
from mka_megatron.parallel.context import RankView
from mka_megatron.parallel.exchange import Traffic, exchange, gather_before, transpose

BATCH, GROUPS, CHANNELS, CHUNK, CHUNKS = 3, 2, 4, 4, 3
SLOTS = CHUNK * CHUNKS
HALOS = (0, 2, 5)
RECALLED = 3
LAYOUTS = ("whole", "packed", "padded")
WORDS = 2


def draw(name: str, *shape: int) -> Tensor:
    """fp64 numbers that depend on the name only."""
    seed = int.from_bytes(name.encode(), "big") % (2**63)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(layout: str, ranks: int) -> Documents:
    """Whole rows of `ranks` shards. packed: documents start on chunk boundaries, some on a shard's.
    padded: chunks closed early inside documents, padded tails, a last row that ends within the first shard."""
    slots = ranks * SLOTS
    starts = torch.zeros(BATCH, slots, dtype=torch.bool)
    starts[:, 0] = True
    padding = None
    if layout != "whole":
        starts[0, SLOTS - CHUNK] = True
        starts[1, [CHUNK, SLOTS]] = True
    if layout == "padded":
        padding = torch.zeros(BATCH, slots, dtype=torch.bool)
        closed = torch.rand(BATCH, slots // CHUNK, generator=torch.Generator().manual_seed(3)) < 0.7
        for chunk in range(slots // CHUNK):
            padding[closed[:, chunk], chunk * CHUNK + 1 : (chunk + 1) * CHUNK] = True
        padding[1, slots - SLOTS :] = True
        padding[2, 2 * CHUNK + 1 :] = True
    return Documents.from_starts(starts, padding)


def recalled(ranks: int, halo: int) -> Tensor:
    """[B, N, G, R] chunk numbers before the window of every chunk, ascending, -1 last; many of them shared."""
    generator = torch.Generator().manual_seed(11)
    chunks = ranks * CHUNKS
    table = torch.full((BATCH, chunks, GROUPS, RECALLED), -1)
    for row in range(BATCH):
        for chunk in range(chunks):
            for group in range(GROUPS):
                before = max(0, chunk - halo)
                some = torch.randperm(before, generator=generator)[:RECALLED].sort().values
                table[row, chunk, group, : len(some)] = some
    return table


class Recorder:
    """Named tensors of this rank, and gradients of a random functional of them."""

    def __init__(self, rank: int) -> None:
        self.rank, self.found = rank, {}

    def record(self, name: str, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        """Outputs, and the gradients of `leaves` under the weights draw(name/output/rank)."""
        total = torch.zeros((), dtype=torch.float64)
        for key, out in outputs.items():
            self.found[f"{name}/{key}"] = out.detach().contiguous()
            if out.requires_grad:
                total = total + (out * draw(f"{name}/{key}/{self.rank}", *out.shape)).sum()
        if leaves:
            for key, grad in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
                self.found[f"{name}/d{key}"] = grad.contiguous()

    def count(self, name: str, traffic: Traffic) -> None:
        """Bytes by purpose."""
        for purpose, sent in traffic.sent.items():
            self.found[f"{name}/bytes/{purpose}"] = torch.tensor(sent)


def shard(name: str, rank: int, ranks: int, *tail: int, slots: int = SLOTS) -> Tensor:
    """This rank's leaf of a drawn whole [B, ranks*slots, ...]."""
    whole = draw(name, BATCH, ranks * slots, *tail)
    return whole[:, rank * slots : (rank + 1) * slots].clone().requires_grad_()


def collectives(recorder: Recorder, group: dist.ProcessGroup) -> None:
    rank, ranks = group.rank(), group.size()
    traffic = Traffic()
    x, y = shard("x", rank, ranks, 3), shard("y", rank, ranks, 2, 2)
    gathered = gather_before((x, y), group, traffic, "gather")
    recorder.record("gather", dict(zip("xy", gathered, strict=True)), {"x": x, "y": y})

    # rank r gives rank j the slots [0, (r + 2j) % 5), other than to itself
    def length(giver: int, taker: int) -> int:
        return 0 if giver == taker else (giver + 2 * taker) % 5

    a, b = shard("a", rank, ranks, 3), shard("b", rank, ranks, 3)
    give = [(slice(None), slice(0, length(rank, other))) if length(rank, other) else None for other in range(ranks)]
    take = [(BATCH, length(other, rank), 3) for other in range(ranks)]
    pieces = exchange((a, b), give, take, group, traffic, "exchange")
    outputs = {key: torch.cat(each, dim=1) for key, each in zip("ab", pieces, strict=True)}
    recorder.record("exchange", outputs, {"a": a, "b": b})
    table = torch.arange(ranks * 2).view(ranks, 2) + 100 * rank
    recorder.record("transpose", {"table": transpose(table, group, traffic, "transpose")}, {})
    recorder.count("collectives", traffic)


def views(recorder: Recorder, group: dist.ProcessGroup, layout: str) -> None:
    rank, ranks = group.rank(), group.size()
    whole = rows(layout, ranks)
    documents = whole.part(rank * SLOTS, (rank + 1) * SLOTS)
    chunks = Chunks.of(documents, CHUNK)
    traffic = Traffic()
    view = RankView(group, documents, chunks, traffic)

    x = shard("k", rank, ranks, GROUPS, CHANNELS)
    decay = draw("decay", GROUPS, CHANNELS).sigmoid().requires_grad_()
    carry = view.carry("k", x, decay, documents)
    recorder.record(f"{layout}/carry", {"state": carry}, {"x": x, "decay": decay})
    averages, _ = ema(x, decay, documents, view.carry("k", x, decay, documents))
    recorder.record(f"{layout}/ema", {"averages": averages}, {"x": x, "decay": decay})

    k, v = shard("k", rank, ranks, GROUPS, CHANNELS), shard("v", rank, ranks, GROUPS, CHANNELS)
    for chunks_before in HALOS:
        halo_k, halo_v = view.halo(k, v, chunks_before)
        recorder.record(f"{layout}/halo{chunks_before}", {"k": halo_k, "v": halo_v}, {"k": k, "v": v})

    tokens = (draw("q", BATCH, ranks * SLOTS, GROUPS, CHANNELS) * 1000).round()
    own = tokens[:, rank * SLOTS : (rank + 1) * SLOTS]
    last = torch.zeros(BATCH, SELECTING_QUERIES, GROUPS, CHANNELS, dtype=torch.float64)
    for row in range(BATCH):
        mine = own[row] if documents.padding is None else own[row][~documents.padding[row]]
        if len(mine):
            last[row, -len(mine[-SELECTING_QUERIES:]) :] = mine[-SELECTING_QUERIES:]
    recorder.record(f"{layout}/queries", {"before": view.queries(last)}, {})

    bar_k = shard("bar k", rank, ranks, GROUPS, CHANNELS, slots=CHUNKS)
    bar_v = shard("bar v", rank, ranks, GROUPS, CHANNELS, slots=CHUNKS)
    words = (shard("words", rank, ranks, GROUPS, WORDS, slots=CHUNKS) * 2**40).detach().long()
    found = view.summaries(Summaries(bar_k, bar_v, words))
    recorder.record(f"{layout}/summaries", {"k": found.k, "v": found.v}, {"k": bar_k, "v": bar_v})
    recorder.record(f"{layout}/signatures", {"words": found.signature}, {})

    for chunks_before in HALOS:
        halo = min(chunks_before, rank * CHUNKS)
        mine = chunks.at_hand(recalled(ranks, chunks_before))
        pages = view.pages(mine, halo, k, v)
        name = f"{layout}/pages{chunks_before}"
        recorder.record(name, {"k": pages.k, "v": pages.v}, {"k": k, "v": v})
        recorder.record(f"{name}/table", {"lengths": pages.lengths, "index": pages.index}, {})

    all_k, all_v = view.keys_values(k, v)
    recorder.record(f"{layout}/keys_values", {"k": all_k, "v": all_v}, {"k": k, "v": v})
    recorder.count(layout, traffic)


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    recorder = Recorder(group.rank())
    collectives(recorder, group)
    for layout in LAYOUTS:
        views(recorder, group, layout)
    again = Recorder(group.rank())
    for layout in LAYOUTS:
        views(again, group, layout)
    for name, tensor in again.found.items():
        assert torch.equal(tensor, recorder.found[name]), f"{name} differs in a second run"
    save_file(recorder.found, directory / f"rank{group.rank()}.safetensors")
    del group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
