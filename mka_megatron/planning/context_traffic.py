"""Bytes that a context-parallel rank sends in one layer and pass, as parallel/context.py counts them (its purposes).

Rows are one unbroken document each. Rank r of P holds S slots of every row.

Letters: B rows, S slots of a rank, G local KV heads, d channels, C chunk size, n = S/C chunks of a rank, R recalled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, recalls
from mka_megatron.planning.steps import Layout

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_STATE = 4
"""Bytes of a number of the EMA's state (fp32)."""
_WIDE = 8
"""Bytes of a word of a code, and of a number of a selecting query (fp64)."""
_SELECTING = 16
"""Queries that select, as memory/hashing.py has it."""


def layer_traffic(config: Config, layout: Layout, rank: int) -> Counter[str]:
    """Bytes that `rank` of the context-parallel ranks sends, forward and backward, by purpose.

    Recalled chunks are those of the worst case: each that may be is recalled by some chunk of every later rank, as
    far as R goes. All others are exact.
    """
    found: Counter[str] = Counter()
    if layout.context == 1:
        return found
    sizes = _Sizes.of(config, layout)
    variant, memory = VARIANTS[config.attention.variant], config.memory_hierarchy
    levels, block = variant.levels(config), block_core(config)
    if levels > 1 and memory.l2.enabled and memory.l2.summary == "ema":
        fused = "kv" if variant.attends_each_level else config.attention.fuse
        for name in fused:
            _gathered(found, sizes, rank, f"carry {name}", sizes.rows * sizes.key * _STATE)
    if block or (recalls(config) and levels > 1):
        means = sizes.rows * sizes.chunks * (sizes.key + sizes.value) * sizes.width
        _gathered(found, sizes, rank, "summaries", means, gradient=memory.l2.enabled or not block)
        if recalls(config):
            _selection(found, sizes, rank, config)
    if block:
        _pieces(found, sizes, rank, config)
    else:
        message = sizes.rows * sizes.slots * (sizes.key + sizes.value) * sizes.width
        for _ in range(levels if variant.attends_each_level else 1):
            _gathered(found, sizes, rank, "keys and values", message)
    return Counter({purpose: sent for purpose, sent in found.items() if sent})


@dataclass(frozen=True)
class _Sizes:
    rows: int
    slots: int
    chunk: int
    groups: int
    key: int
    """Channels of a token's keys, all local heads."""
    value: int
    width: int
    ranks: int
    forwards: int
    """Times that the forward's exchanges run: again where it is recomputed."""

    @property
    def chunks(self) -> int:
        return self.slots // self.chunk

    @classmethod
    def of(cls, config: Config, layout: Layout) -> _Sizes:
        model, variant, mla = config.model, VARIANTS[config.attention.variant], config.attention.mla
        groups = max(1, variant.kv_heads(model) // layout.tensor)
        latent = variant.projection == "latent"
        return cls(
            rows=config.training.micro_batch_size,
            slots=config.data.sequence_length // layout.context,
            chunk=config.memory_hierarchy.l1.chunk_size,
            groups=groups,
            key=groups * (mla.qk_nope_head_dim + mla.qk_rope_head_dim if latent else model.head_dim),
            value=groups * (mla.v_head_dim if latent else model.head_dim),
            width=_WIDTH[config.training.precision],
            ranks=layout.context,
            forwards=1 if config.training.recompute == "none" else 2,
        )


def _gathered(found: Counter[str], sizes: _Sizes, rank: int, purpose: str, message: int, gradient: bool = True) -> None:
    """Every rank's `message` to all others, and gradients to the owners before this rank."""
    found[purpose] += sizes.forwards * (sizes.ranks - 1) * message
    if gradient:
        found[f"{purpose} gradient"] += rank * message


def _selection(found: Counter[str], sizes: _Sizes, rank: int, config: Config) -> None:
    """Codes to all, and the last queries to the ranks that find fewer than 16 on those between."""
    l3 = config.memory_hierarchy.l3
    words = l3.hash_tables * l3.hash_bits // 64 if l3.selection == "hash" else config.model.head_dim
    codes = sizes.rows * sizes.chunks * sizes.groups * words * _WIDE
    _gathered(found, sizes, rank, "signatures", codes, gradient=False)
    takers = min(sizes.ranks - 1 - rank, -(-_SELECTING // sizes.slots))
    found["queries"] += sizes.forwards * takers * sizes.rows * _SELECTING * sizes.key * _WIDE


def _pieces(found: Counter[str], sizes: _Sizes, rank: int, config: Config) -> None:
    """The window's halo and the recalled chunks, which go where they are wanted, and their gradients back."""
    memory = config.memory_hierarchy
    before = (memory.l1.window or 0) // sizes.chunk - 1
    token = (sizes.key + sizes.value) * sizes.width

    def halo(owner: int, taker: int) -> int:
        low, high = max(owner * sizes.chunks, taker * sizes.chunks - before), (owner + 1) * sizes.chunks
        return max(0, min(high, taker * sizes.chunks) - low)

    def pages(owner: int, taker: int) -> int:
        held = taker * sizes.chunks - before
        return min(max(0, min(held - owner * sizes.chunks, sizes.chunks)), sizes.chunks * memory.l3.recalled_chunks)

    wanted = {"halo": halo} | ({"pages": pages} if recalls(config) else {})
    for purpose, chunks in wanted.items():
        given = sum(chunks(rank, taker) for taker in range(rank + 1, sizes.ranks))
        taken = sum(chunks(owner, rank) for owner in range(rank))
        found[purpose] += sizes.forwards * given * sizes.rows * sizes.chunk * token
        found[f"{purpose} gradient"] += taken * sizes.rows * sizes.chunk * token
    if recalls(config):
        found["requests"] += sizes.forwards * (sizes.ranks - 1) * sizes.rows * sizes.groups * sizes.chunks
