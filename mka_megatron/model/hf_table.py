"""Which Hugging Face tensors a Megatron parameter consists of, read both ways: importing weights and exporting them.

One table serves Qwen2/2.5, Qwen3 and Llama: their tensors have the same names, and which of the optional ones exist
(QKV bias, q/k-norm, untied head, routes) the configuration says. An entry lays out one whole parameter, as the
tensor-parallel ranks' shards would be if they were concatenated, as runs of rows (or columns) of its sources.

Needs no process group and none of Megatron's modules. Letters: H query heads, G KV heads, d head channels, r gate width,
L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.errors import refuse
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import effective_kv_heads, recalls


@dataclass(frozen=True)
class Run:
    """`length` consecutive rows (or columns) of the Hugging Face tensor `source`, from `start`."""

    source: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One parameter (or saved buffer) of the Megatron model."""

    name: str
    shape: tuple[int, ...]
    """The whole parameter's, with the vocabulary's padding."""
    runs: tuple[Run, ...]
    """What it consists of along `dim`, in order; what is left at the end is padding, zeros."""
    dim: int = 0
    split: bool = True
    """Each of the tensor-parallel ranks holds an equal part along `dim`; False: all hold the whole."""
    added: bool = False
    """A plain Qwen or Llama checkpoint does not have it."""

    def shard(self, ranks: int) -> tuple[int, ...]:
        """Shape of what one of `ranks` tensor-parallel ranks holds."""
        size = self.shape[self.dim] // (ranks if self.split else 1)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def cut(self, start: int, length: int) -> Iterator[Run]:
        """What [start, start + length) of the whole parameter consists of, padding left out."""
        position = 0
        for run in self.runs:
            low, high = max(start, position), min(start + length, position + run.length)
            if low < high:
                yield Run(run.source, run.start + low - position, high - low)
            position += run.length


@dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor, as parts of one Megatron parameter."""

    name: str
    shape: tuple[int, ...]
    entry: Entry
    parts: tuple[tuple[int, int], ...]
    """(start, length) along `entry.dim` of the whole parameter; in this order they are the tensor."""

    def on_ranks(self, ranks: int) -> Iterator[tuple[int, int, int]]:
        """The parts as (tensor-parallel rank, start in its shard, length), in order."""
        size = self.entry.shard(ranks)[self.entry.dim]
        for start, length in self.parts:
            end = start + length
            while start < end:
                rank, offset = divmod(start, size)
                taken = min(end - start, size - offset)
                yield rank, offset, taken
                start += taken


def hf_table(config: Config, vocab_size: int) -> dict[str, Entry]:
    """Megatron name -> entry of every parameter, and of the hash planes, in the model's own order.

    Args:
        config: with the tensor-parallel size of the shards to read or fill.
        vocab_size: rows of the embedding without padding.

    Raises:
        ConfigError: the variant has no Hugging Face counterpart.
    """
    model = config.model
    if VARIANTS[config.attention.variant].projection != "grouped":
        raise refuse("attention.variant", config.attention.variant, "Qwen and Llama have no such projections, so its weights have no place in a "
                     "Hugging Face directory; use gqa, mka or fastmka")
    vocabulary = (padded_vocab_size(vocab_size, model.vocab_multiple), model.hidden_size)
    entries = [_one("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary, vocab_size)]
    for layer in range(model.num_layers):
        entries += _layer(config, layer)
    entries.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,)))
    if not model.tie_embeddings:
        entries.append(_one("output_layer.weight", "lm_head.weight", vocabulary, vocab_size))
    return {entry.name: entry for entry in entries}


def hf_tensors(table: dict[str, Entry]) -> dict[str, HFTensor]:
    """The same table backwards: Hugging Face name -> tensor, in the table's order."""
    found: dict[str, HFTensor] = {}
    for entry in table.values():
        parts: dict[str, list[tuple[int, int, int]]] = {}  # (start in the source, start in the parameter, length)
        position = 0
        for run in entry.runs:
            parts.setdefault(run.source, []).append((run.start, position, run.length))
            position += run.length
        for name, pieces in parts.items():
            extent = sum(length for _, _, length in pieces)
            shape = (*entry.shape[: entry.dim], extent, *entry.shape[entry.dim + 1 :])
            found[name] = HFTensor(name, shape, entry, tuple((start, length) for _, start, length in sorted(pieces)))
    return found


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up, the same at every tensor-parallel size."""
    return math.ceil(vocab_size / multiple) * multiple


def _one(name: str, source: str, shape: tuple[int, ...], extent: int | None = None, dim: int = 0) -> Entry:
    """A parameter that is one tensor (of `extent` rows or columns before padding), split along `dim`."""
    return Entry(name, shape, (Run(source, 0, shape[dim] if extent is None else extent),), dim)


def _whole(name: str, source: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, shape, (Run(source, 0, shape[0]),), split=False)


def _layer(config: Config, layer: int) -> list[Entry]:
    model = config.model
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    attention, hidden = f"{theirs}self_attn.", model.hidden_size
    queries = model.num_attention_heads * model.head_dim
    projected = queries + 2 * effective_kv_heads(config.attention.variant, model) * model.head_dim
    entries = [_whole(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,))]
    entries += _route(config, f"{ours}self_attention.core_attention.", attention)
    entries.append(_one(f"{ours}self_attention.linear_proj.weight", f"{attention}o_proj.weight", (hidden, queries), dim=1))
    qkv = f"{ours}self_attention.linear_qkv."
    entries.append(Entry(f"{qkv}weight", (projected, hidden), _qkv(config, attention, "weight")))
    if model.qkv_bias:
        entries.append(Entry(f"{qkv}bias", (projected,), _qkv(config, attention, "bias")))
    if model.qk_norm:
        for name in ("q", "k"):
            norm = f"{ours}self_attention.{name}_layernorm.weight"
            entries.append(_whole(norm, f"{attention}{name}_norm.weight", (model.head_dim,)))
    post, ffn = f"{theirs}post_attention_layernorm.weight", model.ffn_hidden_size
    entries.append(_whole(f"{ours}pre_mlp_layernorm.weight", post, (hidden,)))
    entries.append(Entry(f"{ours}mlp.linear_fc1.weight", (2 * ffn, hidden), _gate_and_up(config, f"{theirs}mlp.")))
    entries.append(_one(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn), dim=1))
    return entries


def _qkv(config: Config, prefix: str, suffix: str) -> tuple[Run, ...]:
    """Each KV head's queries, its keys, its values. (Ranks that share a KV head split this evenly as well.)"""
    model, runs = config.model, []
    groups = effective_kv_heads(config.attention.variant, model)
    queries = model.num_attention_heads // groups * model.head_dim
    for group in range(groups):
        runs.append(Run(f"{prefix}q_proj.{suffix}", group * queries, queries))
        runs.append(Run(f"{prefix}k_proj.{suffix}", group * model.head_dim, model.head_dim))
        runs.append(Run(f"{prefix}v_proj.{suffix}", group * model.head_dim, model.head_dim))
    return tuple(runs)


