"""The transformer layer as a Megatron ModuleSpec: local linears, our norm, the variant's attention."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mka_megatron.attention.registry import VARIANTS, Variant
from mka_megatron.config.schema import Config
from mka_megatron.model.latent_attention import LatentSelfAttention
from mka_megatron.model.norm import HeadNorm, RMSNorm
from mka_megatron.model.self_attention import GroupedSelfAttention
from mka_megatron.model.swiglu import SwiGLU
from mka_megatron.model.tiles import TiledLayer


def block_spec(config: Config) -> TransformerBlockSubmodules:
    """`model.num_layers` equal layers and the final norm."""
    layer = layer_spec(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.model.num_layers, layer_norm=RMSNorm)


def layer_spec(config: Config) -> ModuleSpec:
    """One pre-norm layer with SwiGLU and the attention that `attention.variant` names."""
    backend = LocalSpecProvider()
    variant = VARIANTS[config.attention.variant]
    parts = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=_ATTENTION[variant.projection](config, variant, backend),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp_bda=get_bias_dropout_add,
    )
    mlp = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(),
        linear_fc2=backend.row_parallel_linear(),
        activation_func=SwiGLU,
    )
    tile = config.training.mlp_tile
    if tile is not None:
        return ModuleSpec(module=TiledLayer, params={"mlp": mlp, "tile": tile}, submodules=parts)
    parts.mlp = ModuleSpec(module=MLP, submodules=mlp)
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def _grouped(config: Config, variant: Variant, backend: LocalSpecProvider) -> ModuleSpec:
    head_norm = HeadNorm if config.model.qk_norm else None
    return ModuleSpec(
        module=GroupedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "run": config, "variant": variant},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=IdentityOp,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _latent(config: Config, variant: Variant, backend: LocalSpecProvider) -> ModuleSpec:
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"run": config},
    )


_ATTENTION = {"grouped": _grouped, "latent": _latent}
