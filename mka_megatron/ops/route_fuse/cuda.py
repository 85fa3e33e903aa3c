"""The CUDA kernels of route_fuse as the operator mka::route_fuse. Shapes: B batch, S slots, G KV heads, d channels.

The operator's tensors come as lists over the streams; an absent one is an empty list, so that its gradient is too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mka_megatron.ops import library
from mka_megatron.ops.route_fuse.route import route
from mka_megatron.ops.route_fuse.slots import pack
from mka_megatron.ops.scan import Rows

if TYPE_CHECKING:
    from mka_megatron.ops.route_fuse import Stream

MODES = {"soft": 0, "fixed": 1, "top1": 2, "top2": 3}
DTYPES = tuple(library.DTYPES)
_STREAMS = 2


class Args(ctypes.Structure):
    """RouteFuseArgs of c_api.h."""

    _fields_ = [
        *((name, ctypes.c_void_p * _STREAMS) for name in ("x", "long_term", "decay", "carry")),
        *((name, ctypes.c_void_p) for name in ("logits", "beta", "slots")),
        *((name, ctypes.c_void_p * _STREAMS) for name in ("y", "last", "states", "grad_y", "grad_last")),
        *((name, ctypes.c_void_p * _STREAMS) for name in ("grad_x", "grad_long_term", "grad_decay", "grad_carry")),
        *((name, ctypes.c_void_p) for name in ("grad_logits", "grad_beta", "workspace")),
        *((name, ctypes.c_int64 * (3 * _STREAMS)) for name in ("x_strides", "grad_strides")),
        *((name, ctypes.c_int64) for name in ("batch", "sequence", "groups", "channels", "streams")),
        *((name, ctypes.c_int64) for name in ("routes", "levels", "mode", "dtype")),
    ]


def arguments(mode: str, x: Sequence[Tensor], logits: Tensor, **tensors: Tensor | Sequence[Tensor | None]) -> Args:
    """The struct over tensors on any device; the sizes are those of `x` and of `logits` [B, S, (G,) L]."""
    args = Args()
    for name, value in {"x": x, "logits": logits, **tensors}.items():
        if isinstance(value, Tensor):
            setattr(args, name, library.pointer(value))
        else:
            for stream, each in enumerate(value):
                getattr(args, name)[stream] = library.pointer(each)
    for name, given in (("x_strides", x), ("grad_strides", tensors.get("grad_y", ()))):
        for stream, each in enumerate(given):
            assert each is not None
            getattr(args, name)[3 * stream : 3 * stream + 3] = library.strides(each)
    args.batch, args.sequence, args.groups, args.channels = x[0].shape
    args.streams, args.levels, args.mode = len(x), logits.shape[-1], MODES[mode]
    args.routes = args.groups if logits.dim() == 4 else 1
    args.dtype = library.DTYPES[x[0].dtype]
    return args


def states_shape(lib: ctypes.CDLL, args: Args) -> tuple[int, int, int]:
    """Of the states that the backward needs of each stream."""
    plan = (ctypes.c_int64 * 4)()
    lib.mka_plan_route_fuse(ctypes.byref(args), plan)
    return args.batch, plan[1], args.groups * args.channels


def workspace_bytes(lib: ctypes.CDLL, args: Args, backward: bool) -> int:
    """Bytes that a pass needs."""
    lib.mka_route_fuse_workspace_bytes.restype = ctypes.c_int64
    return lib.mka_route_fuse_workspace_bytes(ctypes.byref(args), int(backward))


def lacks(channels: int, dtype: torch.dtype, summary: str) -> str:
    """Why there is no kernel for heads of so many channels, a dtype and a kind of L2 ("ema" or "mean"); "": there is."""
    if dtype not in DTYPES:
        return f"its dtypes are {', '.join(map(str, DTYPES))}, not {dtype}"
    lanes = 16 // dtype.itemsize
    if channels % lanes:
        return f"a head's channels must be a multiple of {lanes}, not {channels}"
    return "it has the EMA, not the prefix mean" if summary == "mean" else ""


def route_fuse(
    streams: Sequence[Stream], logits: Tensor, beta: Tensor, rows: Rows, available: Tensor | None, mode: str
) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
    """As the contract says, for tensors on one GPU of which :func:`lacks` says nothing.

    Raises ValueError for other types or devices, LibraryError where the kernels are not there.
    """
    shape, device = streams[0].x.shape, streams[0].x.device
    for each in streams:
        if each.summary is not None:
            raise ValueError("L2 is given as a summary: the kernels have the EMA, take the reference.")
        for name, x in (("x", each.x), ("long_term", each.long_term)):
            if x is not None:
                library.check(name, x, shape, DTYPES, device, strided=True)
    if problem := lacks(shape[3], streams[0].x.dtype, "ema"):
        raise ValueError(f"route_fuse has no kernel: {problem}.")
    wide = [x.contiguous() for x in (logits.float(), beta.float().reshape(1))]
    # an expanded decay's gradient is summed by autograd
    decay = [s.decay.float().expand(shape[2:]).contiguous() for s in streams if s.decay is not None]
    carry = [s.carry.float().contiguous() for s in streams if s.carry is not None]
    if len(carry) not in (0, len(streams)):
        raise ValueError("one stream has a carry and the other none: give both or neither.")
    long_term = [s.long_term.contiguous() for s in streams if s.long_term is not None]
    slots = pack(rows, available, logits.shape[-1], bool(carry))
    library.check("rows", slots, shape[:2], (torch.uint8,), device)
    out = _forward([s.x for s in streams], long_term, decay, carry, *wide, slots, mode)
    count = len(streams)
    lasts = out[count : 2 * count] if decay else [None] * count
    return list(zip(out[:count], lasts, strict=True)), route(logits.detach(), available, mode)


def _fake(
    x: list[Tensor], long_term: list[Tensor], decay: list[Tensor], carry: list[Tensor], logits: Tensor, beta: Tensor,
    slots: Tensor, mode: str,
) -> list[Tensor]:  # fmt: skip
    batch, sequence, groups, channels = x[0].shape
    y = [_empty(each) for each in x]
    if not decay:
        return y
    chunk = chunk_tokens(channels, x[0].element_size(), bool(long_term))
    chunks = (sequence + chunk - 1) // chunk
    last = [each.new_empty(batch, groups, channels, dtype=torch.float32) for each in x]
    states = [each.new_empty(batch, chunks, groups * channels, dtype=torch.float32) for each in x]
    return [*y, *last, *states]


def _empty(x: Tensor) -> Tensor:
    """Like `x`, but contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def chunk_tokens(channels: int, element_size: int, l3: bool) -> int:
    """Tokens of a chunk, as the kernels' plan has it (symbolic shapes cannot ask the library)."""
    vector = 16 // element_size
    lanes = 8 if channels <= 8 * vector else 16 if channels <= 16 * vector else 32
    return 256 // lanes * (4 if l3 else 8)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, long_term, decay, carry, logits, beta, slots, mode = inputs
    ctx.counts = len(x), bool(long_term), bool(decay), bool(carry)
    ctx.mode = mode
    ctx.save_for_backward(*x, *long_term, *decay, logits, beta, slots, *output[2 * len(x) :])


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count, l3, l2, carried = ctx.counts
    parts = list(ctx.saved_tensors)

    def take(number: int) -> list[Tensor]:
        taken, parts[:] = parts[:number], parts[number:]
        return taken

    x, long_term, decay = take(count), take(count * l3), take(count * l2)
    logits, beta, slots = take(3)
    batch, _, groups, channels = x[0].shape
    grad_y = [_empty(a).zero_() if g is None else g for a, g in zip(x, grads, strict=False)]
    grad_last = [
        x[0].new_zeros(batch, groups, channels, dtype=torch.float32) if g is None else g.contiguous()
        for g in grads[count : 2 * count]
    ]
    found = _backward(x, long_term, decay, logits, beta, slots, parts, grad_y, grad_last, carried, ctx.mode)

    def give(number: int) -> list[Tensor]:
        given, found[:] = found[:number], found[number:]
        return given

    grad_x, grad_l3, grad_decay = give(count), give(count * l3), give(count * l2)
    return grad_x, grad_l3, grad_decay, give(count * carried), *give(2), None, None


