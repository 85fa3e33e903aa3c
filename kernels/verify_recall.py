"""verify.py's section on the recall: every result is exact, so it is compared with the reference bit for bit.

The layer is Qwen2.5-7B's: 28 query heads, 4 KV heads, 128 channels, chunks of 128 tokens, window 2048, 16 recalled.
"""

# ruff: noqa: B023 (a lambda here is called before the loop goes on)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from verify_common import Check, Clock, Timing, same_bits

from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.ops import recall
from mka_megatron.ops.recall import cuda

HEADS, GROUPS, RECALLED = 28, 4, 16


@dataclass(frozen=True)
class Inputs:
    """One call's tensors; shapes as in mka_megatron.ops.recall."""

    q: Tensor
    k: Tensor
    v: Tensor
    before: Tensor
    centre: Tensor
    planes: Tensor
    lengths: Tensor
    counts: Tensor
    documents: Tensor
    size: int
    window: int

    @staticmethod
    def draw(
        device: torch.device,
        slots: int,
        *,
        batch: int = 1,
        heads: int = HEADS,
        groups: int = GROUPS,
        channels: int = 128,
        size: int = 128,
        window: int = 16,
        tables: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        closed: bool = False,
        seed: int = 0,
    ) -> Inputs:
        """Random ones; `closed`: some chunks are closed early or empty, NaN lies on padding, rows have documents."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        chunks = -(-slots // size)
        full = (slots - size * torch.arange(chunks, device=device)).clamp_max(size).expand(batch, -1)
        starts = torch.zeros(batch, chunks, dtype=torch.bool, device=device)
        starts[:, 0] = True
        lengths = full.clone()
        if closed:
            starts |= torch.rand(batch, chunks, generator=generator, device=device) < 0.1
            share = torch.rand(batch, chunks, generator=generator, device=device)
            lengths = torch.where(share < 0.3, (share / 0.3 * (full + 1)).long().clamp_max(full), full)
        documents = (starts.long().cumsum(1) - 1).masked_fill(lengths == 0, -1)
        through = lengths.cumsum(1)
        at_start = (through - lengths).masked_fill(~starts, 0).cummax(1).values
        k, v, q = (normal(batch, slots, n, channels).to(dtype) for n in (groups, groups, heads))
        k += 4 * normal(groups, channels).to(dtype)
        padding = (torch.arange(size, device=device) >= lengths[..., None]).flatten(1)[:, :slots]
        for x in (k, v, q):
            x[padding] = float("nan")
        planes = (
            torch.randint(2, (tables, 128, channels), generator=generator, device=device, dtype=torch.int8)
            * 2
            - 1
        )
        return Inputs(
            q,
            k,
            v,
            recall.fixed_point(normal(batch, hashing.SELECTING_QUERIES, groups, channels)),
            k.nan_to_num().float().mean(dim=(0, 1)),
            planes,
            lengths,
            (through - lengths - at_start).masked_fill(lengths == 0, 0),
            documents,
            size,
            window,
        )

    def kernels(self) -> tuple[Tensor, ...]:
        """Means, codes, query sums, query codes, selection, by the kernels."""
        means_k, means_v, codes = cuda.pool(self.k, self.v, self.lengths, self.size, self.planes, self.centre)
        sums, wanted = cuda.recent_codes(
            self.q, self.before, self.lengths, self.counts, self.size, self.k.shape[2], self.planes
        )
        return means_k, means_v, codes, sums, wanted, self.select(cuda.nearest_codes, wanted, codes)

    def pooled(self) -> tuple[Tensor, ...]:
        """The reference's means and codes."""
        count = self.lengths.shape[1]
        chunks = Chunks(self.size, self.lengths, self.documents, self.lengths, 0, count)
        sums = recall.chunk_sums(self.k, self.lengths, self.size, self.centre)
        codes = recall.sign_codes(sums, self.planes)
        return hashing.chunk_means(self.k, chunks), hashing.chunk_means(self.v, chunks), codes

    def queried(self) -> tuple[Tensor, Tensor]:
        """The reference's query sums and codes."""
        fixed = hashing.Selector("hash", RECALLED, self.planes).queries(self.q, self.k.shape[2])
        queries = hashing.SELECTING_QUERIES
        sums = recall.recent_sums(fixed, self.before, self.lengths, self.counts, self.size, queries)
        return sums, recall.sign_codes(sums, self.planes)

    def select(self, nearest: Callable[..., Tensor], wanted: Tensor, codes: Tensor) -> Tensor:
        """The selection by one of the implementations."""
        among = recall.Candidates(self.documents, 0, self.lengths.shape[1], self.window)
        return nearest(wanted, codes, among, self.planes.shape[0], RECALLED)

    def reference(self) -> tuple[Tensor, ...]:
        """As :meth:`kernels`."""
        pooled, queried = self.pooled(), self.queried()
        return *pooled, *queried, self.select(recall.nearest_codes, queried[1], pooled[2])


