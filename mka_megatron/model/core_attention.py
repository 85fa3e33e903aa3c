"""The core slot of a grouped attention layer: routes, norms, rotation and the variant's core.

Megatron's own core receives rotated keys and no gate, so this one stands in its place: it receives
raw queries, keys and values, because fusion comes before q/k-norm and RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import Variant
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import Config
from mka_megatron.memory.routing import route_entropy
from mka_megatron.memory.summary import decay_logits
from mka_megatron.model.gate import build_gate, sharded_parameter
from mka_megatron.model.inputs import AttentionInputs
from mka_megatron.parallel.replicated import mark_partial

# Suffixes: S sequence, B batch, G local KV heads, H local query heads, d head dim, L levels.


class Route(nn.Module):
    """The learned part of a gated variant: gate MLP, blend beta, summary decays (stored as logits)."""

    decay_k: Tensor | None
    decay_v: Tensor | None

    def __init__(self, config: Config, count: int, tp_group: dist.ProcessGroup, dtype: torch.dtype):
        super().__init__()
        model, l2 = config.model, config.memory_hierarchy.l2
        self.gate = build_gate(
            config.routing, hidden_size=model.hidden_size, heads=model.num_attention_heads,
            groups=model.num_kv_heads, head_dim=model.head_dim, levels=count, std=model.init_std,
            tp_group=tp_group, dtype=dtype, sequence_parallel=config.parallel.sequence_parallel,
        )
        beta = config.routing.beta_init
        if beta is None:
            beta = 0.0 if model.init_from else 1.0
        self.beta = mark_partial(nn.Parameter(torch.tensor([beta], dtype=dtype)))
        for name in ("decay_k", "decay_v"):
            if l2.summary == "mean":
                setattr(self, name, None)
                continue
            logits = sharded_parameter(decay_logits(l2, model.num_kv_heads, model.head_dim), 0, tp_group, dtype)
            if l2.decay == "fixed":
                self.register_buffer(name, logits.detach().float(), persistent=False)
            else:
                self.register_parameter(name, logits)

    def forward(self, q_SBHd: Tensor, x_SBh: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Raw local queries and the layer input -> RouteInputs' fields: batch-major logits, blend, decays (fp32).

        A tuple, because ZeRO-3 finds the tensors of a module's output in tuples only, and has to gather this
        module's parameters again before their gradients arrive.
        """
        decay_k, decay_v = (
            None if logits is None else logits.float().sigmoid() for logits in (self.decay_k, self.decay_v)
        )
        logits = self.gate(q_SBHd, x_SBh).transpose(0, 1)
        return logits, self.beta.float(), decay_k, decay_v


class VariantCore(nn.Module):
    """A grouped variant's core on local heads. `q_norm`, `k_norm`: HeadNorm or None, owned by the layer."""

    def __init__(self, config: Config, variant: Variant, transformer: TransformerConfig, tp_group: dist.ProcessGroup):
        super().__init__()
        self.config = config
        self.variant = variant
        self.scale = config.model.head_dim**-0.5
        self.recompute = config.training.recompute == "selective"
        count = variant.levels(config)
        self.route = Route(config, count, tp_group, transformer.params_dtype) if count > 1 else None
        self.statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, x_SBh: Tensor, inputs: AttentionInputs,
                q_norm: nn.Module | None, k_norm: nn.Module | None) -> Tensor:
        """Raw local q, k, v and the layer input -> attention output [S,B,H*d]."""
        cos, sin = inputs.cos, inputs.sin

        def finish_q(q: Tensor) -> Tensor:
            return apply_rope(q if q_norm is None else q_norm(q), cos, sin)

        def finish_k(k: Tensor) -> Tensor:
            return apply_rope(k if k_norm is None else k_norm(k), cos, sin)

        def attend(q: Tensor, k: Tensor, v: Tensor, *route: Any) -> tuple[Tensor, Tensor | None]:
            return self.variant.attend(
                q, k, v, finish=Finish(finish_q, finish_k), route=RouteInputs(*route) if route else None,
                documents=inputs.documents, scale=self.scale, config=self.config,
            )

        arguments = [t.transpose(0, 1) for t in (q_SBHd, k_SBGd, v_SBGd)]
        if self.route is not None:
            arguments += self.route(q_SBHd, x_SBh)
        if self.recompute and self.training and torch.is_grad_enabled():
            out, weights = checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, weights = attend(*arguments)
        if weights is not None:
            self._record(weights.detach())
        # [B,S,H,d] -> [S,B,H*d]
        return out.transpose(0, 1).flatten(2)

    def _record(self, weights: Tensor) -> None:
        self.statistics = weights.flatten(0, -2).mean(0), route_entropy(weights).mean()
