"""verify.py's section on the block core: outputs and every gradient against fp64, list by list.

The peer of the comparison computes the same lists by PyTorch, rounding where attention in low precision rounds. Long
rows are compared on a sample of chunks, the only ones whose outputs have a gradient, so that the gradients of all keys are
known. The layer that is timed is Qwen2.5-7B's: 28 query heads, 4 KV heads, 128 channels, chunks of 128 tokens, window 2048,
16 recalled.
"""

# ruff: noqa: B023 (a lambda here is called before the loop goes on)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from verify_common import Check, Clock, Timing, as_accurate
from verify_common_blocks import FORMS, Inputs
from verify_recall import Inputs as Recall

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.view import Pages
from mka_megatron.ops import library
from mka_megatron.ops.block_attention import block_attention, cuda
from mka_megatron.ops.block_attention.layout import Layout

WGMMA_SIZES = (128,)
"""C, for which there is a wgmma kernel."""
FANS = (1, 4, 7)
"""H/G of short rows."""
LAUNCHES = (
    ("closed", 700, 64, 128), ("shard", 900, 128, 128), ("shard", 400, 128, 64), ("one document", 3000, 64, 64),
)  # fmt: skip
"""(form, S, d, C); the last has summaries that so many chunks see that their gradients are summed in parts."""
LONGEST = 1 << 20
"""Offsets there pass 2^31 elements; checked where the device has the memory, else the longest that it has."""
BYTES_A_SLOT = 60_000
"""Of that check."""
GOALS = {"forward": (0.75, 10.0, 1.5), "backward": (0.60, 8.0, 2.0)}
"""Shares of cuDNN's TFLOP/s, from 32K slots on; times faster than it and than FlexAttention, at 128K."""
GOALS_AT = 131072
RECALL_GOAL = 0.03
PRODUCTS = {"forward": 2, "backward": 5}
"""Matrix products per pair of a query and a key; what the backward computes again does not count."""


