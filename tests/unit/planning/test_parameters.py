"""The planner's parameters, name by name, are those of the model that Megatron builds."""

from __future__ import annotations

import pytest

from mka_megatron.config.load import load_config
from mka_megatron.model.build import build_model
from mka_megatron.planning.parameters import rank_parameters
from mka_megatron.training.optimizer import parameter_groups

SHAPE = ["model.num_layers=2", "model.hidden_size=96", "model.ffn_hidden_size=160", "model.num_attention_heads=4",
         "model.num_kv_heads=2", "model.head_dim=32", "model.vocab_multiple=64"]
BLOCK = ["memory_hierarchy.l1.window=128", "memory_hierarchy.l3.enabled=true", "data.pad_documents_to_chunks=true"]
CASES = {
    "mha": ["attention.variant=mha"],
    "mqa": ["attention.variant=mqa", "model.qkv_bias=false"],
    "gqa, untied": ["attention.variant=gqa", "model.tie_embeddings=false", "model.qk_norm=true"],
    "mla": ["attention.variant=mla"],
    "mla, query rank": ["attention.variant=mla", "attention.mla.q_lora_rank=24"],
    "mka": ["attention.variant=mka"],
    "mka score, L3": ["attention.variant=mka", "attention.mixture=score", "memory_hierarchy.l3.enabled=true",
                      "data.pad_documents_to_chunks=true"],
    "fastmka": [],
    "fastmka, one decay per head": ["memory_hierarchy.l2.decay=head"],
    "fastmka, fixed decay": ["memory_hierarchy.l2.decay=fixed"],
    "fastmka, mean": ["memory_hierarchy.l2.summary=mean"],
    "fastmka, one level": ["memory_hierarchy.l2.enabled=false"],
    "fastmka, gate per head": ["routing.scope=group"],
    "fastmka, gate of the input": ["routing.gate_input=x"],
    "fastmka, gate of the input per head": ["routing.gate_input=x", "routing.scope=group"],
    "fastmka over blocks": ["attention.core=block", *BLOCK],
    "blockmka": ["attention.variant=blockmka", *BLOCK],
    "blockmka, gate per head": ["attention.variant=blockmka", "routing.scope=group", *BLOCK],
    "blockmka, local": ["attention.variant=blockmka", "memory_hierarchy.l1.window=128", "data.pad_documents_to_chunks=true"],
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_built_model(case: str, topology) -> None:
    """Name, size, whether Megatron splits it over tensor-parallel ranks, and whether the optimizer decays it."""
    config = load_config([], [*SHAPE, *CASES[case]])
    model = build_model(config, topology, 150)
    decayed = {id(parameter) for group in parameter_groups(model, 0.1) if group["weight_decay"] for parameter in group["params"]}
    planned = {each.name: (each.elements, each.split, each.decayed) for each in rank_parameters(config, 150, 1)}
    assert planned == {
        name: (parameter.numel(), bool(getattr(parameter, "tensor_model_parallel", False)), id(parameter) in decayed)
        for name, parameter in model.named_parameters()
    }
