"""Memory of training, by part and by formula: on the device of one rank at the peak of a step, and on one node.

The parts are what the libraries allocate (states.py, sharded_states.py, activations.py), at the moment of a step at which
they are most together; docs/planning_measured.md has them beside measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, effective_kv_heads, recalls
from mka_megatron.planning import host, sharded_states, states
from mka_megatron.planning.activations import WIDTHS, layer_bytes
from mka_megatron.planning.parameters import padded_vocabulary, rank_parameters
from mka_megatron.planning.states import Moment, Run, Term
from mka_megatron.planning.steps import Layout, passes, tiled, tokens_per_pass, tokens_per_tile

Device = Literal["cuda", "cpu"]

_FP32 = 4
_GIB = 1 << 30
_PARTS = 2048
"""Parts that the backward pass of block_attention splits its keys into, at most."""


@dataclass(frozen=True)
class Part:
    """One part of a memory, and how it was worked out."""

    name: str
    bytes: int
    formula: str
    """Words, with the numbers put in."""


def rank_memory(config: Config, layout: Layout, vocab_size: int, device: Device) -> tuple[Part, ...]:
    """What one rank has on its device at the peak of a step.

    Args:
        config: a validated configuration; its own parallel sizes are not read, but for sequence_parallel.
        layout: ranks per axis.
        vocab_size: entries of the tokenizer, without padding.
        device: "cpu": the device is the node's memory; what is offloaded to it is :func:`node_memory`'s.

    Returns:
        weights, gradients, optimizer, activations, kv, logits, workspace: a part that is not there at the peak has 0
        bytes. The workspace's formula names the moment.
    """
    return max((_parts(config, layout, vocab_size, device, moment) for moment in _moments(config, layout, vocab_size, device)),
               key=lambda parts: sum(part.bytes for part in parts))


def node_memory(
    config: Config, layout: Layout, vocab_size: int, ranks_per_node: int, device: Device
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """What the ranks of one node have in its DRAM besides their devices' memory, and on its SSD.

    Checkpoints on disk are not counted.

    Args:
        ranks_per_node: ranks that the node runs.

    Returns:
        (DRAM parts, SSD parts).
    """
    run = _run(config, layout, device)
    parameters = rank_parameters(config, vocab_size, layout.tensor)
    dram, ssd = host.of_rank(config, run, parameters, tokens_per_pass(config, layout), layout.tensor)

    def of_node(of_rank: list[tuple[str, Term]]) -> tuple[Part, ...]:
        return tuple(Part(name, ranks_per_node * term.bytes, f"{ranks_per_node} ranks x ({term.words})") for name, term in of_rank)

    saved: tuple[Part, ...] = ()
    if config.training.async_save:
        copy = host.saved_on_node(run, parameters, ranks_per_node, min(ranks_per_node, layout.tensor))
        saved = (Part("asynchronous save", copy.bytes, copy.words),)
    return (*of_node(dram), *saved), of_node(ssd)


def _run(config: Config, layout: Layout, device: Device) -> Run:
    training, engine = config.training, config.engine
    return Run(
        stage=engine.zero_stage, precision=training.precision, shards=layout.context * layout.data, context=layout.context,
        passes=passes(config, layout), tied=config.model.tie_embeddings,
        offloaded=engine.offload_optimizer != "none", on_cuda=device == "cuda",
    )


def _moments(config: Config, layout: Layout, vocab_size: int, device: Device) -> list[Moment]:
    run, parameters = _run(config, layout, device), rank_parameters(config, vocab_size, layout.tensor)
    if run.stage == 3:
        return sharded_states.moments(run, parameters, config.engine.offload_param != "none")
    return states.moments(run, parameters)


def _parts(config: Config, layout: Layout, vocab_size: int, device: Device, moment: Moment) -> tuple[Part, ...]:
    nothing = Term(0, "none at this moment")
    kept = _kept(config, layout, device, moment)
    keys = _keys_and_values(config, layout, device, moment.graph)
    logits = _logits(config, layout, vocab_size) if moment.graph == "loss" else nothing
    working = _working(config, layout, device) if moment.graph in ("whole", "last") else nothing
    buffers = [term for term in (*moment.workspace, working, *_standing(config, layout)) if term.bytes]
    workspace = Term(sum(term.bytes for term in buffers), "; ".join([f"at {moment.name}", *(term.words for term in buffers)]))
    named = (
        ("weights", moment.weights), ("gradients", moment.gradients), ("optimizer", moment.optimizer), ("activations", kept),
        ("kv", keys), ("logits", logits), ("workspace", workspace),
    )  # fmt: skip
    return tuple(Part(name, term.bytes, term.words) for name, term in named)


def _kept(config: Config, layout: Layout, device: Device, moment: Moment) -> Term:
    """Activations that wait for their backward pass."""
    graph = moment.graph
    if graph == "gone":
        return Term(0, "none at this moment")
    tokens, layers, recompute = tokens_per_pass(config, layout), config.model.num_layers, config.training.recompute
    layer = layer_bytes(config, layout, device)
    each = {"none": layer.whole, "selective": layer.selective, "full": layer.boundary}[recompute]
    again = layer.whole - each if graph != "loss" else 0.0
    share = layout.tensor if config.parallel.sequence_parallel else 1
    ends = 3 * config.model.hidden_size * WIDTHS[config.training.precision] / share
    count = math.ceil(layers * moment.share) if graph != "last" else 1
    words = f"{count} layers x {each:,.0f} B a token (recompute {recompute})"
    if again:
        words += f" + {again:,.0f} B of the layer at hand"
    return Term(round(tokens * (count * each + again + ends)), f"{tokens:,} tokens x ({words} + {ends:,.0f} B of embedding and last norm)")


def _keys_and_values(config: Config, layout: Layout, device: Device, graph: str) -> Term:
    """Keys and values of other ranks' and earlier segments' slots, and the hot pages."""
    model, memory, training = config.model, config.memory_hierarchy, config.training
    width = WIDTHS[training.precision]
    channels = _pair(config, layout)
    rows, layers = training.micro_batch_size, model.num_layers
    at_once = layers if graph in ("loss", "whole") and training.recompute == "none" else 0 if graph == "gone" else 1
    slots = tokens_per_pass(config, layout) // rows
    chunk, window = memory.l1.chunk_size, memory.l1.window or 0
    found = []
    if layout.context > 1:
        before = (layout.context - 1) * slots
        if block_core(config):
            recalled = slots // chunk * memory.l3.recalled_chunks * chunk if recalls(config) else 0
            slots_seen = min(before, window) + before // chunk + min(before, recalled)
            words = f"{slots_seen:,} slots of halo, summaries and recalled chunks of other ranks"
        else:
            variant = VARIANTS[config.attention.variant]
            levels = variant.levels(config) if variant.attends_each_level else 1
            slots_seen, words = levels * before, f"{levels} x {before:,} slots of the ranks before"
        found.append(Term(at_once * rows * slots_seen * channels * width, f"{at_once} layers x {rows} x {words} x {channels * width} B"))
    if training.segment_length is not None:
        chunks = config.data.sequence_length // layout.context // chunk
        standing = layers * rows * (window + chunks) * channels * width
        found.append(Term(standing, f"{layers} layers x {rows} x {window + chunks:,} slots of window and summaries x {channels * width} B"))
        if recalls(config):
            pages = min(chunks, slots // chunk * memory.l3.recalled_chunks)
            size = at_once * rows * pages * chunk * channels * width
            found.append(Term(size, f"{at_once} layers x {rows} x {pages:,} recalled chunks of {chunk} slots x {channels * width} B"))
        if device == "cuda" and recalls(config):
            found.append(Term(int(memory.l3.hbm_pool_gib * _GIB), f"{memory.l3.hbm_pool_gib} GiB of hot pages"))
    return Term(sum(term.bytes for term in found), "; ".join(term.words for term in found) or "no slots of others")


def _pair(config: Config, layout: Layout) -> int:
    """Channels of a slot's keys and values together, of a rank's heads."""
    mla, heads = config.attention.mla, max(1, effective_kv_heads(config.attention.variant, config.model) // layout.tensor)
    if VARIANTS[config.attention.variant].projection == "latent":
        return heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    return heads * 2 * config.model.head_dim


def _logits(config: Config, layout: Layout, vocab_size: int) -> Term:
    """Logits, their log-softmax and both gradients (one op), or in place over a split vocabulary."""
    entries = padded_vocabulary(config, vocab_size) // layout.tensor
    at_once = tokens_per_tile(config, layout, config.training.logits_tile)
    if layout.tensor == 1:
        each, words = 3 * _FP32, "log-softmax, its gradient and the logits' in fp32"
    else:
        # in place once they are fp32; entries that only pad the vocabulary are masked in a copy
        width, padded = WIDTHS[config.training.precision], padded_vocabulary(config, vocab_size) > vocab_size
        each = _FP32 + width * (width < _FP32) + width * padded
        words = "logits" + ", masked" * padded + ", and in fp32" * (width < _FP32)
    return Term(at_once * entries * each, f"{at_once:,} tokens x {entries:,} entries x {each} B ({words})")


def _standing(config: Config, layout: Layout) -> tuple[Term, ...]:
    """Buffers that stay from the first step on."""
    model, tokens = config.model, tokens_per_pass(config, layout)
    latent = VARIANTS[config.attention.variant].projection == "latent"
    channels = config.attention.mla.qk_rope_head_dim if latent else model.head_dim
    positions = model.max_position_embeddings + tokens
    found = [Term(positions * channels * 2 * _FP32, f"rotary tables, {positions:,} positions x {channels} x {2 * _FP32} B")]
    if config.parallel.sequence_parallel and layout.tensor > 1:
        width = WIDTHS[config.training.precision]
        found.append(Term(tokens * model.hidden_size * width, f"the gathered sequence, {tokens:,} x {model.hidden_size:,} x {width} B"))
    return tuple(found)


def _working(config: Config, layout: Layout, device: Device) -> Term:
    """What a layer's backward pass needs beside what was kept: the MLP's part or the attention's, whichever is more."""
    training, model, width = config.training, config.model, WIDTHS[config.training.precision]
    tokens, ffn = tokens_per_pass(config, layout), model.ffn_hidden_size // layout.tensor
    at_once = tokens_per_tile(config, layout, training.mlp_tile)
    # gradients of the activated and of both halves (a CPU's SwiGLU has a product besides); a tile has its activations too
    widths = (3 if device == "cuda" else 4) + 3 * tiled(config, layout, training.mlp_tile)
    mlp = Term(at_once * widths * ffn * width, f"{at_once:,} tokens x {widths} x {ffn:,} MLP channels x {width} B")
    heads = model.num_attention_heads / layout.tensor
    pair = _pair(config, layout)
    latent = VARIANTS[config.attention.variant].projection == "latent"
    each = ((pair if latent else 2 * heads * model.head_dim) + pair) * width + heads * _FP32
    attention = Term(round(tokens * each), f"{tokens:,} tokens x {each:,.0f} B of the attention's gradients")
    if device == "cuda" and block_core(config):
        # per query head: the gradient of three biases; parts of dK and dV, at most so many (kernels/include/mka/block_plan.cuh)
        parts = _PARTS * 2 * config.memory_hierarchy.l1.chunk_size * model.head_dim * _FP32
        bias = round(tokens * heads * 3 * _FP32)
        attention = Term(attention.bytes + bias + parts, f"{attention.words}, {bias:,} B of the biases', {parts:,} B of parts of dK and dV")
    if layout.context > 1 and not block_core(config):
        exchanged = 2 * layout.context * tokens * pair * width
        attention = Term(attention.bytes + exchanged, f"{attention.words}, {exchanged:,} B of keys, values and gradients that ranks exchange")
    larger = max(mlp, attention, key=lambda term: term.bytes)
    residual = 2 * tokens * model.hidden_size * width
    return Term(larger.bytes + residual, f"{larger.words} and {tokens:,} x 2 x {model.hidden_size:,} x {width} B of a layer's gradients")
