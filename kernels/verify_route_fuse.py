"""verify.py's section on route_fuse: outputs and every gradient against the specification in fp64.

The layer that is timed is Qwen2.5-7B's: keys and values of 4 heads, 128 channels, bf16, one route per token over L1, L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from verify_common import Check, Clock, Timing, as_accurate, largest_error

from mka_megatron.memory.documents import Documents
from mka_megatron.ops import route_fuse as op
from mka_megatron.ops.route_fuse import Stream, cuda
from mka_megatron.ops.route_fuse.slots import pack

GOALS = {"forward": 0.88, "backward": 0.80}
"""Shares of a copy's bandwidth, from 32K slots on."""
LEVELS = {"L2": 2, "L3": 2, "L2 L3": 3}


@dataclass(frozen=True)
class Inputs:
    """One call's tensors; shapes as in mka_megatron.ops.route_fuse."""

    streams: list[Stream]
    logits: Tensor
    beta: Tensor
    rows: Documents
    available: Tensor | None
    grads: list[Tensor]
    """Upstream gradients, of y and with L2 of the last state, for each stream."""
    mode: str = "soft"

    @staticmethod
    def draw(
        device: torch.device,
        slots: int,
        *,
        batch: int = 1,
        groups: int = 4,
        channels: int = 128,
        streams: int = 2,
        levels: str = "L2",
        scope: str = "token",
        dtype: torch.dtype = torch.bfloat16,
        packed: bool = False,
        carried: bool = False,
        mode: str = "soft",
        seed: int = 0,
    ) -> Inputs:
        """Random ones; `packed`: documents, padding and, for L3, slots where it holds nothing."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def likely(share: float, *shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device) < share

        shape, count = (batch, slots, groups, channels), LEVELS[levels]
        rows, available = Documents.unpacked(batch, slots, device), None
        if packed:
            starts = likely(0.01, batch, slots)
            starts[:, 0] = True
            padding = ~starts & likely(0.1, batch, slots)
            rows = Documents.from_starts(starts.cpu(), padding.cpu()).to(device)
            available = likely(0.7, batch, slots, *((1,) if scope == "group" else ()), count)
            available[..., 0] = True
        given, grads = [], []
        for _ in range(streams):
            l2, l3 = "L2" in levels, "L3" in levels
            # spans of 2 to 8192 tokens, as the model begins with
            decay = 1 - 2.0 ** -(1 + 12 * torch.rand(groups, channels, generator=generator, device=device))
            carry = normal(batch, groups, channels) if carried and l2 else None
            long_term = normal(*shape).to(dtype) if l3 else None
            # as a fused projection leaves it: a head's queries lie beside its keys and values
            x = normal(batch, slots, groups, channels + 2 * 8).to(dtype)[..., :channels]
            given.append(Stream(x, decay if l2 else None, carry, long_term))
            grads += [normal(*shape).to(dtype), *([normal(batch, groups, channels)] if l2 else [])]
        routes = (groups,) if scope == "group" else ()
        return Inputs(given, normal(batch, slots, *routes, count), normal(1), rows, available, grads, mode)

    def run(self, backend: str, wide: bool = False) -> dict[str, Tensor]:
        """Outputs and gradients; `wide`: in fp64."""

        def put(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(torch.float64 if wide else x.dtype).requires_grad_()

        streams = [Stream(put(s.x), put(s.decay), put(s.carry), put(s.long_term)) for s in self.streams]  # type: ignore[arg-type]
        logits, beta = put(self.logits.clone()), put(self.beta.clone())
        assert logits is not None and beta is not None
        results, _ = op.route_fuse(
            streams, logits, beta, self.rows, self.available, mode=self.mode, backend=backend
        )
        leaves = {"logits": logits, "beta": beta}
        outputs: dict[str, Tensor] = {}
        for number, (each, (y, last)) in enumerate(zip(streams, results, strict=True)):
            outputs[f"y{number}"] = y
            if last is not None:
                outputs[f"last{number}"] = last
            for name in ("x", "decay", "carry", "long_term"):
                if getattr(each, name) is not None:
                    leaves[f"{name}{number}"] = getattr(each, name)
        upstream = [g.to(y.dtype) for g, y in zip(self.grads, outputs.values(), strict=True)]
        wanted = list(leaves.values())
        grads = torch.autograd.grad(
            list(outputs.values()), wanted, upstream, allow_unused=True, materialize_grads=True
        )
        return {**{name: y.detach() for name, y in outputs.items()}, **{f"d {name}": g for name, g in zip(leaves, grads, strict=True)}}


def checks(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """Every length; at short ones also every type, head size, scope, set of levels, mode and packing."""
    for slots in lengths:
        cases = [("", Inputs.draw(device, slots, groups=1 if slots > 4096 else 4))]
        if slots <= 4096:
            cases += _variations(device, slots)
        for case, inputs in cases:
            found, peer, exact = (
                inputs.run("cuda"),
                inputs.run("reference"),
                inputs.run("reference", wide=True),
            )
            for name, expected in exact.items():
                yield _check(f"S={slots} {case}: {name}", inputs, name, found[name], peer[name], expected)


def _check(case: str, inputs: Inputs, name: str, found: Tensor, peer: Tensor, exact: Tensor) -> Check:
    """In low precision by PyTorch's error in the same; in fp32, which both have, by the roundoff of the longest sum."""
    if found.dtype != torch.float32:
        return as_accurate(case, found, peer, exact)
    batch, slots, groups, channels = inputs.streams[0].x.shape
    terms = 64
    if name == "d logits":
        terms += len(inputs.streams) * groups * channels
    elif name == "d beta" or name.startswith("d decay"):
        terms += batch * slots
    scale = max(1.0, float(exact.abs().max()))
    return Check(case, largest_error(found, exact), terms * torch.finfo(found.dtype).eps * scale)


