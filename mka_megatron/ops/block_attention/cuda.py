"""The CUDA kernels of block_attention as the operator mka::block_attention.

Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, N chunks of the row, h halo chunks, w window in
chunks, H query heads, G KV heads, F = H/G, d channels, U summaries, M pages, R recalled chunks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mka_megatron.ops import library
from mka_megatron.ops.block_attention.layout import Layout

CHANNELS = (64, 128)
SIZES = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
KERNELS = {"best": 0, "mma": 1, "wgmma": 2}
"""The best for the device; for tensor cores from sm_80 on; for those of sm_90, as far as there are some."""


class Args(ctypes.Structure):
    """MkaBlockAttentionArgs of c_api.h."""

    _fields_ = library.fields(
        q="p", k="p", v="p", summary_k="p", summary_v="p", page_k="p", page_v="p", page_lengths="p", index="p",
        bias="p", lengths="p", documents="p", out="p", lse="p", grad_out="p", grad_q="p", grad_k="p", grad_v="p",
        grad_summary_k="p", grad_summary_v="p", grad_page_k="p", grad_page_v="p", grad_bias="p", workspace="p",
        q_strides="i3", k_strides="i3", v_strides="i3", summary_k_strides="i3", summary_v_strides="i3",
        bias_strides="i3", grad_strides="i3",
        batch="i", slots="i", heads="i", groups="i", channels="i", size="i", first="i", chunks="i", summaries="i",
        pages="i", recalled="i", window="i", dtype="i", kernel="i", scale="f",
    )  # fmt: skip


SMALL = ((8, 6), (8, 9))
"""Compute capabilities with 99 KB of shared memory for a block: less than the backward takes for 128 channels."""


def lacks(channels: int, size: int, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> str:
    """Why there is no kernel for heads of so many channels, a chunk size and a dtype on a GPU; "": there is."""
    if dtype not in DTYPES:
        return f"its dtypes are {' and '.join(map(str, DTYPES))}, not {dtype}"
    if channels not in CHANNELS:
        return f"a head must have {' or '.join(map(str, CHANNELS))} channels, not {channels}"
    if size not in SIZES:
        return f"its chunk sizes are {' and '.join(map(str, SIZES))}, not {size}"
    if channels > 64 and capability is not None and capability in SMALL:
        at = "sm_{}{}".format(*capability)
        return f"a head of {channels} channels needs more shared memory than {at} has"
    return ""


def attention(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    lengths: Tensor,
    documents: Tensor,
    kernel: str = "best",
) -> Tensor:
    """:func:`block_attention` over arguments that fit together; pages: (k, v, lengths, index); kernel: one of KERNELS.

    Raises ValueError for types, sizes or devices without a kernel, LibraryError where the kernels are not there.
    """
    if problem := lacks(q.shape[3], layout.size, q.dtype, library.capability(q.device.type)):
        raise ValueError(f"block_attention has no kernel: {problem}.")
    if not 0 < layout.scale < math.inf:
        raise ValueError(f"scale is {layout.scale}: the kernels need a positive one.")
    summary_k, summary_v = summaries or (None, None)
    page_k, page_v, page_lengths, index = pages or (None, None, None, None)
    tensors = {"q": q, "k": k, "v": v, "summary k": summary_k, "summary v": summary_v, "page k": page_k, "page v": page_v}
    for name, x in tensors.items():
        if x is not None:
            library.check(name, x, x.shape, (q.dtype,), q.device, strided=True)
    for name, x in {"chunk lengths": lengths, "documents": documents, "page lengths": page_lengths, "index": index}.items():
        if x is not None:
            library.check(name, x, x.shape, (torch.int64,), q.device, strided=True)
    if bias is not None:
        library.check("bias", bias, bias.shape, (*DTYPES, torch.float32, torch.float64), q.device, strided=True)
        bias = bias.float()
    sizes = layout.size, layout.first, layout.window, layout.scale, KERNELS[kernel]
    return _forward(*tensors.values(), page_lengths, index, bias, lengths, documents, *sizes)[0]


def arguments(inputs: Sequence[Tensor | None], sizes: Sequence[float], **tensors: Tensor | None) -> Args:
    """The struct over tensors on any device, as the kernels can read them; they must outlive it.

    inputs: (q, k, v, summary k and v, page k and v, page lengths, index, bias, lengths, documents). sizes: (C, first
    chunk at hand, w, scale, code of the kernel). tensors: what is written and, for the backward, grad_out, by the
    struct's names.
    """
    args = Args(*map(library.pointer, inputs))
    q, k, v, summary_k, summary_v, page_k, _, _, index, bias, lengths, _ = inputs
    assert q is not None and k is not None and lengths is not None
    strided = {
        "q": q, "k": k, "v": v, "summary_k": summary_k, "summary_v": summary_v, "bias": bias,
        "grad": tensors.get("grad_out"),
    }  # fmt: skip
    for name, x in strided.items():
        if x is not None:
            setattr(args, f"{name}_strides", library.strides(x))
    for name, x in tensors.items():
        setattr(args, name, library.pointer(x))
    args.batch, args.slots, args.heads, args.channels = q.shape
    args.groups, args.chunks, args.dtype = k.shape[2], lengths.shape[1], library.DTYPES[q.dtype]
    args.summaries = 0 if summary_k is None else summary_k.shape[1]
    args.pages = 0 if page_k is None else page_k.shape[2]
    args.recalled = 0 if index is None else index.shape[3]
    args.size, args.first, args.window, args.scale, args.kernel = sizes
    return args


def workspace_bytes(lib: ctypes.CDLL, args: Args, backward: bool) -> int:
    """Bytes that a pass needs."""
    lib.mka_block_attention_workspace_bytes.restype = ctypes.c_int64
    return lib.mka_block_attention_workspace_bytes(ctypes.byref(args), int(backward))


def _readable(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs of :func:`arguments` as the kernels read them."""
    strided, whole = inputs[:5], [None if x is None else x.contiguous() for x in inputs[5:]]
    bias = inputs[9]
    if bias is not None and bias.stride(-1) == 1:
        whole[4] = bias
    return [*(None if x is None else library.rows(x) for x in strided), *whole]


