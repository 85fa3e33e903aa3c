"""The attention module that takes the place of transformers' own.

It has the projections and norms of the one it replaces, under their names, and hands raw queries, keys and values to
the variant's core, because fusion comes before q/k-norm and RoPE.

Shapes: B batch, T columns of the pass, h hidden size, H query heads, G KV heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mka_megatron.attention.backends import Backends
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import recalls
from mka_megatron.hf.inputs import Slots, Step, Whole
from mka_megatron.hf.route import Route
from mka_megatron.memory import hashing
from mka_megatron.memory.view import Memory, View


class MKAAttention(nn.Module):
    """Self-attention of every variant on grouped projections, in the place of `replaced`.

    Args:
        replaced: transformers' module, whose projections and norms it takes over.
        config: as hf.configuration.run_config gives it.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    planes: Tensor | None
    layer_idx: int

    def __init__(self, replaced: nn.Module, config: Config) -> None:
        super().__init__()
        self.layer_idx = replaced.layer_idx  # type: ignore[assignment]
        for name, module in replaced.named_children():
            self.add_module(name, module)
        self.run = config
        self.head_dim = config.model.head_dim
        self.scale = self.head_dim**-0.5
        variant = VARIANTS[config.attention.variant]
        levels, core_levels = variant.levels(config), variant.core_levels(config)
        self.route = Route(config, levels, core_levels) if max(levels, core_levels) > 1 else None
        self._chosen: dict[tuple[torch.dtype, str], Backends] = {}
        self.recalls = recalls(config)
        l3 = config.memory_hierarchy.l3
        hashed = self.recalls and l3.selection == "hash"
        self.register_buffer("planes", self._planes() if hashed else None)

    def forward(self, hidden_states: Tensor, mka_inputs: Whole | Step, **unused: Any) -> tuple[Tensor, None]:
        """hidden_states [B, T, h] -> (output [B, T, h], no attention weights)."""
        # [B, T, H*d] -> [B, T, H, d]
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        route = None if self.route is None else RouteInputs(*self.route(q, hidden_states))
        selector, by = self._selector(), self._backends(q.dtype, q.device.type)

        def core(
            at: Slots, view: View, q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None, of_core: Tensor | None
        ) -> tuple[Any, ...]:
            def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
                return apply_rope(x, *((at.cos, at.sin) if positions is None else at.rope(x, positions)))

            return VARIANTS[self.run.attention.variant].attend(
                q, k, v, finish=Finish(self._norm("q_norm"), self._norm("k_norm"), rotate),
                route=None if route is None else replace(route, logits=logits, core=of_core),
                documents=at.documents, scale=self.scale, config=self.run,
                memory=Memory(view, at.chunks, selector, by.block, by.fuse, by.recall),
            )  # fmt: skip

        gates = (None, None) if route is None else (route.logits, route.core)
        # [B, T, H, d] -> [B, T, H*d]
        return self.o_proj(mka_inputs.attend(self.layer_idx, core, q, k, v, *gates).flatten(2)), None

    @torch.no_grad()
    def initialize(self) -> None:
        """The planes, where no checkpoint gave them."""
        if self.planes is not None:
            init.copy_(self.planes, self._planes())

    def _norm(self, name: str) -> Callable[[Tensor], Tensor]:
        return self._modules.get(name) or _identity

    def _planes(self) -> Tensor:
        l3 = self.run.memory_hierarchy.l3
        return hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, self.head_dim)

    def _selector(self) -> hashing.Selector | None:
        if not self.recalls:
            return None
        l3 = self.run.memory_hierarchy.l3
        bias = None if "k_norm" in self._modules else self.k_proj.bias
        # [G*d] -> [G, d]
        shared = None if bias is None else bias.detach().unflatten(0, (-1, self.head_dim))
        return hashing.Selector(l3.selection, l3.recalled_chunks, self.planes, shared)

    def _backends(self, dtype: torch.dtype, device: str) -> Backends:
        if (dtype, device) not in self._chosen:
            self._chosen[dtype, device] = Backends.choose(self.run, dtype, device)
        return self._chosen[dtype, device]


def _identity(x: Tensor) -> Tensor:
    return x
