"""Config -> the model, on this rank's device, with its initial or imported weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.model.gpt import GPT
from mka_megatron.model.hf_table import padded_vocab_size
from mka_megatron.model.rope import RotaryTable
from mka_megatron.model.spec import block_spec
from mka_megatron.parallel.groups import Topology
from mka_megatron.parallel.replicated import sum_partial_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: Config, topology: Topology, vocab_size: int,
                construction: AbstractContextManager | None = None) -> GPT:
    """The model of `config`, equal at every tensor-parallel size for the same seed.

    Args:
        config: a validated configuration.
        topology: process groups and device.
        vocab_size: entries of the tokenizer (or of the imported model).
        construction: context to construct modules in (ZeRO-3 partitions parameters as they appear).

    Returns:
        The model on `topology.device` in `training.precision`, with partial gradients summed over TP.
    """
    torch.manual_seed(config.training.seed)
    padded = padded_vocab_size(vocab_size, config.model.vocab_multiple)
    mla = config.attention.mla
    latent = VARIANTS[config.attention.variant].projection == "latent"
    rotary_dim = mla.qk_rope_head_dim if latent else config.model.head_dim
    rope = RotaryTable(config.model.rope, rotary_dim, config.model.max_position_embeddings)
    with construction or nullcontext():
        model = GPT(config, transformer_config(config), block_spec(config), rope, topology, vocab_size, padded)
        if construction is None:
            model.to(topology.device)
    for buffer in model.buffers():  # ZeRO-3 construction places parameters only
        buffer.data = buffer.data.to(topology.device)
    sum_partial_gradients(model, topology.tp_group)
    if config.model.init_from is not None:
        from mka_megatron.model.weights import load_hf_weights

        load_hf_weights(model, config, topology)
    return model


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's view of the model."""
    model, parallel = config.model, config.parallel
    on_cuda = torch.cuda.is_available()
    full = config.training.recompute == "full"
    dtype = DTYPES[config.training.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=VARIANTS[config.attention.variant].kv_heads(model),
        kv_channels=model.head_dim,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu_initialization=True,  # whole-matrix draws, sliced: equal weights at every TP size
        tensor_model_parallel_size=parallel.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        bias_activation_fusion=on_cuda,
        use_te_activation_func=not on_cuda,  # the spec's own activation module, model/swiglu.py
        bias_dropout_fusion=on_cuda,
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        deterministic_mode=False,
    )