def _empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous; as `x` in what is not given."""
    return x.new_empty(shape or x.shape, dtype=dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor | None, summary_v: Tensor | None, page_k: Tensor | None,
    page_v: Tensor | None, page_lengths: Tensor | None, index: Tensor | None, bias: Tensor | None, lengths: Tensor,
    documents: Tensor, size: int, first: int, window: int, scale: float, kernel: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, slots, heads, _ = q.shape
    return _empty(q), _empty(q, batch, heads, slots, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.sizes = inputs[12:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    none = (None,) * (12 + len(ctx.sizes))
    if grad is None:
        return none
    found = _backward(grad, out, lse, *inputs, *ctx.sizes)
    # q, k, v, the summaries', the pages' and the bias's, of those that there are
    given = iter(found)
    there = (*inputs[:7], None, None, inputs[9])
    return *(None if x is None else next(given) for x in there), *none[10:]


@library.operator("block_attention", _fake, backward=_differentiate, save=_save)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor | None, summary_v: Tensor | None, page_k: Tensor | None,
    page_v: Tensor | None, page_lengths: Tensor | None, index: Tensor | None, bias: Tensor | None, lengths: Tensor,
    documents: Tensor, size: int, first: int, window: int, scale: float, kernel: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(outputs, their logsumexp [B, H, S] fp32, +inf where a query sees nothing)."""
    inputs = (q, k, v, summary_k, summary_v, page_k, page_v, page_lengths, index, bias, lengths, documents)
    sizes = size, first, window, scale, kernel
    out, lse = _fake(*inputs, *sizes)
    if q.numel() == 0:
        return out, lse
    readable = _readable(inputs)
    _run("mka_block_attention_forward", arguments(readable, sizes, out=out, lse=lse), q, backward=False)
    return out, lse


def _fake_backward(
    grad: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor | None, summary_v: Tensor | None, page_k: Tensor | None,
    page_v: Tensor | None, page_lengths: Tensor | None, index: Tensor | None, bias: Tensor | None, lengths: Tensor,
    documents: Tensor, size: int, first: int, window: int, scale: float, kernel: int,
) -> list[Tensor]:  # fmt: skip
    return [_empty(x) for x in (q, k, v, summary_k, summary_v, page_k, page_v, bias) if x is not None]


@library.operator("block_attention_backward", _fake_backward)
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, summary_k: Tensor | None, summary_v: Tensor | None, page_k: Tensor | None,
    page_v: Tensor | None, page_lengths: Tensor | None, index: Tensor | None, bias: Tensor | None, lengths: Tensor,
    documents: Tensor, size: int, first: int, window: int, scale: float, kernel: int,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, the summaries, the pages and the bias, of those that there are."""
    inputs = (q, k, v, summary_k, summary_v, page_k, page_v, page_lengths, index, bias, lengths, documents)
    sizes = size, first, window, scale, kernel
    if q.numel() == 0:
        return [x.zero_() for x in _fake_backward(grad, out, lse, *inputs, *sizes)]
    names = ("q", "k", "v", "summary_k", "summary_v", "page_k", "page_v")
    found = {
        f"grad_{name}": _empty(x) for name, x in zip(names, inputs[:7], strict=True) if x is not None
    }
    wide = None if bias is None else _empty(q, *q.shape[:3], 3, dtype=torch.float32)
    readable, grad = _readable(inputs), library.rows(grad)
    args = arguments(readable, sizes, out=out, lse=lse, grad_out=grad, grad_bias=wide, **found)
    _run("mka_block_attention_backward", args, q, backward=True)
    grads = list(found.values())
    if bias is not None and wide is not None:
        # [B, S, H, 3] -> [B, S, G or 1, F or H, 3]
        grads.append(wide.unflatten(2, (bias.shape[2], -1)).sum(dim=3))
    return grads


def _run(entry: str, args: Args, x: Tensor, *, backward: bool) -> None:
    size = workspace_bytes(library.library(), args, backward)
    workspace = torch.empty(max(size, 0), dtype=torch.uint8, device=x.device)
    args.workspace = workspace.data_ptr()
    library.run(entry, args, x.device)
