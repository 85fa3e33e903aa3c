"""The attention cores that tools/bench_attention.py measures, from q, k and v on, and what each has to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mka_megatron.attention.grouped import causal_attention
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import NO_MEMORY, Pages
from mka_megatron.ops import library
from mka_megatron.ops.block_attention import block_attention, cuda
from mka_megatron.ops.block_attention.layout import Layout
from mka_megatron.ops.recall import cuda as recall

MLA_WIDTHS = 192, 128
"""Channels of DeepSeek's query and key heads, 64 of them rotary, and of its value heads."""
NSA_BLOCK = 64


@dataclass(frozen=True)
class Setting:
    """What all points share, but for the heads of a variant that names its own."""

    device: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    window: int
    recalled: int
    hash_bits: int
    backend: str
    forward_only: bool
    repeats: int
    layer: bool = False

    @property
    def mla_heads(self) -> int:
        """DeepSeek-V3 has 128 for a hidden size of 7168."""
        return max(1, round(self.heads * self.head_dim / 56))

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random leaf; its values depend on the seed alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        dtype = getattr(torch, self.dtype) if dtype is None else dtype
        x = torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)
        return x.requires_grad_(not self.forward_only)


@dataclass(frozen=True)
class Work:
    """What is timed."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """Whose gradients the backward computes."""
    shape: tuple[int, ...]
    """Of the output."""


def nothing(setting: Setting) -> str:
    """It runs everywhere."""
    return ""


@dataclass(frozen=True)
class Core:
    """One of the contenders."""

    make: Callable[[Setting, int], Work]
    """For rows of so many tokens."""
    pairs: Callable[[int, Setting], int]
    """Query-key pairs per head that it has to score."""
    cost: Callable[[Setting], int]
    """Multiplications and additions of the forward's products per such pair, over all heads."""
    lacks: Callable[[Setting], str] = nothing
    """Why it cannot run here; "": it can."""
    compiled: bool = False
    """For the shapes that it meets first."""


def projected(setting: Setting, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, as if rotated."""
    q = setting.normal(1, length, setting.heads, setting.head_dim, seed=0)
    k, v = (setting.normal(1, length, setting.kv_heads, setting.head_dim, seed=seed) for seed in (1, 2))
    return q, k, v


def dense(setting: Setting, length: int) -> Work:
    """Dense causal attention, as the variants' dense core runs it."""
    documents = Documents.unpacked(1, length)
    q, k, v = projected(setting, length)
    return Work(lambda: causal_attention(q, k, v, documents, setting.head_dim**-0.5), [q, k, v], q.shape)


def mla(setting: Setting, length: int) -> Work:
    """Dense attention over DeepSeek's heads for the same hidden size, as training runs it."""
    documents, (wide, narrow) = Documents.unpacked(1, length), MLA_WIDTHS
    q, k, v = (
        setting.normal(1, length, setting.mla_heads, width, seed=seed) for seed, width in enumerate((wide, wide, narrow))
    )
    return Work(lambda: causal_attention(q, k, v, documents, wide**-0.5), [q, k, v], v.shape)


def blockmka(setting: Setting, length: int) -> Work:
    """The whole block core: pool, hash, select, attend. As if q and k were both rotated and not: one stands for both."""
    q, k, v = projected(setting, length)
    bias = setting.normal(1, length, setting.kv_heads, 3, seed=3, dtype=torch.float32)
    chunks = Chunks.of(Documents.unpacked(1, length).to(setting.device), setting.chunk)
    attend = partial(block_attention, backend=setting.backend)

    def forward() -> Tensor:
        return attend(q, k, v, *remembered(setting, q, k, v), bias, **sizes(setting, chunks))

    return Work(forward, [q, k, v, bias], q.shape)


def listed(setting: Setting, length: int, attend: Callable[..., Tensor]) -> Work:
    """The attention alone, by one implementation, over lists that are selected beforehand."""
    q, k, v = projected(setting, length)
    bias = setting.normal(1, length, setting.kv_heads, 3, seed=3, dtype=torch.float32)
    chunks = Chunks.of(Documents.unpacked(1, length).to(setting.device), setting.chunk)
    with torch.no_grad():
        means, pages = remembered(setting, q, k, v)
    summaries = tuple(x.detach().requires_grad_(not setting.forward_only) for x in means)
    leaves = [q, k, v, *summaries, bias]
    return Work(lambda: attend(q, k, v, summaries, pages, bias, **sizes(setting, chunks)), leaves, q.shape)


def sizes(setting: Setting, chunks: Chunks) -> dict[str, object]:
    """The keywords of block_attention."""
    return {"chunks": chunks, "window": setting.window, "scale": setting.head_dim**-0.5}


def remembered(setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], Pages | None]:
    """The chunks' summaries, and what the hash recalls."""
    documents = Documents.unpacked(1, q.shape[1]).to(setting.device)
    chunks = Chunks.of(documents, setting.chunk)
    lacks = recall.lacks(setting.head_dim, setting.chunk, q.dtype, "hash")
    backend = library.choose("recall", "auto", setting.device, lacks)
    selector = None
    if setting.recalled:
        planes = hashing.planes(0, 1, setting.hash_bits, setting.head_dim).to(setting.device)
        selector = hashing.Selector("hash", setting.recalled, planes)
    k_mean, v_mean, codes = hashing.pooled(k, v, chunks, selector, backend=backend)
    if selector is None or codes is None:
        return (k_mean, v_mean), None
    view, window = NO_MEMORY.view, setting.window // setting.chunk
    chosen, _ = hashing.select(q, codes, documents, chunks, selector, view.queries, window, backend=backend)
    return (k_mean, v_mean), view.pages(chosen, 0, k, v)


