"""Memory of training, by part and by formula: on the device of one rank at the peak of a step, and on one node.

The parts are what the libraries allocate, not a rule of thumb; docs/planning.md has them beside measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mka_megatron.config.schema import Config
from mka_megatron.planning.parameters import padded_vocabulary, rank_parameters

Device = Literal["cuda", "cpu"]

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_GIB = 1 << 30


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; their product is the world."""

    tensor: int
    context: int
    data: int


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
        config: a validated configuration; its own parallel sizes are not read.
        layout: ranks per axis.
        vocab_size: entries of the tokenizer, without padding.
        device: "cpu": the device is the node's memory, where offloaded states are not counted again.

    Returns:
        weights, gradients, optimizer, activations, kv, logits, workspace.
    """
    width = _BYTES[config.training.precision]
    elements = sum(each.elements for each in rank_parameters(config, vocab_size, layout.tensor))
    shards = layout.context * layout.data
    stage = config.engine.zero_stage
    held = -(-elements // shards) if stage == 3 else elements
    owned = -(-elements // shards) if stage else elements
    offloaded = config.engine.offload_optimizer != "none"
    weights = 0 if config.engine.offload_param != "none" else held * width
    states = (8 if stage == 0 and width == 4 else 12) * owned
    tokens = _tokens(config, layout)
    model, tensor = config.model, layout.tensor
    per_layer = tokens * width * (
        model.hidden_size * 8 + (3 * model.num_attention_heads + 6 * model.num_kv_heads) * model.head_dim // tensor
        + 4 * model.ffn_hidden_size // tensor
    )
    boundary = tokens * width * model.hidden_size // (tensor if config.parallel.sequence_parallel else 1)
    layers = model.num_layers
    activations = layers * boundary + per_layer if config.training.recompute == "full" else layers * per_layer
    vocabulary = padded_vocabulary(config, vocab_size) // tensor
    logits = tokens * vocabulary * (2 * width + 8)
    return (
        Part("weights", weights, f"{held:,} parameters x {width} B"),
        Part("gradients", 4 * (elements if stage < 2 else owned), f"{elements if stage < 2 else owned:,} x 4 B"),
        Part("optimizer", 0 if offloaded else states, f"{owned:,} x {states // max(owned, 1)} B"),
        Part("activations", activations, f"{layers} layers over {tokens:,} tokens"),
        Part("kv", 0, "no other rank's keys and values"),
        Part("logits", logits, f"{tokens:,} tokens x {vocabulary:,} entries x {2 * width + 8} B"),
        Part("workspace", 4 * 50_000_000 if stage else 0, "reduce bucket of 50,000,000 x 4 B"),
    )


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
    engine = config.engine
    elements = sum(each.elements for each in rank_parameters(config, vocab_size, layout.tensor))
    owned = -(-elements // (layout.context * layout.data))
    states, weights = 16 * owned * ranks_per_node, _BYTES[config.training.precision] * owned * ranks_per_node
    dram, ssd = [], []
    for name, where, size in (
        ("optimizer", engine.offload_optimizer, states), ("weights", engine.offload_param, weights)
    ):
        part = Part(name, size, f"{ranks_per_node} ranks x {owned:,} parameters")
        if where == "cpu":
            dram.append(part)
        elif where == "nvme":
            ssd.append(part)
    return tuple(dram), tuple(ssd)


def _tokens(config: Config, layout: Layout) -> int:
    """Slots of a rank's forward pass."""
    length = config.training.segment_length or config.data.sequence_length
    return config.training.micro_batch_size * length // layout.context
