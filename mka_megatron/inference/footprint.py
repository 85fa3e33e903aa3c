"""What generation keeps and what a token reads of it, in bytes.

Shapes: B rows, T tokens of a row, G KV heads, d channels of a key, e of a value, C chunk size, R recalled chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, effective_kv_heads, recalls
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.remembered import Remembered
from mka_megatron.memory.tiers.store import TierStore

# what a layer remembers by what it is for, beside the dense core's keys and values
_PARTS: dict[str, Callable[[Remembered], Any]] = {
    "tokens": lambda layer: () if layer.near is None else layer.near.halo(),
    "summaries": lambda layer: layer.known,
    "state": lambda layer: (layer.queries, layer.carry_k, layer.carry_v),
    "open_chunk": lambda layer: (layer.kept, layer.last_k, layer.last_v, layer.near and layer.near.open()),
    "recalled": lambda layer: (layer.selected, layer.recalled),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes that the rows' memory takes, of all layers."""

    device: dict[str, int]
    """By part. tokens: keys and values (dense core: of every token; block core: of the window's complete chunks);
    summaries: of chunks, with their codes; state: of the moving averages, and the queries that select; open_chunk: its
    raw tokens and what they were made into; recalled: the pages read last; hot: pages kept on the device."""
    allocated: int
    """Device memory behind them: tensors have room to grow, and some are parts of larger ones."""
    dram: int
    """Pages in host memory."""
    ssd: int
    """Pages on the SSD; some may be in host memory too."""

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes by tier."""
        return {"device": sum(self.device.values()), "dram": self.dram, "ssd": self.ssd}


def footprint(memory: Generation, store: TierStore | None) -> Footprint:
    """What `memory`, which keeps its pages in `store`, holds now."""
    longest = max(memory.tokens, default=0)
    parts = {
        part: sum(x.nbytes for layer in memory.layers for x in _tensors(of_layer(layer)))
        for part, of_layer in _PARTS.items()
    }
    parts["tokens"] += sum(_dense_bytes(layer, longest) for layer in memory.layers)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in memory.layers for each in fields(layer) for x in _tensors(getattr(layer, each.name))
    }  # fmt: skip
    found = None if store is None else store.statistics()
    hot = 0 if found is None else found.hbm_bytes
    return Footprint(
        {**parts, "hot": hot}, sum(storages.values()) + hot,
        0 if found is None else found.dram_bytes, 0 if found is None else found.ssd_bytes,
    )  # fmt: skip


def read_per_token(config: Config, prompt: int, new: range, itemsize: int) -> float:
    """Bytes of keys and values that the attention of a new token must read, of one row and all layers.

    Counted from the layout, whatever an implementation reads besides. Dense core: every token so far, itself included,
    of every level that is attended on its own (mla: its latent and rotary key); under L3 the means of R chunks. Block
    core: the window's tokens, a summary of every chunk before it, R chunks at most. Codes are looked at once for a
    chunk and do not count.

    Args:
        prompt: tokens before the new ones, whose open chunk is closed at its end.
        new: which new tokens, from 0; the mean over them is returned.
        itemsize: bytes of a number.
    """
    model, memory, variant = config.model, config.memory_hierarchy, VARIANTS[config.attention.variant]
    channels = 2 * model.head_dim * effective_kv_heads(config.attention.variant, model)
    if variant.projection == "latent":
        channels = config.attention.mla.kv_lora_rank + config.attention.mla.qk_rope_head_dim
    size = memory.l1.chunk_size
    levels = variant.levels(config) if variant.attends_each_level else 1

    def vectors(token: int) -> int:
        """Tokens, summaries and means that are seen."""
        if not block_core(config):
            # the last level of three has no keys in the first chunk
            late = min(size, prompt) if recalls(config) and levels > 1 else 0
            means = (
                min(memory.l3.recalled_chunks, -(-prompt // size) + token // size) if recalls(config) else 0
            )
            return levels * (prompt + token + 1) - late + means
        window = (memory.l1.window or 0) // size
        whole, number = -(-prompt // size), -(-prompt // size) + token // size
        near = range(max(0, number - window + 1), number)
        tokens = token % size + 1 + sum(size if c != whole - 1 else prompt - size * c for c in near)
        past = number - len(near)
        recalled = min(memory.l3.recalled_chunks, past) * size if recalls(config) else 0
        return tokens + past * memory.l2.enabled + recalled

    return model.num_layers * channels * itemsize * sum(map(vectors, new)) / len(new)


def _dense_bytes(layer: Remembered, longest: int) -> int:
    # [B, >= T, G, d], of which T are taken; mla's keys are its values
    return sum(x[:, :longest].nbytes for x in {id(x): x for x in _tensors(layer.caches)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