def _gate_and_up(config: Config, prefix: str) -> tuple[Run, ...]:
    """A rank holds its rows of the gate, then its rows of the up-projection."""
    ranks = config.parallel.tensor_parallel
    rows = config.model.ffn_hidden_size // ranks
    return tuple(Run(f"{prefix}{name}.weight", rank * rows, rows) for rank in range(ranks) for name in ("gate_proj", "up_proj"))


def _route(config: Config, ours: str, theirs: str) -> list[Entry]:
    """The route's parameters and the planes; their names are the same on both sides."""
    variant, model, l2, l3 = (VARIANTS[config.attention.variant], config.model, config.memory_hierarchy.l2,
                              config.memory_hierarchy.l3)
    levels, core_levels = variant.levels(config), variant.core_levels(config)
    entries = []
    if recalls(config) and l3.selection == "hash":
        entries.append(_added(ours, theirs, "planes", (l3.hash_tables, l3.hash_bits, model.head_dim), None))
    if levels > 1:
        entries.append(_added(ours, theirs, "route.beta", (1,), None))
        if l2.enabled and l2.summary == "ema" and l2.decay != "fixed":
            decays = (model.num_kv_heads, 1 if l2.decay == "head" else model.head_dim)
            for name in ("route.decay_k", "route.decay_v"):
                entries.append(_added(ours, theirs, name, decays, 0))
    for gate, count in (("route.gate.", levels), ("route.core_gate.", core_levels)):
        if count > 1:
            entries += [_added(ours, theirs, gate + name, shape, dim) for name, (shape, dim) in _gate(config, count).items()]
    return entries


def _added(ours: str, theirs: str, name: str, shape: tuple[int, ...], dim: int | None) -> Entry:
    """`dim`: the dimension that is split over ranks, None for none."""
    return Entry(ours + name, shape, (Run(theirs + name, 0, shape[dim or 0]),), dim or 0, split=dim is not None, added=True)


def _gate(config: Config, levels: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """A gate's parameters: whole shape, and the dimension that is split over ranks."""
    model, routing, width = config.model, config.routing, config.routing.gate_hidden_size
    heads, groups = model.num_attention_heads, model.num_kv_heads
    if routing.gate_input == "x":
        logits = levels * (groups if routing.scope == "group" else 1)
        return {"fc1": ((width, model.hidden_size), None), "bias1": ((width,), None), "fc2": ((logits, width), None),
                "bias2": ((logits,), None)}
    if routing.scope == "group":
        return {"fc1": ((groups, width, heads // groups * model.head_dim), 0), "bias1": ((groups, width), 0),
                "fc2": ((groups, levels, width), 0), "bias2": ((groups, levels), 0)}
    return {"fc1": ((width, heads * model.head_dim), 1), "bias1": ((width,), None), "fc2": ((levels, width), None),
            "bias2": ((levels,), None)}
