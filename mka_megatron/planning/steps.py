"""The ranks, and how an optimizer step is divided among them: passes, rows and slots."""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; their product is the world."""

    tensor: int
    context: int
    data: int


def segments_per_step(config: Config) -> int:
    """Forward and backward passes over a sample in one optimizer step: 1 without segments."""
    training = config.training
    if training.segment_length is None:
        return 1
    return training.segments_per_step or config.data.sequence_length // training.segment_length


def slots_per_pass(config: Config) -> int:
    """Slots of a row in one pass, over all context-parallel ranks."""
    return config.training.segment_length or config.data.sequence_length


def tokens_per_pass(config: Config, layout: Layout) -> int:
    """Slots of a rank in one pass, all rows."""
    return config.training.micro_batch_size * slots_per_pass(config) // layout.context


def tokens_per_tile(config: Config, layout: Layout, tile: int | None) -> int:
    """Of those, the ones that are worked on at a time where a tile has at most `tile` (model/tiles.py): all, and nothing is
    computed again, where they are one tile."""
    tokens = tokens_per_pass(config, layout)
    if tile is None:
        return tokens
    together = config.training.micro_batch_size * (layout.tensor if config.parallel.sequence_parallel else 1)
    return min(tokens, max(1, tile // together) * together)


def tiled(config: Config, layout: Layout, tile: int | None) -> bool:
    """There are several tiles, so that each is computed again in the backward pass."""
    return tokens_per_tile(config, layout, tile) < tokens_per_pass(config, layout)


def passes(config: Config, layout: Layout) -> int:
    """Forward and backward passes of a rank in one optimizer step."""
    training = config.training
    rows = training.micro_batch_size * layout.data
    return max(1, training.global_batch_size // rows) * segments_per_step(config)


def tokens_per_step(config: Config) -> int:
    """Slots of all ranks in one optimizer step."""
    return config.training.global_batch_size * slots_per_pass(config) * segments_per_step(config)
