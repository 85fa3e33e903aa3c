"""Multi-head latent attention (DeepSeek-V2, section 2.1) on Megatron's parallel linears.

Megatron's own MLA needs Transformer Engine. Queries (optionally) and keys/values pass through
low-rank latents; position enters through a decoupled rotary part, its key shared by all heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mka_megatron.attention.mla import absorbed_attention, latent_attention
from mka_megatron.config.schema import Config
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.view import View
from mka_megatron.model.inputs import AttentionInputs, GenerationInputs, of_piece
from mka_megatron.model.norm import RMSNorm
from mka_megatron.parallel.regions import copy_to_region
from mka_megatron.parallel.replicated import mark_partial

# Suffixes: S sequence, B batch, H local query heads, r latent rank.


class LatentSelfAttention(MegatronModule):
    """The mla baseline: up-projections and output are tensor-parallel, down-projections replicated."""

    def __init__(self, config: TransformerConfig, layer_number: int, cp_comm_type: str | None = None,
                 *, pg_collection: ProcessGroupCollection, run: Config):
        super().__init__(config=config)
        mla, heads = run.attention.mla, config.num_attention_heads
        self.mla = mla
        self.layer = layer_number - 1
        self.tp_group = pg_collection.tp
        self.heads = heads // self.tp_group.size()
        self.query_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        self.recompute = run.training.recompute == "selective"
        self.q_down: nn.Parameter | None = None
        self.q_norm: RMSNorm | None = None
        query_input = config.hidden_size
        if mla.q_lora_rank is not None:
            self.q_down = self._replicated(mla.q_lora_rank)
            self.q_norm = RMSNorm(config, mla.q_lora_rank, config.layernorm_epsilon)
            query_input = mla.q_lora_rank
        self.linear_q = self._column(query_input, heads * self.query_dim)
        self.kv_down = self._replicated(mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config, mla.kv_lora_rank, config.layernorm_epsilon)
        self.linear_kv = self._column(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.linear_proj = RowParallelLinear(
            heads * mla.v_head_dim, config.hidden_size, config=config, init_method=config.output_layer_init_method,
            bias=False, input_is_parallel=True, skip_bias_add=True, tp_group=self.tp_group,
        )

    def _column(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            inputs, outputs, config=self.config, init_method=self.config.init_method, bias=False,
            gather_output=False, skip_bias_add=False, tp_group=self.tp_group,
        )

    def _replicated(self, outputs: int) -> nn.Parameter:
        weight = nn.Parameter(torch.empty(outputs, self.config.hidden_size, dtype=torch.float32))
        self.config.init_method(weight.data)
        weight.data = weight.data.to(self.config.params_dtype)
        return mark_partial(weight) if self.config.sequence_parallel else weight

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
                packed_seq_params: AttentionInputs | GenerationInputs,
                **unused: object) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] ([S/tp,B,hidden] under sequence parallelism) -> (output, bias), same shape."""
        mla = self.mla
        query_input = hidden_states
        if self.q_down is not None and self.q_norm is not None:
            query_input = self.q_norm(F.linear(hidden_states, self.q_down))
        q, _ = self.linear_q(query_input)
        latent, k_rope = F.linear(hidden_states, self.kv_down).split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)
        if isinstance(packed_seq_params, GenerationInputs):
            return self._generate(packed_seq_params, q, latent, k_rope)
        kv, _ = self.linear_kv(latent)
        # the rotary key is shared by the heads of all ranks: its gradient is their sum
        if self.config.sequence_parallel:
            k_rope = gather_from_sequence_parallel_region(k_rope, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            k_rope = copy_to_region(k_rope, self.tp_group)

        def attend(at: AttentionInputs, view: View, q_BSHd: Tensor, kv_BSHd: Tensor, k_rope_BSr: Tensor) -> Tensor:
            return latent_attention(
                q_BSHd, kv_BSHd, k_rope_BSr, at.cos, at.sin, at.documents, nope=mla.qk_nope_head_dim,
                scale=self.query_dim**-0.5, view=view,
            )

        heads = (x.unflatten(-1, (self.heads, -1)) for x in (q, kv))
        arguments = [x.transpose(0, 1) for x in (*heads, k_rope)]
        if self.recompute and self.training and torch.is_grad_enabled():
            view = packed_seq_params.history.view(self.layer)
            out = checkpoint(attend, packed_seq_params, view, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out = attend(packed_seq_params, packed_seq_params.history.view(self.layer), *arguments)
        # [B,S,H,dv] -> [S,B,H*dv]
        return self.linear_proj(out.transpose(0, 1).flatten(2))

    def _generate(self, inputs: GenerationInputs, q: Tensor, latent: Tensor, k_rope: Tensor
                  ) -> tuple[Tensor, Tensor | None]:
        """Of rows that go on; only latents are remembered."""
        up = self.linear_kv.get_parameter("weight")

        def core(piece: Piece, view: View, q_BSHd: Tensor, latent_BSc: Tensor, k_rope_BSr: Tensor) -> tuple[Tensor, None]:
            at = of_piece(piece, inputs.rope)
            return absorbed_attention(
                q_BSHd, latent_BSc, k_rope_BSr, up, at.cos, at.sin, at.documents, nope=self.mla.qk_nope_head_dim,
                scale=self.query_dim**-0.5, view=view,
            ), None

        at_hand = [x.transpose(0, 1) for x in (q.unflatten(-1, (self.heads, -1)), latent, k_rope)]
        out = inputs.generation.attend(self.layer, core, *at_hand)
        return self.linear_proj(out.transpose(0, 1).flatten(2))