def checks(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """Every length; at short ones also every type, channel count and chunk size, closed chunks, two tables."""
    for slots in lengths:
        inputs = Inputs.draw(device, slots)
        yield same_bits(f"S={slots}", inputs.kernels(), inputs.reference())
        if slots > 4096:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in cuda.CHANNELS:
                for size in cuda.SIZES:
                    inputs = Inputs.draw(
                        device, slots, batch=3, heads=6, groups=2, channels=channels, size=size, window=2,
                        tables=2, dtype=dtype, closed=True, seed=slots,
                    )  # fmt: skip
                    case = f"S={slots} B=3 d={channels} C={size} {str(dtype)[6:]}, closed chunks, documents"
                    yield same_bits(case, inputs.kernels(), inputs.reference())


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """All three kernels over closed chunks."""
    for channels in cuda.CHANNELS:
        inputs = Inputs.draw(
            device, 1100, batch=2, heads=6, groups=2, channels=channels, window=2, closed=True
        )
        yield f"d={channels}", inputs.kernels


def benchmarks(clock: Clock, lengths: Sequence[int]) -> Iterator[Timing]:
    """The three kernels one by one against the reference, eager and (pooling) compiled."""
    for slots in lengths:
        inputs = Inputs.draw(clock.device, slots)
        k, v, q, planes = inputs.k, inputs.v, inputs.q, inputs.planes
        means_k, means_v, codes, sums, wanted, _ = inputs.kernels()
        ms = clock.ms(lambda: cuda.pool(k, v, inputs.lengths, inputs.size, planes, inputs.centre))
        moved = sum(x.nbytes for x in (k, v, means_k, means_v, codes))
        peers = {"eager": clock.ms(inputs.pooled)}
        if slots <= 32768:
            compiled = torch.compile(recall.chunk_sums, dynamic=False)
            peers["compiled sums of keys alone"] = clock.ms(
                lambda: compiled(k, inputs.lengths, inputs.size, inputs.centre)
            )
        yield Timing("pool K, V, codes", slots, ms, moved, peers, clock.share(ms, moved))
        ms = clock.ms(
            lambda: cuda.recent_codes(q, None, inputs.lengths, inputs.counts, inputs.size, GROUPS, planes)
        )
        chunks = inputs.lengths.shape[1]
        moved = chunks * hashing.SELECTING_QUERIES * q[0, 0].nbytes + sums.nbytes + wanted.nbytes
        yield Timing(
            "last 16 queries, codes",
            slots,
            ms,
            moved,
            {"eager": clock.ms(inputs.queried)},
            clock.share(ms, moved),
        )
        ms = clock.ms(lambda: inputs.select(cuda.nearest_codes, wanted, codes))
        peers = {"eager": clock.ms(lambda: inputs.select(recall.nearest_codes, wanted, codes))}
        goal = "goal: all three within 3% of the block attention's forward"
        yield Timing("Hamming top 16", slots, ms, 0, peers, None, goal)
