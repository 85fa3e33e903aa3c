"""Bytes that a rank sends in one optimizer step, by process group, and the links that they cross.

A ring sends (n-1)/n of a tensor of n ranks for a gather or a reduce-scatter, and twice that for an all-reduce. Where
ranks send different amounts (context parallelism) it is the one that sends most. Left out: scalars (loss, norms, counts)
and evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.planning.context_traffic import layer_traffic
from mka_megatron.planning.parameters import Parameter, rank_parameters
from mka_megatron.planning.steps import Layout, passes, tiled, tokens_per_pass

Group = Literal["tensor", "context", "data"]
Kind = Literal["all-reduce", "gather", "scatter"]
_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
_PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most this many elements whole (DeepSpeed's param_persistence_threshold)."""
REUSED = 1_000_000_000
"""... and others until they are used again within this many elements of a pass (its stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Flow:
    """What one kind of exchange sends in a step, per rank."""

    group: Group
    """data: the replicas and the ranks that they share their rows with, over which ZeRO shards."""
    what: str
    bytes: int
    formula: str
    """Words, with the numbers put in."""
    hidden_by: Literal["", "backward", "passes"] = ""
    """Computation that it runs beside, on GPUs: that of the last backward pass, that of all passes, or none."""


def flows(config: Config, layout: Layout, vocab_size: int) -> tuple[Flow, ...]:
    """Every exchange of a step; nothing for groups of one rank."""
    return (*_tensor(config, layout, vocab_size), *_context(config, layout), *_data(config, layout, vocab_size))


def ring(kind: Kind, size: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends to combine or spread a tensor of `size` bytes."""
    return (2 if kind == "all-reduce" else 1) * size * (ranks - 1) // ranks


@dataclass(frozen=True)
class _Call:
    """One collective over the tensor-parallel ranks."""

    kind: Kind
    width: int
    """Bytes of a token in the whole tensor."""
    times: int
    """In one pass, forward, recomputed and backward."""


def _tensor(config: Config, layout: Layout, vocab_size: int) -> Iterator[Flow]:
    ranks, steps = layout.tensor, passes(config, layout)
    if ranks == 1:
        return
    tokens = tokens_per_pass(config, layout)
    groups = {
        "activations of the layers": [*_columns(config, layout), *_rows(config), *_shared_heads(config, ranks)],
        "embedding, output layer, loss": _ends(config, layout),
        "gates": _gates(config),
    }
    for what, calls in groups.items():
        sent = sum(steps * call.times * ring(call.kind, tokens * call.width, ranks) for call in calls)
        if sent:
            counted: Counter[tuple[Kind, int]] = Counter()
            for call in calls:
                counted[call.kind, call.width] += call.times
            listed = " + ".join(f"{times:,} {kind} of {width:,} B" for (kind, width), times in counted.items() if times)
            yield Flow("tensor", what, sent, f"{steps:,} passes x {tokens:,} tokens x ({listed}) over {ranks} ranks")
    partial = sum(each.elements for each in rank_parameters(config, vocab_size, ranks) if _partial(each, config))
    if partial:
        size = partial * _WIDTH[config.training.precision]
        yield Flow("tensor", "gradients of replicated weights", steps * ring("all-reduce", size, ranks),
                   f"{steps:,} passes x all-reduce of {partial:,} gradients over {ranks} ranks")


def _columns(config: Config, layout: Layout) -> list[_Call]:
    """Column-parallel linears of all layers: their input is equal on all ranks, or gathered from the sequence's shards."""
    model, mla, layers = config.model, config.attention.mla, config.model.num_layers
    forwards = 1 + (config.training.recompute == "full")
    attention, keys = [model.hidden_size], []
    if VARIANTS[config.attention.variant].projection == "latent":
        attention, keys = [mla.q_lora_rank or model.hidden_size, mla.kv_lora_rank], [mla.qk_rope_head_dim]
    calls = [call for width in attention for call in _column(config, width, layers, forwards)]
    calls += _column(config, model.hidden_size, layers, forwards + tiled(config, layout, config.training.mlp_tile))
    width = _WIDTH[config.training.precision]
    for channels in keys:  # the rotary key, gathered or copied without a linear
        if config.parallel.sequence_parallel:
            calls += [_Call("gather", channels * width, forwards * layers), _Call("scatter", channels * width, layers)]
        else:
            calls.append(_Call("all-reduce", channels * width, layers))
    return calls


def _column(config: Config, channels: int, layers: int, forwards: int) -> list[_Call]:
    """One of them: Megatron gathers its input again in the backward pass."""
    size = channels * _WIDTH[config.training.precision]
    if config.parallel.sequence_parallel:
        return [_Call("gather", size, (forwards + 1) * layers), _Call("scatter", size, layers)]
    return [_Call("all-reduce", size, layers)]


def _rows(config: Config) -> list[_Call]:
    """The two row-parallel linears of every layer: their output is summed, or scattered over the sequence's shards."""
    layers, size = config.model.num_layers, config.model.hidden_size * _WIDTH[config.training.precision]
    forwards = 1 + (config.training.recompute == "full")
    if config.parallel.sequence_parallel:
        return [_Call("scatter", size, 2 * forwards * layers), _Call("gather", size, 2 * layers)]
    return [_Call("all-reduce", size, 2 * forwards * layers)]