def checks(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """Every length by every kernel; at short ones every form, type, number of channels, chunk and group size."""
    longest = (LONGEST,) if max(lengths) >= GOALS_AT else ()
    for slots in (*lengths, *longest):
        if slots > 4096:
            yield from _long(device, slots)
            continue
        grid = product(cuda.DTYPES, cuda.CHANNELS, cuda.SIZES, FANS)
        for number, (dtype, channels, size, fan) in enumerate(grid):
            form = FORMS[(number + slots) % len(FORMS)]
            inputs = Inputs.draw(
                device, slots, form=form, batch=2, heads=2 * fan, groups=2, channels=channels, size=size,
                window=1 + number % 3, recalled=1 + number % 4, dtype=dtype, seed=slots + number,
            )  # fmt: skip
            at = torch.arange(inputs.chunks.count, device=device)
            exact, peer = inputs.solved(at, rounded=False), inputs.solved(at, rounded=True)
            for kernel, attend in kernels(inputs).items():
                case = f"S={slots} d={channels} C={size} H/G={fan} {str(dtype)[6:]}, {form}, {kernel}"
                found = inputs.run(attend)
                blank = {"out": inputs.q, **{f"d {name}": x for name, x in inputs.tensors().items()}}
                written = sum(int(found[name][x.isnan()].count_nonzero()) for name, x in blank.items())
                yield Check(f"{case}: padding", written, 0.0)
                yield _worst(case, inputs, at, found, peer, exact)


def _long(device: torch.device, slots: int) -> Iterator[Check]:
    """A sample of the chunks of a long row."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while slots * BYTES_A_SLOT > free:
            slots //= 2
    at = _sample(slots, device)
    heads = 20 if slots > GOALS_AT else 28
    inputs = Inputs.draw(device, slots, heads=heads, sampled=at, seed=slots)
    exact, peer = inputs.solved(at, rounded=False), inputs.solved(at, rounded=True)
    for kernel, attend in kernels(inputs).items():
        case = f"S={slots}, {len(at)} chunks, {kernel}"
        found = inputs.run(attend)
        elsewhere = sum(
            int(found[name].count_nonzero()) - int(inputs.chunked(found[name], at).count_nonzero())
            for name in ("d q", "d bias")
        )
        yield Check(f"{case}: gradients of other chunks", elsewhere, 0.0)
        yield _worst(case, inputs, at, found, peer, exact)


def _sample(slots: int, device: torch.device) -> Tensor:
    """Chunks of a long row: first, middle, last."""
    count = -(-slots // 128)
    return torch.tensor([0, 1, count // 2, count - 2, count - 1], device=device)


def _worst(
    case: str, inputs: Inputs, at: Tensor, found: dict[str, Tensor], peer: dict[str, Tensor], exact: dict[str, Tensor]
) -> Check:
    """The comparison of one call that is nearest to failing, or fails."""
    made = []
    for name, expected in exact.items():
        mine = inputs.chunked(found[name], at) if name in ("out", "d q", "d bias") else found[name]
        check = as_accurate(f"{case}: {name}", mine, peer[name], expected)
        # sums in fp32 of products of d channels may cancel to nothing; d bias is fp32, but made of low precision
        slack = 8 * inputs.q.shape[3] * torch.finfo(torch.float32).eps
        if name == "d bias":
            slack += torch.finfo(inputs.q.dtype).eps * float(expected.abs().max())
        made.append(Check(check.case, check.error, check.bound + slack))
    return max(made, key=lambda check: (not check.passed, check.error / check.bound))


def kernels(inputs: Inputs) -> dict[str, Callable[..., Tensor]]:
    """The kernels that run these, by name, as functions with the arguments of block_attention; wgmma: where there is one."""
    capability, size = library.capability(inputs.q.device.type), inputs.chunks.size
    if cuda.lacks(inputs.q.shape[3], size, inputs.q.dtype, capability):
        return {}
    names = ["mma", "wgmma"] if capability in (None, (9, 0)) and size in WGMMA_SIZES else ["mma"]
    return {name: partial(_by_kernel, name) for name in names}


def _by_kernel(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, summaries: tuple[Tensor, Tensor] | None, pages: Pages | None,
    bias: Tensor | None, *, chunks: Chunks, window: int, scale: float,
) -> Tensor:  # fmt: skip
    layout = Layout.of(q, k, v, summaries, pages, bias, chunks, window, scale)
    listed = None if pages is None else (pages.k, pages.v, pages.lengths, pages.index)
    return cuda.attention(layout, q, k, v, summaries, listed, bias, chunks.lengths, chunks.documents, kernel=kernel)


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """Forward and backward of every kernel, over lists of every kind."""
    for form, slots, channels, size in LAUNCHES:
        inputs = Inputs.draw(
            device, slots, form=form, batch=1 if slots > 1000 else 2, heads=4, groups=2, channels=channels, size=size,
            window=2, recalled=3,
        )  # fmt: skip
        for kernel, attend in kernels(inputs).items():
            yield f"{form} d={channels} C={size}, {kernel}", lambda: list(inputs.run(attend).values())


def benchmarks(clock: Clock, lengths: Sequence[int]) -> Iterator[Timing]:
    """Both passes by every kernel, against dense SDPA and FlexAttention over the same lists; the recall's share."""
    for slots in lengths:
        inputs = Inputs.draw(clock.device, slots)
        # what a pair costs: a product of d channels is d multiplications and additions
        dense_pairs, cost = inputs.q.shape[2] * slots * (slots + 1) // 2, 2 * inputs.q.shape[3]
        pairs, dense = inputs.pairs, _dense(clock, inputs)
        peers = dict(dense)
        if clock.device.type == "cuda" and slots == GOALS_AT:
            peers["flex"] = _passes(clock, inputs, partial(block_attention, backend="flex"))
        fastest = None
        for kernel, attend in kernels(inputs).items():
            times = _passes(clock, inputs, attend)
            fastest = min(fastest or times["forward"], times["forward"])
            for phase, ms in times.items():
                flops = PRODUCTS[phase] * cost * pairs
                rate = None
                if "cuDNN" in dense:
                    rate = PRODUCTS[phase] * cost * dense_pairs / dense["cuDNN"][phase]
                yield Timing(
                    f"{phase}, {kernel}", slots, ms, 0, {name: each[phase] for name, each in peers.items()}, None,
                    _goal(phase, slots, flops / ms, rate, ms, peers), flops,
                )  # fmt: skip
        if fastest is None:
            continue
        ms = _recall(clock, slots)
        goal = f"goal {RECALL_GOAL} of the forward: {ms / fastest:.3f}, {_met(ms <= RECALL_GOAL * fastest)}"
        yield Timing("recall: pool, codes, top 16", slots, ms, 0, {"forward": fastest}, None, goal)


def _goal(
    phase: str, slots: int, rate: float, dense_rate: float | None, ms: float, peers: dict[str, dict[str, float]]
) -> str:
    """How far the goals of a pass are met; rates in flops per ms."""
    share, dense, flex = GOALS[phase]
    told = []
    if dense_rate is not None and slots >= 32768:
        told.append(f"goal {share} of cuDNN's TFLOP/s: {rate / dense_rate:.2f}, {_met(rate >= share * dense_rate)}")
    for name, times in (("cuDNN", dense), ("flex", flex)):
        if slots == GOALS_AT and name in peers:
            told.append(f"{times:g}x {name} {_met(peers[name][phase] >= times * ms)}")
    return ", ".join(told)


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def _passes(clock: Clock, inputs: Inputs, attend: Callable[..., Tensor]) -> dict[str, float]:
    """ms of the forward alone and of the backward alone."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors().items()}
    return _both(
        clock, lambda: inputs.call(attend, leaves), lambda out: list(inputs.gradients(out, leaves, keep=True).values())
    )


def _both(clock: Clock, forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> dict[str, float]:
    """ms of `forward` without and of `backward` with a graph."""
    with torch.no_grad():
        first = clock.ms(forward)
    out = forward()
    return {"forward": first, "backward": clock.ms(lambda: backward(out))}


def _dense(clock: Clock, inputs: Inputs) -> dict[str, dict[str, float]]:
    """ms of both passes of dense causal attention by each of PyTorch's kernels that runs it; of long rows by the fastest."""
    if clock.device.type != "cuda":
        return {"SDPA": _both(clock, *_sdpa(inputs, nullcontext, grouped=True))}
    found = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        if "cuDNN" in found and inputs.q.shape[1] > GOALS_AT:
            break
        for grouped in (True, False):
            try:
                found[name] = _both(clock, *_sdpa(inputs, partial(sdpa_kernel, backend), grouped))
            except RuntimeError:
                continue
            break
    return found


def _sdpa(
    inputs: Inputs, context: Callable[[], AbstractContextManager[object]], grouped: bool
) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]]:
    """`grouped`: with as many KV heads as there are; else each repeated beforehand."""
    fan = inputs.q.shape[2] // inputs.k.shape[2]
    tensors = [inputs.q, *(x if grouped else x.repeat_interleave(fan, dim=2) for x in (inputs.k, inputs.v))]
    # [B, S, H, d] -> [B, H, S, d]
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in tensors]
    upstream = inputs.upstream.transpose(1, 2)

    def forward() -> Tensor:
        with context():
            return F.scaled_dot_product_attention(
                *leaves, is_causal=True, scale=inputs.scale, enable_gqa=grouped and fan > 1
            )

    return forward, lambda out: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _recall(clock: Clock, slots: int) -> float:
    """ms of the three kernels of the recall for this layer."""
    inputs = Recall.draw(clock.device, slots)
    return clock.ms(inputs.kernels)
