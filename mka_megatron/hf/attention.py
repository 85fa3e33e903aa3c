"""The attention module that takes the place of transformers' own.

It has the projections and norms of the one it replaces, under their names, and hands raw queries, keys and values to
the variant's core, because fusion comes before q/k-norm and RoPE.

Shapes: B batch, S columns of the batch, T slots, h hidden size, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, recalls
from mka_megatron.hf.layout import Layout
from mka_megatron.hf.route import Route
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.view import Alone, Memory
from mka_megatron.ops.block_attention import choose


@dataclass(frozen=True)
class Inputs:
    """What every layer's attention needs beside the hidden states, made once per forward pass."""

    layout: Layout
    chunks: Chunks | None
    """None where the variant works on none."""
    cos: Tensor
    """[B or 1, T, d]."""
    sin: Tensor
    """[B or 1, T, d]."""
    rope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """The model's rotary module: tables at other positions."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Inputs:
        """The same on another device: a model may be spread over several."""
        if self.cos.device == torch.device(device):
            return self
        chunks = self.chunks
        if chunks is not None:
            tables = (chunks.lengths, chunks.documents, chunks.last)
            lengths, documents, last = (table.to(device, non_blocking=non_blocking) for table in tables)
            chunks = replace(chunks, lengths=lengths, documents=documents, last=last)
        cos, sin = (table.to(device, non_blocking=non_blocking) for table in (self.cos, self.sin))
        return replace(self, layout=self.layout.to(device), chunks=chunks, cos=cos, sin=sin)


class MKAAttention(nn.Module):
    """Self-attention of every variant on grouped projections, in the place of `replaced`.

    Args:
        replaced: transformers' module, whose projections and norms it takes over.
        config: as hf.configuration.run_config gives it.
    """

    def __init__(self, replaced: nn.Module, config: Config) -> None:
        super().__init__()
        self.layer_idx = replaced.layer_idx
        for name, module in replaced.named_children():
            self.add_module(name, module)
        self.run = config
        self.variant = VARIANTS[config.attention.variant]
        self.head_dim = config.model.head_dim
        self.scale = self.head_dim**-0.5
        levels, core_levels = self.variant.levels(config), self.variant.core_levels(config)
        self.route = Route(config, levels, core_levels) if max(levels, core_levels) > 1 else None
        self.recalls = recalls(config)
        l3 = config.memory_hierarchy.l3
        hashed = self.recalls and l3.selection == "hash"
        self.register_buffer("planes", self._planes() if hashed else None)

    def forward(self, hidden_states: Tensor, mka_inputs: Inputs, **unused: Any) -> tuple[Tensor, None]:
        """hidden_states [B, S, h] -> (output [B, S, h], no attention weights)."""
        layout, route = mka_inputs.layout, None
        # [B, S, H*d] -> [B, S, H, d]
        q, k, v = (
            getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.route is not None:
            logits, beta, decay_k, decay_v, core = self.route(q, hidden_states)
            route = RouteInputs(layout.take(logits), beta, decay_k, decay_v, layout.take(core))
        q, k, v = (layout.take(x) for x in (q, k, v))
        out, *_ = self.variant.attend(
            q, k, v,
            finish=Finish(getattr(self, "q_norm", _identity), getattr(self, "k_norm", _identity), _rotation(mka_inputs)),
            route=route,
            documents=layout.documents,
            scale=self.scale,
            config=self.run,
            memory=Memory(Alone(), mka_inputs.chunks, self._selector(), self._backend(q.device.type)),
        )  # fmt: skip
        return self.o_proj(layout.put(out).flatten(2)), None

    @torch.no_grad()
    def initialize(self) -> None:
        """The planes, where no checkpoint gave them."""
        if self.planes is not None:
            init.copy_(self.planes, self._planes())

    def _planes(self) -> Tensor:
        l3 = self.run.memory_hierarchy.l3
        return hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, self.head_dim)

    def _selector(self) -> hashing.Selector | None:
        if not self.recalls:
            return None
        l3 = self.run.memory_hierarchy.l3
        bias = None if hasattr(self, "k_norm") else self.k_proj.bias
        # [G*d] -> [G, d]
        shared = None if bias is None else bias.detach().unflatten(0, (-1, self.head_dim))
        return hashing.Selector(l3.selection, l3.recalled_chunks, self.planes, shared)

    def _backend(self, device: str) -> str:
        return choose(self.run.attention.block_backend, device) if block_core(self.run) else "reference"


def _rotation(inputs: Inputs) -> Callable[[Tensor, Tensor | None], Tensor]:
    def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
        return apply_rope(x, *((inputs.cos, inputs.sin) if positions is None else inputs.rope(x, positions)))

    return rotate


def _identity(x: Tensor) -> Tensor:
    return x