def by_kernel(kernel: str, q: Tensor, k: Tensor, v: Tensor, summaries: tuple[Tensor, Tensor], pages: Pages | None,
              bias: Tensor, *, chunks: Chunks, window: int, scale: float) -> Tensor:  # fmt: skip
    """block_attention by one of our kernels."""
    layout = Layout.of(q, k, v, summaries, pages, bias, chunks, window, scale)
    lists = None if pages is None else (pages.k, pages.v, pages.lengths, pages.index)
    return cuda.attention(layout, q, k, v, summaries, lists, bias, chunks.lengths, chunks.documents, kernel=kernel)


def nsa(setting: Setting, length: int) -> Work:
    """Flash-linear-attention's native sparse attention: compression and as many selected tokens as the block core's window
    and recalled chunks have."""
    from fla.ops.nsa import parallel_nsa

    q, k, v = projected(setting, length)
    gates = [setting.normal(1, length, setting.heads, seed=seed) for seed in (3, 4)]
    blocks = (setting.window + setting.recalled * setting.chunk) // NSA_BLOCK
    return Work(
        lambda: parallel_nsa(q, k, v, *gates, None, block_counts=blocks, block_size=NSA_BLOCK, window_size=0),
        [q, k, v, *gates],
        q.shape,
    )


def causal_pairs(length: int, setting: Setting) -> int:
    """Every key up to the query."""
    return length * (length + 1) // 2


def block_pairs(length: int, setting: Setting) -> int:
    """The window, one summary per chunk before it, and the recalled chunks."""
    pairs = 0
    for begin in range(0, length, setting.chunk):
        here = min(setting.chunk, length - begin)
        before = begin // setting.chunk
        near = min(before, setting.window // setting.chunk - 1)
        far = before - near
        pairs += here * (here + 1) // 2 + here * (
            near * setting.chunk + far + min(far, setting.recalled) * setting.chunk
        )
    return pairs


def nsa_pairs(length: int, setting: Setting) -> int:
    """The selected tokens, and the compressed blocks before."""
    attended = min(length, setting.window + setting.recalled * setting.chunk)
    selected = attended * (attended + 1) // 2 + (length - attended) * attended
    whole, rest = divmod(length, NSA_BLOCK)
    return selected + NSA_BLOCK * whole * (whole - 1) // 2 + whole * (rest + 1)


def own_cost(setting: Setting) -> int:
    return 4 * setting.heads * setting.head_dim


def mla_cost(setting: Setting) -> int:
    return 2 * setting.mla_heads * sum(MLA_WIDTHS)


def no_cuda(setting: Setting) -> str:
    return "" if setting.device == "cuda" else "it needs a GPU"


def no_kernel(setting: Setting, hopper: bool = False) -> str:
    capability = library.capability(setting.device)
    lacks = cuda.lacks(setting.head_dim, setting.chunk, getattr(torch, setting.dtype), capability)
    there, why = library.usable(setting.device, lacks)
    if there and hopper and capability != (9, 0):
        return "it needs sm_90"
    return "" if there else why


def no_nsa(setting: Setting) -> str:
    fan = setting.heads // setting.kv_heads
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if fan < 16 or fan & (fan - 1):
        return "it takes 16, 32, ... query heads to a KV head: say nsa@64/4"
    return no_cuda(setting)


def pinned(core: Core, backend: SDPBackend) -> Core:
    """`core` by one of PyTorch's dense kernels."""

    def make(setting: Setting, length: int) -> Work:
        work = core.make(setting, length)

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return work.forward()

        return replace(work, forward=forward)

    return replace(core, make=make, lacks=no_cuda)


def with_pinned(gqa: Core, mla: Core) -> dict[str, Core]:
    """The dense ones by name: as PyTorch chooses, which may not be its fastest kernel, and pinned."""
    cudnn = SDPBackend.CUDNN_ATTENTION
    return {
        "gqa": gqa, "cudnn": pinned(gqa, cudnn), "flash": pinned(gqa, SDPBackend.FLASH_ATTENTION),
        "mla": mla, "mla-cudnn": pinned(mla, cudnn),
    }  # fmt: skip


def alone(attend: Callable[..., Tensor], lacks: Callable[[Setting], str] = nothing, compiled: bool = False) -> Core:
    return Core(partial(listed, attend=attend), block_pairs, own_cost, lacks, compiled)


CORES = {
    **with_pinned(Core(dense, causal_pairs, own_cost), Core(mla, causal_pairs, mla_cost)),
    "blockmka": Core(blockmka, block_pairs, own_cost),
    "mma": alone(partial(by_kernel, "mma"), no_kernel),
    "wgmma": alone(partial(by_kernel, "wgmma"), partial(no_kernel, hopper=True)),
    "flex": alone(partial(block_attention, backend="flex"), no_cuda, compiled=True),
    "reference": alone(partial(block_attention, backend="reference")),
    "nsa": Core(nsa, nsa_pairs, own_cost, no_nsa, compiled=True),
}