def _variations(device: torch.device, slots: int) -> list[tuple[str, Inputs]]:
    cases = []
    for levels in LEVELS:
        for scope in ("token", "group"):
            draw = Inputs.draw(
                device,
                slots,
                batch=3,
                groups=2,
                levels=levels,
                scope=scope,
                packed=True,
                carried=scope == "group",
                seed=1,
            )
            cases.append((f"{levels}, route per {scope}, packed", draw))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (64, 128, 256):
            draw = Inputs.draw(
                device, slots, batch=2, groups=1, channels=channels, dtype=dtype, streams=1, seed=2
            )
            cases.append((f"d={channels} {str(dtype)[6:]}", draw))
    for mode in ("fixed", "top1", "top2"):
        cases.append(
            (mode, Inputs.draw(device, slots, groups=1, channels=64, levels="L2 L3", mode=mode, seed=3))
        )
    return cases


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """Forward and backward over several groups of the look-back."""
    for channels, levels in ((64, "L2"), (128, "L2 L3"), (256, "L2"), (128, "L3")):
        inputs = Inputs.draw(
            device,
            2500,
            batch=2,
            groups=2,
            channels=channels,
            levels=levels,
            packed=True,
            carried=True,
            scope="group",
        )
        yield f"d={channels} {levels}", lambda: list(inputs.run("cuda").values())  # noqa: B023


def benchmarks(clock: Clock, lengths: Sequence[int]) -> Iterator[Timing]:
    """Both passes as CUDA graphs, against what training runs without the kernels, and the specification compiled."""
    for slots in lengths:
        inputs = Inputs.draw(clock.device, slots)
        times = {name: clock.ms(_captured(clock.device, run)) for name, run in _passes(inputs).items()}
        peers: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        _time(clock, inputs, peers, "eager", lambda *given: _specified(inputs.rows, *given))  # noqa: B023
        if slots <= 16384:
            _time(clock, inputs, peers, "compiled", torch.compile(_doubled, dynamic=False))
        streams = sum(each.x.nbytes for each in inputs.streams)
        for phase, ms in times.items():
            moved = (2 if phase == "forward" else 3) * streams
            share = clock.share(ms, moved)
            goal = f"goal: {GOALS[phase]} of a copy"
            if slots >= 32768:
                goal += ", met" if share >= GOALS[phase] else ", missed"
            yield Timing(phase, slots, ms, moved, peers[phase], share, goal)


def _passes(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The operators' calls of the forward and of the backward pass."""
    x = [s.x for s in inputs.streams]
    decay = [s.decay for s in inputs.streams if s.decay is not None]
    fixed = inputs.logits, inputs.beta, pack(inputs.rows, inputs.available, inputs.logits.shape[-1], False)
    states = cuda._forward(x, [], decay, [], *fixed, "soft")[4:]
    grads = inputs.grads[0::2], inputs.grads[1::2]
    return {
        "forward": lambda: cuda._forward(x, [], decay, [], *fixed, "soft"),
        "backward": lambda: cuda._backward(x, [], decay, *fixed, states, *grads, False, "soft"),
    }


def _specified(rows: Documents, *given: Tensor) -> list[Tensor]:
    """What training runs without the kernels, over (logits, beta, x, decay, x, decay)."""
    logits, beta, *streams = given
    pairs = zip(streams[0::2], streams[1::2], strict=True)
    return [y for y, _ in op.route_fuse([Stream(x, decay) for x, decay in pairs], logits, beta, rows)[0]]


def _doubled(*given: Tensor) -> list[Tensor]:
    """The same of one document in a form that torch.compile fuses: the scan in log2(S) steps over all slots."""
    logits, beta, *streams = given
    share = (beta * logits.softmax(dim=-1)[..., 1])[..., None, None]
    fused = []
    for x, decay in zip(streams[0::2], streams[1::2], strict=True):
        wide = x.float()
        state = torch.cat((wide[:, :1], (1 - decay) * wide[:, 1:]), dim=1)
        reach, power = 1, decay
        while reach < x.shape[1]:
            state = state + power * F.pad(state[:, :-reach], (0, 0, 0, 0, reach, 0))
            reach, power = 2 * reach, power * power
        fused.append((wide + share * (state - wide)).to(x.dtype))
    return fused


def _time(
    clock: Clock,
    inputs: Inputs,
    peers: dict[str, dict[str, float]],
    name: str,
    function: Callable[..., list[Tensor]],
) -> None:
    """Adds the times of both passes of `function`; the backward's is that of both less the forward's."""
    leaves = [x.detach().requires_grad_() for s in inputs.streams for x in (s.x, s.decay) if x is not None]
    logits, beta = inputs.logits.detach().requires_grad_(), inputs.beta.detach().requires_grad_()
    given = (logits, beta, *leaves)

    def both() -> None:
        torch.autograd.grad(function(*given), [logits, beta, *leaves], inputs.grads[0::2])

    with torch.no_grad():
        peers["forward"][name] = clock.ms(lambda: function(*given))
    peers["backward"][name] = max(clock.ms(both) - peers["forward"][name], 0.0)


def _captured(device: torch.device, function: Callable[[], object]) -> Callable[[], object]:
    """`function` as a CUDA graph, so that Python's time is not measured."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    return lambda: (graph.replay(), kept)
