"""FLOPs and time of one optimizer step.

The model of time, which docs/planning.md states in full: the heaviest rank's FLOPs at a share of the peak, plus each
group's bytes at a share of its link where no computation hides them, plus the optimizer at the speed of the memory
that holds its states. No latencies, no imbalance of documents, no data loading.
"""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.config.schema import Config
from mka_megatron.planning.cluster import Cluster
from mka_megatron.planning.flops import model_flops
from mka_megatron.planning.parameters import rank_parameters
from mka_megatron.planning.steps import (
    Layout,
    passes,
    segments_per_step,
    slots_per_pass,
    tiled,
    tokens_per_step,
)
from mka_megatron.planning.traffic import Flow, Group

UTILISATION = 0.4
"""Share of the peak that forward and backward reach."""
LINK_SHARE = 0.8
"""Share of a link that a collective reaches."""
_FP32 = 1 / 15
"""fp32 arithmetic (no tensor cores) against bf16's."""
_HOST_GBS, _DRAM_GBS, _SSD_GBS = 25.0, 200.0, 5.0
"""Of a device to its node's memory; of a node's memory and SSDs, for offloaded states; 1e9 B/s."""
_MOVED = 28
"""Bytes per parameter of an AdamW step: weight, gradient and two moments read, three written, fp32."""


@dataclass(frozen=True)
class Work:
    """FLOPs of one optimizer step over rows of one unbroken document each."""

    tokens: int
    """Slots, all ranks."""
    pairs: int
    """(query, key) pairs, all ranks."""
    model_flops: int
    """Forward and backward, all ranks: what MFU counts."""
    recomputed_flops: int
    """On top, all ranks."""
    rank_flops: float
    """Of the heaviest rank, with recomputation: the last of those that share a row."""


@dataclass(frozen=True)
class Link:
    """What a process group's exchanges cross."""

    ranks: int
    per_node: int
    """Ranks of the group that share a node."""
    gbs: float
    """Per rank and direction, 1e9 B/s, as the data sheet has it."""
    name: str


def work(config: Config, layout: Layout, vocab_size: int) -> Work:
    """FLOPs of a step."""
    flops, training = model_flops(config, vocab_size), config.training
    rows, length = training.global_batch_size, config.data.sequence_length
    share = segments_per_step(config) * slots_per_pass(config) / length
    tokens, row_pairs = tokens_per_step(config), flops.pairs([(0, 0, length)])
    pairs = int(rows * share * row_pairs)
    last = row_pairs - flops.pairs([(0, 0, length - length // layout.context)])
    heaviest = int(rows * share * last) * layout.context
    again = _recomputed(config, layout, vocab_size, tokens, pairs)
    most = flops.training(tokens, heaviest) + _recomputed(config, layout, vocab_size, tokens, heaviest)
    return Work(tokens, pairs, flops.training(tokens, pairs), again,
                most / (layout.tensor * layout.context * layout.data))


def _recomputed(config: Config, layout: Layout, vocab_size: int, tokens: int, pairs: int) -> int:
    """FLOPs of the forward pass that run a second time (the tiles of an MLP under full recomputation: a third)."""
    model, training, flops = config.model, config.training, model_flops(config, vocab_size)
    output = 2 * model.hidden_size * vocab_size
    again = {"none": 0, "selective": pairs * flops.per_pair,
             "full": tokens * (flops.per_token - output) + pairs * flops.per_pair}[training.recompute]
    if tiled(config, layout, training.mlp_tile):
        again += tokens * 2 * 3 * model.hidden_size * model.ffn_hidden_size * model.num_layers
    if tiled(config, layout, training.logits_tile):
        again += tokens * output
    return again


def link(cluster: Cluster, layout: Layout, group: Group) -> Link:
    """What `group` crosses. Ranks are numbered tensor first, then context, then data, node by node.

    Between nodes a ring has the network cards of all its ranks in a node; pieces that go from rank to rank (context
    parallelism) have one.
    """
    ranks, stride = {"tensor": (layout.tensor, 1), "context": (layout.context, layout.tensor),
                     "data": (layout.context * layout.data, layout.tensor)}[group]
    per_node = max(1, min(ranks, cluster.per_node // stride))
    if ranks == per_node and (cluster.nodes == 1 or cluster.per_node % (ranks * stride) == 0):
        return Link(ranks, per_node, cluster.gpu.link_gbs, "inside a node")
    if 1 < ranks == per_node:  # nodes are no multiple of it: some group has a single rank in one of its two nodes
        per_node = 1
    cards = 1 if group == "context" else per_node
    return Link(ranks, per_node, min(cluster.gpu.link_gbs, cards * cluster.gpu.network_gbs), "between nodes")


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    compute: float
    """Forward, recomputation and backward of the heaviest rank."""
    exposed: tuple[float, ...]
    """Of each flow, what no computation hides."""
    whole: tuple[float, ...]
    """Of each flow, all."""
    update: float
    """AdamW, and moving offloaded states."""

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + sum(self.exposed) + self.update


def times(config: Config, cluster: Cluster, layout: Layout, vocab_size: int, done: Work, sent: tuple[Flow, ...],
          utilisation: float = UTILISATION) -> Times:
    """Seconds of a step whose ranks send `sent`."""
    peak = cluster.gpu.tflops * 1e12 * (_FP32 if config.training.precision == "fp32" and not cluster.on_cpu else 1.0)
    compute = done.rank_flops / (peak * utilisation)
    backward = compute * 2 / 3
    left = {"": 0.0, "backward": backward / passes(config, layout), "passes": compute}
    whole, exposed = [], []
    for flow in sent:
        seconds = flow.bytes / (link(cluster, layout, flow.group).gbs * 1e9 * LINK_SHARE)
        hidden = 0.0 if cluster.on_cpu or not flow.hidden_by else min(seconds, left[flow.hidden_by])
        if flow.hidden_by:
            left[flow.hidden_by] -= hidden
        whole.append(seconds)
        exposed.append(seconds - hidden)
    return Times(compute, tuple(exposed), tuple(whole), _update(config, cluster, layout, vocab_size))


def _update(config: Config, cluster: Cluster, layout: Layout, vocab_size: int) -> float:
    """AdamW reads and writes its states where they are; offloaded, gradients and weights cross to the node's memory."""
    elements = sum(each.elements for each in rank_parameters(config, vocab_size, layout.tensor))
    owned = elements / (layout.context * layout.data if config.engine.zero_stage else 1)
    where = config.engine.offload_optimizer
    seconds = 0.0
    if where == "none":
        seconds += owned * _MOVED / (cluster.gpu.memory_gbs * 1e9)
    else:
        crossing = 2 * owned * (4 if config.training.precision == "fp32" else 2)
        seconds += crossing / (_HOST_GBS * 1e9) + owned * _MOVED * cluster.per_node / (_DRAM_GBS * 1e9)
    if where == "nvme":
        seconds += owned * 2 * 12 * cluster.per_node / (_SSD_GBS * 1e9)
    if config.engine.offload_param != "none":
        weights = 2 * passes(config, layout) * owned * (4 if config.training.precision == "fp32" else 2)
        rate = _HOST_GBS if config.engine.offload_param == "cpu" else _SSD_GBS / cluster.per_node
        seconds += weights / (rate * 1e9)
    return seconds
