"""Megatron's SelfAttention with a variant's core: QKV projection -> raw q, k, v -> core -> output projection."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mka_megatron.attention.registry import Variant
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import recalls
from mka_megatron.model.core_attention import VariantCore
from mka_megatron.model.inputs import AttentionInputs, GenerationInputs


class GroupedSelfAttention(SelfAttention):
    """Self-attention of every variant that projects to query heads and KV groups (all but mla)."""

    def __init__(self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int,
                 attn_mask_type: AttnMaskType = AttnMaskType.causal, cp_comm_type: str | None = None,
                 pg_collection: ProcessGroupCollection | None = None, *, run: Config, variant: Variant):
        super().__init__(config, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        self.core_attention = VariantCore(run, variant, config, self.pg_collection.tp, layer_number - 1)
        self.key_bias: Tensor | None = None
        if recalls(run) and run.model.qkv_bias and not run.model.qk_norm:
            # read where the projection has its parameters at hand, which under ZeRO-3 is nowhere else
            self.linear_qkv.register_forward_hook(self._keep_key_bias)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
                packed_seq_params: AttentionInputs | GenerationInputs,
                **unused: object) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] ([S/tp,B,hidden] under sequence parallelism) -> (output, bias), same shape."""
        q, k, v = self._raw_query_key_value(hidden_states)
        core = self.core_attention(q, k, v, hidden_states, packed_seq_params, self.q_layernorm, self.k_layernorm,
                                   self.key_bias)
        return self.linear_proj(core)

    def _keep_key_bias(self, linear: nn.Module, inputs: object, outputs: object) -> None:
        # [G*(H/G+2)*d] -> [G, H/G+2, d], keys next to last
        d = self.hidden_size_per_attention_head
        bias = linear.get_parameter("bias").detach().unflatten(0, (self.num_query_groups_per_partition, -1, d))
        self.key_bias = bias[:, -2].clone()

    def _raw_query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Local q [S,B,H,d], k and v [S,B,G,d] with bias, before q/k-norm and RoPE.

        Megatron's own split would hand out k-normed keys; fusion needs raw ones.
        """
        # [S,B,G,(H/G+2)*d] -> q [S,B,G,H/G*d], k, v [S,B,G,d]
        mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        q, k, v = mixed.split(sizes, dim=-1)
        q = q.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        if self.config.num_query_groups < self.world_size:
            # a group is shared by several ranks: keep this rank's share of its query heads
            ranks_per_group = self.world_size // self.config.num_query_groups
            q = q.chunk(ranks_per_group, 3)[self.pg_collection.tp.rank() % ranks_per_group]
        return q.flatten(2, 3), k, v
