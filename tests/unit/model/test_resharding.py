"""Shards put together from those of another tensor-parallel size, against shards cut from the whole by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mka_megatron.config.schema import Config
from mka_megatron.model.hf_table import Entry, hf_table
from mka_megatron.model.resharding import regions
from tests.helpers.training_checkpoints import config_of

FFN, HIDDEN = 24, 24
SIZES = (1, 2, 4)


def table(ranks: int) -> dict[str, Entry]:
    config: Config = config_of("model.num_kv_heads=4", f"model.ffn_hidden_size={FFN}", f"model.hidden_size={HIDDEN}")
    return hf_table(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor_parallel=ranks)), 64)


def put_together(name: str, shards: list[Tensor], ranks: int, rank: int) -> Tensor:
    new, old = table(ranks)[name], table(len(shards))[name]
    parts = regions(new, ranks, rank, old, len(shards))
    return torch.cat([shards[holder].narrow(new.dim, start, length) for holder, start, length in parts], new.dim)


@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_gate_and_up_projection_are_shared_out_each(before: int, after: int) -> None:
    gate, up = torch.randn(2, FFN, HIDDEN)

    def cut(ranks: int) -> list[Tensor]:
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]

    for rank, shard in enumerate(cut(after)):
        assert torch.equal(put_together("decoder.layers.0.mlp.linear_fc1.weight", cut(before), after, rank), shard)


@pytest.mark.parametrize(("name", "dim"), [
    ("decoder.layers.1.self_attention.linear_qkv.weight", 0), ("decoder.layers.1.self_attention.linear_qkv.bias", 0),
    ("decoder.layers.0.self_attention.linear_proj.weight", 1), ("decoder.layers.0.mlp.linear_fc2.weight", 1),
    ("embedding.word_embeddings.weight", 0), ("decoder.layers.0.self_attention.core_attention.route.gate.fc1", 1),
])
@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_others_are_cut_evenly(before: int, after: int, name: str, dim: int) -> None:
    whole = torch.randn(table(1)[name].shape)
    for rank, shard in enumerate(whole.chunk(after, dim)):
        assert torch.equal(put_together(name, list(whole.chunk(before, dim)), after, rank), shard)


def test_replicas_take_the_first() -> None:
    name = "decoder.final_layernorm.weight"
    assert list(regions(table(4)[name], 4, 3, table(2)[name], 2)) == [(0, 0, HIDDEN)]
