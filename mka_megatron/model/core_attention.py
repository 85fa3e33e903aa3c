"""The core slot of a grouped attention layer: routes, norms, rotation and the variant's core.

Megatron's own core receives rotated keys and no gate, so this one stands in its place: it receives
raw queries, keys and values, because fusion comes before q/k-norm and RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mka_megatron.attention.backends import Backends
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import Variant
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import recalls
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.routing import route_entropy
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.summary import decay_logits
from mka_megatron.memory.view import Memory, Update, View
from mka_megatron.model.gate import build_gate, sharded_parameter
from mka_megatron.model.inputs import AttentionInputs, GenerationInputs, of_piece
from mka_megatron.parallel.replicated import mark_partial

# Suffixes: S sequence, B batch, G local KV heads, H local query heads, d head dim, L levels.


class Route(nn.Module):
    """The learned part of a gated variant: what fuses or mixes `levels` levels (gate MLP, blend beta, summary
    decays, stored as logits), and the gate over the `core_levels` levels of the block core; a single level needs none."""

    gate: nn.Module | None
    core_gate: nn.Module | None
    beta: Tensor | None
    decay_k: Tensor | None
    decay_v: Tensor | None

    def __init__(self, config: Config, levels: int, core_levels: int, tp_group: dist.ProcessGroup, dtype: torch.dtype):
        super().__init__()
        model, l2 = config.model, config.memory_hierarchy.l2

        def gate(count: int, last_std: float) -> nn.Module:
            return build_gate(
                config.routing, hidden_size=model.hidden_size, heads=model.num_attention_heads,
                groups=model.num_kv_heads, head_dim=model.head_dim, levels=count, std=model.init_std,
                last_std=last_std, tp_group=tp_group, dtype=dtype,
                sequence_parallel=config.parallel.sequence_parallel,
            )

        self.gate = gate(levels, model.init_std) if levels > 1 else None
        # equal levels at first: a recalled token weighs what a near one weighs
        self.core_gate = gate(core_levels, 0.0) if core_levels > 1 else None
        self.beta = self.decay_k = self.decay_v = None
        if levels == 1:
            return
        beta = config.routing.beta_init
        if beta is None:
            beta = 0.0 if model.init_from else 1.0
        self.beta = mark_partial(nn.Parameter(torch.tensor([beta], dtype=dtype)))
        if not l2.enabled or l2.summary == "mean":
            return
        for name in ("decay_k", "decay_v"):
            delattr(self, name)
            logits = sharded_parameter(decay_logits(l2, model.num_kv_heads, model.head_dim), 0, tp_group, dtype)
            if l2.decay == "fixed":
                self.register_buffer(name, logits.detach().float(), persistent=False)
            else:
                self.register_parameter(name, logits)

    def forward(self, q_SBHd: Tensor, x_SBh: Tensor) -> tuple[Tensor | None, ...]:
        """Raw local queries and the layer input -> RouteInputs' fields: batch-major logits, blend, decays (fp32).

        A tuple, because ZeRO-3 finds the tensors of a module's output in tuples only, and has to gather this
        module's parameters again before their gradients arrive.
        """
        decay_k, decay_v = (
            None if logits is None else logits.float().sigmoid() for logits in (self.decay_k, self.decay_v)
        )
        logits, core = (
            None if gate is None else gate(q_SBHd, x_SBh).transpose(0, 1) for gate in (self.gate, self.core_gate)
        )
        return logits, None if self.beta is None else self.beta.float(), decay_k, decay_v, core


class VariantCore(nn.Module):
    """A grouped variant's core on local heads. `q_norm`, `k_norm`: HeadNorm or None, owned by the layer.

    `layer` counts from 0.
    """

    planes: Tensor

    def __init__(self, config: Config, variant: Variant, transformer: TransformerConfig, tp_group: dist.ProcessGroup,
                 layer: int):
        super().__init__()
        self.config = config
        self.variant = variant
        self.layer = layer
        self.scale = config.model.head_dim**-0.5
        self.recompute = config.training.recompute == "selective"
        levels, core_levels = variant.levels(config), variant.core_levels(config)
        self.route: Route | None = None
        if max(levels, core_levels) > 1:
            self.route = Route(config, levels, core_levels, tp_group, transformer.params_dtype)
        on = "cuda" if torch.cuda.is_available() else "cpu"
        self.backends = Backends.choose(config, transformer.params_dtype, on)
        self.recalls = recalls(config)
        if self.recalls:
            l3 = config.memory_hierarchy.l3
            drawn = hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, config.model.head_dim)
            self.register_buffer("planes", drawn)
        self.statistics: tuple[Tensor, Tensor] | None = None
        self.recall_distances: Tensor | None = None
        self.observe: Callable[[Tensor], None] | None = None
        """Called with every forward's routing weights [B,S,L] or [B,S,G,L], detached; generation's aside."""

    def forward(self, q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, x_SBh: Tensor,
                inputs: AttentionInputs | GenerationInputs, q_norm: nn.Module | None, k_norm: nn.Module | None,
                key_bias_Gd: Tensor | None) -> Tensor:
        """Raw local q, k, v and the layer input -> attention output [S,B,H*d].

        `key_bias_Gd`: the constant part of every normed key, which the hash codes leave out; None: there is none.
        """
        selector, of = self._selector(key_bias_Gd), self.backends

        def attend(at: AttentionInputs, view: View, q: Tensor, k: Tensor, v: Tensor, *route: Any) -> tuple[Any, ...]:
            def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
                return apply_rope(x, *((at.cos, at.sin) if positions is None else at.rope(positions)))

            return self.variant.attend(
                q, k, v, finish=Finish(q_norm or _identity, k_norm or _identity, rotate),
                route=RouteInputs(*route) if route else None, documents=at.documents, scale=self.scale,
                config=self.config, memory=Memory(view, at.chunks, selector, of.block, of.fuse, of.recall),
            )

        raw = [t.transpose(0, 1) for t in (q_SBHd, k_SBGd, v_SBGd)]
        route = () if self.route is None else self.route(q_SBHd, x_SBh)
        if isinstance(inputs, GenerationInputs):
            out = self._generate(inputs, attend, raw, route)
        else:
            out = self._attend(inputs, attend, raw, route)
        # [B,S,H,d] -> [S,B,H*d]
        return out.transpose(0, 1).flatten(2)

    def _attend(self, inputs: AttentionInputs, attend: Callable[..., tuple[Any, ...]], raw: list[Tensor],
                route: tuple[Tensor | None, ...]) -> Tensor:
        arguments = (inputs, inputs.history.view(self.layer), *raw, *route)
        if self.recompute and self.training and torch.is_grad_enabled():
            out, weights, *update = checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, weights, *update = attend(*arguments)
        if weights is not None:
            self._record(weights.detach())
        for each in update:
            inputs.history.stage(self.layer, each)
            if each.recalled is not None and inputs.chunks is not None:
                self.recall_distances = _distances(each.recalled, inputs.chunks)
        return out

    def _generate(self, inputs: GenerationInputs, attend: Callable[..., tuple[Any, ...]], raw: list[Tensor],
                  route: tuple[Tensor | None, ...]) -> Tensor:
        logits, beta, decay_k, decay_v, core_logits = route or (None,) * 5
        gated, rope = bool(route), inputs.rope  # the generation keeps `core`, which must not keep the generation

        def core(piece: Piece, view: View, q: Tensor, k: Tensor, v: Tensor, mine: Tensor | None,
                 of_core: Tensor | None) -> tuple[Tensor, Update | None]:
            of_route = (mine, beta, decay_k, decay_v, of_core) if gated else ()
            out, _, *update = attend(of_piece(piece, rope), view, q, k, v, *of_route)
            return out, update[0] if update else None

        return inputs.generation.attend(self.layer, core, *raw, logits, core_logits)

    def _selector(self, key_bias_Gd: Tensor | None) -> hashing.Selector | None:
        if not self.recalls:
            return None
        l3 = self.config.memory_hierarchy.l3
        return hashing.Selector(l3.selection, l3.recalled_chunks, self.planes, key_bias_Gd)

    def _record(self, weights: Tensor) -> None:
        if self.observe is not None:
            self.observe(weights)
        self.statistics = weights.flatten(0, -2).mean(0), route_entropy(weights).mean()


def _identity(x: Tensor) -> Tensor:
    return x


def _distances(recalled: Tensor, chunks: Chunks) -> Tensor:
    """Chunk numbers [B,n,G,R], -1 for none -> chunks between each query chunk and what it recalled, [K]."""
    numbers = torch.arange(chunks.first, chunks.first + chunks.count, device=recalled.device)
    return (numbers[:, None, None] - recalled)[recalled >= 0]