@library.operator("route_fuse", _fake, backward=_differentiate, save=_save)
def _forward(
    x: list[Tensor], long_term: list[Tensor], decay: list[Tensor], carry: list[Tensor], logits: Tensor, beta: Tensor,
    slots: Tensor, mode: str,
) -> list[Tensor]:  # fmt: skip
    """[y of each stream, then with L2 the last state of each and what the backward needs of each]."""
    out = _fake(x, long_term, decay, carry, logits, beta, slots, mode)
    if x[0].numel() == 0:
        for last, state in zip(out[len(x) :], carry, strict=False):
            last.copy_(state)
        return out
    count, x = len(x), [library.rows(each) for each in x]
    args = arguments(
        mode, x, logits, long_term=long_term, decay=decay, carry=carry, beta=beta, slots=slots,
        y=out[:count], last=out[count : 2 * count], states=out[2 * count :],
    )  # fmt: skip
    _run("mka_route_fuse_forward", args, x[0], backward=False)
    return out


def _fake_backward(
    x: list[Tensor], long_term: list[Tensor], decay: list[Tensor], logits: Tensor, beta: Tensor, slots: Tensor,
    states: list[Tensor], grad_y: list[Tensor], grad_last: list[Tensor], carried: bool, mode: str,
) -> list[Tensor]:  # fmt: skip
    carries = grad_last if carried else []
    return [_empty(each) for each in (*x, *long_term, *decay, *carries, logits, beta)]


@library.operator("route_fuse_backward", _fake_backward)
def _backward(
    x: list[Tensor], long_term: list[Tensor], decay: list[Tensor], logits: Tensor, beta: Tensor, slots: Tensor,
    states: list[Tensor], grad_y: list[Tensor], grad_last: list[Tensor], carried: bool, mode: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, long_term, decay and carry for each stream, then of logits and beta."""
    out = _fake_backward(x, long_term, decay, logits, beta, slots, states, grad_y, grad_last, carried, mode)
    if x[0].numel() == 0:
        return [each.zero_() for each in out]
    count, parts = len(x), iter(out)
    x, grad_y = [library.rows(each) for each in x], [library.rows(each) for each in grad_y]
    lists = {
        name: [next(parts) for _ in range(count if there else 0)]
        for name, there in (
            ("grad_x", True), ("grad_long_term", bool(long_term)), ("grad_decay", bool(decay)), ("grad_carry", carried),
        )
    }  # fmt: skip
    args = arguments(
        mode, x, logits, long_term=long_term, decay=decay, beta=beta, slots=slots, states=states, grad_y=grad_y,
        grad_last=grad_last, **lists, grad_logits=next(parts), grad_beta=next(parts),
    )  # fmt: skip
    _run("mka_route_fuse_backward", args, x[0], backward=True)
    return out


def _run(entry: str, args: Args, x: Tensor, *, backward: bool) -> None:
    size = workspace_bytes(library.library(), args, backward)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    args.workspace = workspace.data_ptr()
    library.run(entry, args, x.device)