def _shared_heads(config: Config, ranks: int) -> list[_Call]:
    """Fewer KV heads than ranks: Megatron gathers the projections, of which each rank takes its queries."""
    model, variant = config.model, VARIANTS[config.attention.variant]
    heads = variant.kv_heads(model)
    if heads >= ranks:
        return []
    size = (model.num_attention_heads + 2 * heads) * model.head_dim * _WIDTH[config.training.precision]
    forwards = 1 + (config.training.recompute == "full")
    return [_Call("gather", size, forwards * model.num_layers), _Call("scatter", size, model.num_layers)]


def _ends(config: Config, layout: Layout) -> list[_Call]:
    """Embedding (rows of the vocabulary are shared out), output layer, and three sums per token of the loss (fp32)."""
    size = config.model.hidden_size * _WIDTH[config.training.precision]
    times = 1 + tiled(config, layout, config.training.logits_tile)
    output = _column(config, config.model.hidden_size, 1, times)
    embedding = [_Call("all-reduce", size, 1)]
    if config.parallel.sequence_parallel:
        embedding = [_Call("scatter", size, 1), _Call("gather", size, 1)]
    return [*embedding, *output, _Call("all-reduce", 4, 3 * times)]


def _gates(config: Config) -> list[_Call]:
    """fp32: the first layer's sums and the gradients of the logits (token gate), or the logits of the layer input."""
    variant, routing, layers = VARIANTS[config.attention.variant], config.routing, config.model.num_layers
    forwards = 1 + (config.training.recompute == "full")
    calls = []
    for levels in (variant.levels(config), variant.core_levels(config)):
        if levels == 1:
            continue
        if routing.gate_input == "x":
            logits = 4 * levels * (variant.kv_heads(config.model) if routing.scope == "group" else 1)
            if config.parallel.sequence_parallel:
                calls += [_Call("gather", logits, forwards * layers), _Call("scatter", logits, layers)]
            else:
                calls.append(_Call("all-reduce", logits, layers))
        elif routing.scope == "token":
            calls += [_Call("all-reduce", 4 * routing.gate_hidden_size, forwards * layers),
                      _Call("all-reduce", 4 * levels, layers)]
    return calls


def _partial(parameter: Parameter, config: Config) -> bool:
    """Each rank has a part of its gradient: heads of its own, or under sequence parallelism tokens of its own."""
    *_, module, name = f".{parameter.name}".rsplit(".", 2)
    if parameter.split:
        return False
    if name == "beta" or module in ("q_layernorm", "k_layernorm"):
        return True
    of_queries = module.endswith("gate") and config.routing.gate_input == "q"
    return config.parallel.sequence_parallel and not of_queries


def _context(config: Config, layout: Layout) -> Iterator[Flow]:
    if layout.context == 1:
        return
    most: Counter[str] = max((layer_traffic(config, layout, rank) for rank in range(layout.context)),
                             key=lambda sent: sum(sent.values()))
    layers, steps = config.model.num_layers, passes(config, layout)
    for what in dict.fromkeys(purpose.removesuffix(" gradient") for purpose in most):
        there, back = most[what], most[f"{what} gradient"]
        yield Flow("context", what, steps * layers * (there + back),
                   f"{steps:,} passes x {layers} layers x ({there:,} B there + {back:,} B of gradients back) over "
                   f"{layout.context} ranks")


def _data(config: Config, layout: Layout, vocab_size: int) -> Iterator[Flow]:
    ranks, stage, steps = layout.context * layout.data, config.engine.zero_stage, passes(config, layout)
    if ranks == 1:
        return
    width = _WIDTH[config.training.precision]
    parameters = rank_parameters(config, vocab_size, layout.tensor)
    elements = sum(each.elements for each in parameters)
    kind: Kind = "scatter" if stage == 3 else "all-reduce"
    times = steps if stage >= 2 else 1
    reduced = 4 if layout.context > 1 else width  # DeepSpeed's choice for shared rows
    yield Flow("data", "gradients", times * ring(kind, elements * reduced, ranks),
               f"{times:,} x {kind} of {elements:,} x {reduced} B over {ranks} ranks",
               hidden_by="" if stage == 0 else "backward" if stage == 1 else "passes")
    if stage in (1, 2):
        yield Flow("data", "updated weights", ring("gather", elements * width, ranks),
                   f"gather of {elements:,} x {width} B over {ranks} ranks")
    if stage == 3:
        kept = sum(each.elements for each in parameters if each.elements <= _PERSISTENT)
        # from its forward to its use in the backward pass a layer has those behind it twice, recomputed three times
        again = max(0, elements - kept - REUSED // (3 if config.training.recompute == "full" else 2))
        gathered = elements - kept + again
        yield Flow("data", "weights of ZeRO-3", steps * ring("gather", gathered * width, ranks),
                   f"{steps:,} passes x gathers of {gathered:,} ({again:,} of them for the second time) x {width} B over {ranks} "
                   "ranks", hidden_by="passes")
        yield Flow("data", "small weights of ZeRO-3", ring("gather", kept * width, ranks),
                   f"gather of {kept:,} x {width} B over {ranks} ranks")
