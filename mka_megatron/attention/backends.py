"""Which implementation of every op a variant's layers run: decided once, where they are built, and logged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, fuses, needs_chunks, recalls
from mka_megatron.ops import block_attention, library
from mka_megatron.ops.block_attention import cuda as block_kernels
from mka_megatron.ops.recall import cuda as recall
from mka_megatron.ops.route_fuse import cuda as route_fuse


@dataclass(frozen=True)
class Backends:
    """As memory.view.Memory has them."""

    block: str = "reference"
    fuse: str = "reference"
    recall: str = "reference"

    @staticmethod
    def choose(config: Config, dtype: torch.dtype, device: str) -> Backends:
        """What `attention.block_backend` and `attention.kernels` come to for tensors of `dtype` on a device type.

        An op that the layers do not run stays on the reference. Raises ConfigError when a backend is asked for that
        does not run there.
        """
        attention, memory, channels = config.attention, config.memory_hierarchy, config.model.head_dim
        block = fuse = recall_by = "reference"
        if block_core(config):
            lacks = block_kernels.lacks(channels, memory.l1.chunk_size, dtype, library.capability(device))
            block = block_attention.choose(attention.block_backend, device, lacks)
        if fuses(config):
            summary = memory.l2.summary if memory.l2.enabled else "ema"
            lacks = route_fuse.lacks(channels, dtype, summary)
            fuse = library.choose("route_fuse", attention.kernels, device, lacks)
        if needs_chunks(config):
            selection = memory.l3.selection if recalls(config) else "hash"
            lacks = recall.lacks(channels, memory.l1.chunk_size, dtype, selection)
            recall_by = library.choose("recall", attention.kernels, device, lacks)
        return Backends(block, fuse, recall_by)
