"""The learned part of a gated variant in plain torch; parameter names are those of the Megatron model's Route.

Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, h hidden size, r gate width, L levels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mka_megatron.attention.gate import group_logits, input_logits, token_logits
from mka_megatron.config.schema import Config, L2Config
from mka_megatron.memory.summary import decay_logits


class Gate(nn.Module):
    """Two layers from the queries or the layer input to the logits of `levels` levels."""

    def __init__(self, config: Config, levels: int, last_std: float) -> None:
        super().__init__()
        model, routing = config.model, config.routing
        self.levels, self.last_std = levels, last_std
        self.from_input = routing.gate_input == "x"
        self.groups = model.num_kv_heads if routing.scope == "group" else 1
        width = routing.gate_hidden_size
        channels = model.num_attention_heads // self.groups * model.head_dim
        if self.from_input:
            shapes = [(width, model.hidden_size), (width,), (self.groups * levels, width), (self.groups * levels,)]
        elif routing.scope == "group":
            shapes = [(self.groups, width, channels), (self.groups, width), (self.groups, levels, width),
                      (self.groups, levels)]  # fmt: skip
        else:
            shapes = [(width, channels), (width,), (levels, width), (levels,)]
        self.fc1, self.bias1, self.fc2, self.bias2 = (nn.Parameter(torch.empty(shape)) for shape in shapes)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """Raw queries [B, S, H, d] and the layer input [B, S, h] -> logits [B, S, L] or [B, S, G, L], fp32."""
        parameters = self.fc1, self.bias1, self.fc2, self.bias2
        if self.from_input:
            logits = input_logits(x, *parameters)
            # [B, S, G*L] -> [B, S, G, L]
            return logits if self.groups == 1 else logits.unflatten(-1, (self.groups, self.levels))
        if self.fc1.dim() == 3:
            return group_logits(q, *parameters)
        return token_logits(q, *parameters)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """First values, of the parameters that no checkpoint filled."""
        init.normal_(self.fc1, 0.0, std)
        init.normal_(self.fc2, 0.0, self.last_std)
        init.zeros_(self.bias1)
        init.zeros_(self.bias2)


class Route(nn.Module):
    """What fuses or mixes `levels` levels (gate, blend beta, summary decays as logits) and the gate over the
    `core_levels` levels of the block core; a single level needs none."""

    gate: Gate | None
    core_gate: Gate | None
    beta: Tensor | None
    decay_k: Tensor | None
    decay_v: Tensor | None

    def __init__(self, config: Config, levels: int, core_levels: int) -> None:
        super().__init__()
        model, l2 = config.model, config.memory_hierarchy.l2
        self.l2, self.shape = l2, (model.num_kv_heads, model.head_dim)
        self.first_beta = config.routing.beta_init or 0.0
        self.gate = Gate(config, levels, model.init_std) if levels > 1 else None
        self.core_gate = Gate(config, core_levels, 0.0) if core_levels > 1 else None
        self.beta = nn.Parameter(torch.empty(1)) if levels > 1 else None
        self.decays = levels > 1 and l2.enabled and l2.summary == "ema"
        for name in ("decay_k", "decay_v"):
            learned = self.decays and l2.decay != "fixed"
            channels = 1 if l2.decay == "head" else model.head_dim
            self.register_parameter(name, nn.Parameter(torch.empty(model.num_kv_heads, channels)) if learned else None)

    def forward(self, q: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        """Raw queries [B, S, H, d] and the layer input [B, S, h] -> RouteInputs' fields, fp32."""
        logits, core = (None if gate is None else gate(q, x) for gate in (self.gate, self.core_gate))
        decays: list[Tensor | None] = [None, None]
        if self.decays:
            logits_of = (_fixed(self.l2, *self.shape, q.device) if each is None else each
                         for each in (self.decay_k, self.decay_v))  # fmt: skip
            decays = [each.float().sigmoid() for each in logits_of]
        return logits, None if self.beta is None else self.beta.float(), *decays, core

    @torch.no_grad()
    def initialize(self) -> None:
        """First values of the blend and the decays that no checkpoint filled."""
        if self.beta is not None:
            init.constant_(self.beta, self.first_beta)
        for decay in (self.decay_k, self.decay_v):
            if decay is not None:
                init.copy_(decay, decay_logits(self.l2, *self.shape))


@lru_cache(maxsize=16)
def _fixed(l2: L2Config, kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
    """The constant decays' logits: no buffer, which a cast of the model to half precision would round."""
    with torch.inference_mode(False):  # training may come after generation
        return decay_logits(l2, kv_heads, head_dim).to(device)
