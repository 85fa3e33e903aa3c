"""verify.py's section on the decode: the attention against fp64, the update path bit for bit where it is exact.

The layer is Qwen2.5-7B's: 28 query heads, 4 KV heads, 128 channels, chunks of 128 tokens, window 2048, 16 recalled.
"""

# ruff: noqa: B023 (a lambda here is called before the loop goes on)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from verify_common import Check, Clock, Timing, as_accurate, same_bits

from mka_megatron.ops import decode
from mka_megatron.ops.decode import Cache, Hashing, cuda

HEADS, GROUPS, CHANNELS, SIZE, WINDOW, RECALLED = 28, 4, 128, 128, 2048, 16
EXACT = ("k", "v", "lengths", "chunk", "position", "sum_k", "sum_v", "codes", "recalled", "code_sum", "queries")


@dataclass(frozen=True)
class State:
    """Sequences in the middle of being generated, and what the next token brings."""

    cache: Cache
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    tables: tuple[Tensor, Tensor]
    hashing: Hashing
    window: int

    @staticmethod
    def draw(
        device: torch.device,
        slots: int,
        *,
        batch: int = 1,
        heads: int = HEADS,
        groups: int = GROUPS,
        channels: int = CHANNELS,
        size: int = SIZE,
        window: int = WINDOW,
        recalled: int = RECALLED,
        dtype: torch.dtype = torch.bfloat16,
        ragged: bool = False,
        poisoned: bool = True,
        seed: int = 0,
    ) -> State:
        """Sequences of `slots` tokens; `ragged`: fewer, some chunks closed early or empty, the last sequence idle;
        `poisoned`: NaN where there is no token."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def share(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        chunks = -(-slots // size)
        cache = Cache.empty(
            batch, groups, channels, chunks=chunks, size=size, pages=batch * groups * chunks, dtype=dtype,
            device=device, words=4, recalled=recalled, ema=True,
        )  # fmt: skip
        order = torch.randperm(len(cache.k), generator=generator, device=device)
        cache.table.copy_(order.view_as(cache.table))
        numbers = torch.arange(chunks, device=device)
        own = torch.full((batch, 1), chunks - 1, device=device)
        lengths = (slots - size * numbers).clamp(max=size).expand(batch, -1)
        if ragged:
            own[1:] = (share(batch - 1, 1) * chunks).long()
            lengths = torch.where(share(batch, chunks) < 0.3, (share(batch, chunks) * lengths).long(), lengths)
        lengths = torch.where(numbers == own, lengths.clamp_min(1), lengths) * (numbers <= own)
        cache.lengths.copy_(lengths)
        cache.position.copy_(lengths.sum(dim=1))
        cache.chunk.copy_(own[:, 0])
        for pages in (cache.k, cache.v):
            pages.normal_(generator=generator)
            if poisoned:
                empty = torch.arange(size, device=device) >= lengths[..., None]
                # [B, N, C] -> [B*G*N, C], in the order of the pages
                empty = empty[:, None].expand(-1, groups, -1, -1).flatten(0, 2)[order.argsort()]
                pages.masked_fill_(empty[..., None], float("nan"))
        assert cache.summary_k is not None and cache.summary_v is not None and cache.codes is not None
        assert cache.recalled is not None and cache.queries is not None and cache.code_sum is not None
        nothing = ((lengths == 0) & poisoned)[:, None, :, None]
        for summary in (cache.summary_k, cache.summary_v):
            summary.normal_(generator=generator).masked_fill_(nothing, float("nan"))
        for total in (cache.sum_k, cache.sum_v, cache.ema_k, cache.ema_v):
            assert total is not None
            total.normal_(generator=generator)
        for integers in (cache.code_sum, cache.queries):
            integers.copy_((normal(*integers.shape) * 2**18).long())
        # few differing bits, so that many chunks lie at one distance
        cache.codes.copy_((share(*cache.codes.shape) * 2**12).long())
        # distinct chunks before the window, ascending, then -1
        far = (own - window // size + 1).clamp_min(0)[:, None]
        picked = share(batch, groups, chunks).masked_fill(numbers >= far, 2.0).argsort(dim=2)[..., :recalled]
        picked = picked.masked_fill(picked >= far, chunks).sort(dim=2).values
        cache.recalled[..., : picked.shape[2]] = picked.masked_fill(picked == chunks, -1).int()
        if ragged and batch > 1:
            cache.chunk[-1] = -1
        angle = normal(batch, channels // 2).repeat(1, 2)
        planes = torch.randint(2, (2, 128, channels), generator=generator, device=device, dtype=torch.int8) * 2 - 1
        return State(
            cache,
            normal(batch, heads, channels).to(dtype),
            normal(batch, groups, channels).to(dtype),
            normal(batch, groups, channels).to(dtype),
            normal(batch, groups, 3),
            (angle.cos(), angle.sin()),
            Hashing(planes, normal(groups, channels)),
            window,
        )

    def clone(self, wide: bool = False) -> State:
        """With a cache of its own; `wide`: in fp64."""

        def copy(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.double() if wide and x.is_floating_point() else x.clone()

        cache = Cache(**{field.name: copy(getattr(self.cache, field.name)) for field in fields(Cache)})  # type: ignore[arg-type]
        if not wide:
            return replace(self, cache=cache)
        tables = (self.tables[0].double(), self.tables[1].double())
        return replace(
            self, cache=cache, q=self.q.double(), k=self.k.double(), v=self.v.double(), bias=self.bias.double(),
            tables=tables,
        )  # fmt: skip

    def attend(self, backend: str, window: int | None = None) -> Tensor:
        """The attention of the last tokens."""
        window = window or self.window
        return decode.attend(
            self.cache, self.q, self.bias, window=window, scale=self.q.shape[2] ** -0.5, backend=backend
        )

    def step(self, backend: str) -> tuple[Tensor, Tensor]:
        """The next token: fuse, append, close every second sequence; changes the cache."""
        batch = len(self.k)
        decay = torch.linspace(0.1, 0.9, self.k[0].numel(), device=self.k.device).view_as(self.k[0])
        shares = self.bias[..., :1].sigmoid()
        fused = decode.fuse(self.cache, self.k, self.v, shares, decay, decay, backend=backend)
        decode.append(self.cache, self.q, self.k, -self.k, self.v, backend=backend)
        force = torch.arange(batch, device=self.k.device) % 2 == 0
        decode.close(self.cache, *self.tables, self.hashing, window=self.window, force=force, backend=backend)
        return fused


def checks(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """Every length; at short ones also every type, channel count and group size, the dense decode, the update path."""
    for slots in lengths:
        yield _attention(f"S={slots}", State.draw(device, slots))
        if slots > 4096:
            continue
        yield _attention(f"S={slots} dense", State.draw(device, slots), window=-(-slots // SIZE) * SIZE)
        for dtype in cuda.HALVES:
            for channels in cuda.CHANNELS:
                for fan in (1, 7, 16):
                    state = State.draw(
                        device, slots, batch=3, heads=2 * fan, groups=2, channels=channels, size=64, window=128,
                        recalled=3, dtype=dtype, ragged=True, seed=slots + fan,
                    )  # fmt: skip
                    case = f"S={slots} B=3 d={channels} H/G={fan} {str(dtype)[6:]}, ragged"
                    yield _attention(case, state)
                    yield from _update(case, state)


def _attention(case: str, state: State, window: int | None = None) -> Check:
    exact = state.clone(wide=True).attend("reference", window)
    return as_accurate(case, state.attend("cuda", window), state.attend("reference", window), exact)


def _update(case: str, state: State) -> Iterator[Check]:
    found, expected, exact = state.clone(), state.clone(), state.clone(wide=True)
    outs = [each.step(backend) for each, backend in ((found, "cuda"), (expected, "reference"), (exact, "reference"))]
    pairs = [(getattr(found.cache, name), getattr(expected.cache, name)) for name in EXACT]
    yield same_bits(f"{case}, update", *zip(*pairs, strict=True))
    rounded = [("fused k", *(out[0] for out in outs)), ("fused v", *(out[1] for out in outs))]
    for name in ("summary_k", "summary_v", "ema_k", "ema_v"):
        rounded.append((name, *(getattr(each.cache, name).nan_to_num(0.0) for each in (found, expected, exact))))
    for name, *three in rounded:
        yield as_accurate(f"{case}, {name}", *three)


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """The attention in one and in many splits, and the update path."""
    for channels in cuda.CHANNELS:
        for batch in (3, 200):
            state = State.draw(
                device, 600, batch=batch, heads=14, groups=2, channels=channels, size=64, window=128, recalled=3,
                ragged=True,
            )  # fmt: skip

            def launch(state: State = state) -> Sequence[Tensor]:
                mine = state.clone()
                out = mine.attend("cuda")
                fused = mine.step("cuda")
                return [out, *fused, *(getattr(mine.cache, name) for name in EXACT)]

            yield f"B={batch} d={channels}", launch


def benchmarks(clock: Clock, lengths: Sequence[int]) -> Iterator[Timing]:
    """The attention of one token against the dense decode, ours and PyTorch's, and the update by a token that fills a
    chunk; in CUDA graphs."""
    for slots in lengths:
        for batch in (1, 16):
            if batch * slots > 16 * 131072:
                continue
            state = State.draw(clock.device, slots, batch=batch, poisoned=False)
            ms = clock.ms(_graphed(lambda: state.attend("cuda")))
            window = -(-slots // SIZE) * SIZE
            dense = clock.ms(_graphed(lambda: state.attend("cuda", window)))
            cache = state.cache
            # [B, G, N] pages -> [B, G, N*C, d]
            k, v = (x[cache.table.long()].flatten(2, 3)[:, :, :slots] for x in (cache.k, cache.v))
            q = state.q[:, :, None]
            sdpa = clock.ms(
                _graphed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            )
            row = k.element_size() * 2 * GROUPS * CHANNELS * batch
            far = max(0, slots - WINDOW)
            moved = row * (min(slots, WINDOW) + min(RECALLED * SIZE, far) + far // SIZE)
            goal = ""
            if batch == 1 and slots == 131072:
                goal = f"goal 12 us {_met(ms <= 0.012)}, 8x dense {_met(min(dense, sdpa) >= 8 * ms)}"
            if batch == 16:
                goal = f"goal 75% of copy {_met(clock.share(ms, moved) >= 0.75)}"
            peers = {"dense, ours": dense, "dense, SDPA": sdpa}
            if batch == 1:
                peers["eager"] = clock.ms(lambda: state.attend("reference"))
            yield Timing(f"attend B={batch}", slots, ms, moved, peers, clock.share(ms, moved), goal)
            dense_moved = row * slots
            share = clock.share(dense, dense_moved)
            yield Timing(f"dense attend B={batch}", slots, dense, dense_moved, {"SDPA": sdpa}, share)
        # a token short of a full chunk, every time
        state = State.draw(clock.device, -(-slots // SIZE) * SIZE - 1, poisoned=False)
        changed = [(x, x.clone()) for x in (state.cache.lengths, state.cache.chunk, state.cache.position)]

        def update() -> None:
            state.step("cuda")
            for x, before in changed:
                x.copy_(before)

        yield Timing("fuse, append, close (and 3 copies)", slots, clock.ms(_graphed(update)))


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def _graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, so that Python's time is not measured; on a CPU the call itself."""
    if not torch.cuda.is_available():
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
