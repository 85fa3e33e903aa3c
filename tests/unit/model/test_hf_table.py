"""The table of Megatron parameters and Hugging Face tensors: against the built model, a plain fusion by hand, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest
import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.model.build import build_model
from mka_megatron.model.hf_table import hf_table, hf_tensors

VOCAB = 90  # padded to 96
SHAPE = ["model.vocab_size=90", "model.vocab_multiple=32", "model.num_layers=2", "model.hidden_size=32", "model.head_dim=8",
         "model.ffn_hidden_size=48", "model.num_attention_heads=8", "model.num_kv_heads=4", "data.sequence_length=64",
         "model.max_position_embeddings=64", "routing.gate_hidden_size=6"]
FAMILIES = {
    "qwen2": ["model.qkv_bias=true", "model.tie_embeddings=false"],
    "qwen2, tied": ["model.qkv_bias=true", "model.tie_embeddings=true"],
    "qwen3": ["model.qkv_bias=false", "model.qk_norm=true", "model.tie_embeddings=true"],
    "qwen3, untied": ["model.qkv_bias=false", "model.qk_norm=true", "model.tie_embeddings=false"],
    "llama": ["model.qkv_bias=false", "model.tie_embeddings=false"],
}
L3 = ["data.pad_documents_to_chunks=true", "memory_hierarchy.l1.chunk_size=8", "memory_hierarchy.l3.enabled=true"]
VARIANTS = {
    "mha": ["attention.variant=mha"],
    "mqa": ["attention.variant=mqa"],
    "gqa": ["attention.variant=gqa"],
    "mka": ["attention.variant=mka", "memory_hierarchy.l2.decay=head"],
    "fastmka": ["attention.variant=fastmka"],
    "fastmka, fixed decay": ["attention.variant=fastmka", "memory_hierarchy.l2.decay=fixed"],
    "fastmka, mean": ["attention.variant=fastmka", "memory_hierarchy.l2.summary=mean"],
    "fastmka, one level": ["attention.variant=fastmka", "memory_hierarchy.l2.enabled=false"],
    "fastmka, hash, group": ["attention.variant=fastmka", "routing.scope=group", *L3],
    "fastmka, exact, x": ["attention.variant=fastmka", "routing.gate_input=x", *L3, "memory_hierarchy.l3.selection=exact"],
    "block core, group, x": ["attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.window=16",
                             "routing.gate_input=x", "routing.scope=group", *L3, "memory_hierarchy.l3.hash_tables=2"],
    "blockmka": ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", *L3],
}


def config_of(*cases: Sequence[str]) -> Config:
    return load_config([], [*SHAPE, *chain(*cases)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_names_order_shapes_and_split_are_the_models(family: str, variant: str, topology) -> None:
    config = config_of(FAMILIES[family], VARIANTS[variant])
    model = build_model(config, topology, VOCAB)
    table = hf_table(config, VOCAB)
    planes = {name: b for name, b in model.named_buffers()
              if name.endswith(".planes") and config.memory_hierarchy.l3.selection == "hash"}
    parameters = dict(model.named_parameters())
    assert [name for name in table if name not in planes] == list(parameters)
    assert {name for name in table if name in planes} == set(planes)
    for name, tensor in (parameters | planes).items():
        assert table[name].shape == tuple(tensor.shape), name
        split = getattr(tensor, "tensor_model_parallel", False)
        assert table[name].split == split, name
        if split:
            assert table[name].dim == tensor.partition_dim, name
        assert table[name].added == (".route." in name or name in planes)


def random_hf(config: Config) -> dict[str, Tensor]:
    """The Hugging Face tensors of `config`, numbered so that a mistake shows."""
    model, tensors, count = config.model, {}, 0
    heads, kv, d = model.num_attention_heads, model.num_kv_heads, model.head_dim
    shapes = {"model.embed_tokens.weight": (VOCAB, model.hidden_size), "model.norm.weight": (model.hidden_size,)}
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (VOCAB, model.hidden_size)
    for layer in range(model.num_layers):
        of_layer = {
            "input_layernorm.weight": (model.hidden_size,), "post_attention_layernorm.weight": (model.hidden_size,),
            "self_attn.q_proj.weight": (heads * d, model.hidden_size), "self_attn.k_proj.weight": (kv * d, model.hidden_size),
            "self_attn.v_proj.weight": (kv * d, model.hidden_size), "self_attn.o_proj.weight": (model.hidden_size, heads * d),
            "mlp.gate_proj.weight": (model.ffn_hidden_size, model.hidden_size),
            "mlp.up_proj.weight": (model.ffn_hidden_size, model.hidden_size),
            "mlp.down_proj.weight": (model.hidden_size, model.ffn_hidden_size),
        }
        if model.qkv_bias:
            of_layer |= {f"self_attn.{n}_proj.bias": (rows * d,) for n, rows in (("q", heads), ("k", kv), ("v", kv))}
        if model.qk_norm:
            of_layer |= {f"self_attn.{n}_norm.weight": (d,) for n in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(count, count + size, dtype=torch.float64).view(shape)
        count += size
    return tensors


def fused(config: Config, hf: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Every rank's Megatron parameters, by hand."""
    model = config.model
    kv, hidden = model.num_kv_heads, model.hidden_size
    pad = torch.zeros(96 - VOCAB, hidden, dtype=torch.float64)
    split: dict[str, tuple[int, Tensor]] = {"embedding.word_embeddings.weight": (0, torch.cat([hf["model.embed_tokens.weight"], pad]))}
    whole = {"decoder.final_layernorm.weight": hf["model.norm.weight"]}
    if not model.tie_embeddings:
        split["output_layer.weight"] = 0, torch.cat([hf["lm_head.weight"], pad])
    out: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for suffix, tail in (("weight", (hidden,)), ("bias", ())):
            if f"{theirs}self_attn.q_proj.{suffix}" in hf:
                q, k, v = (hf[f"{theirs}self_attn.{n}_proj.{suffix}"].view(kv, -1, *tail) for n in "qkv")
                split[f"{ours}self_attention.linear_qkv.{suffix}"] = 0, torch.cat([q, k, v], dim=1).reshape(-1, *tail)
        split[f"{ours}self_attention.linear_proj.weight"] = 1, hf[f"{theirs}self_attn.o_proj.weight"]
        split[f"{ours}mlp.linear_fc2.weight"] = 1, hf[f"{theirs}mlp.down_proj.weight"]
        halves = [hf[f"{theirs}mlp.{n}_proj.weight"].chunk(ranks) for n in ("gate", "up")]
        for rank in range(ranks):
            out[rank][f"{ours}mlp.linear_fc1.weight"] = torch.cat([halves[0][rank], halves[1][rank]])
        whole[f"{ours}input_layernorm.weight"] = hf[f"{theirs}input_layernorm.weight"]
        whole[f"{ours}pre_mlp_layernorm.weight"] = hf[f"{theirs}post_attention_layernorm.weight"]
        for name in "qk" if model.qk_norm else "":
            whole[f"{ours}self_attention.{name}_layernorm.weight"] = hf[f"{theirs}self_attn.{name}_norm.weight"]
    for rank in range(ranks):
        out[rank] |= {name: tensor.chunk(ranks, dim)[rank] for name, (dim, tensor) in split.items()} | whole
    return out


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])  # at 8 two ranks share a KV head
@pytest.mark.parametrize("family", FAMILIES)
def test_both_directions(family: str, ranks: int) -> None:
    config = config_of(FAMILIES[family], ["attention.variant=gqa", f"parallel.tensor_parallel={ranks}"])
    hf = random_hf(config)
    shards = fused(config, hf, ranks)
    table = hf_table(config, VOCAB)
    assert set(table) == set(shards[0])
    for rank in range(ranks):
        for name, entry in table.items():
            size = entry.shard(ranks)[entry.dim]
            runs = entry.cut(rank * size if entry.split else 0, size)
            pieces = [hf[run.source].narrow(entry.dim, run.start, run.length) for run in runs]
            wanted = shards[rank][name]
            got = torch.cat([*pieces, wanted.new_zeros(size - sum(map(len, pieces)), *wanted.shape[1:])]
                            if entry.dim == 0 else pieces, entry.dim)
            assert torch.equal(got, wanted), (rank, name)
    back = hf_tensors(table)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tuple(tensor.shape) for name, tensor in hf.items()}
    for name, tensor in back.items():
        pieces = [shards[rank][tensor.entry.name].narrow(tensor.entry.dim, start, length)
                  for rank, start, length in tensor.on_ranks(ranks)]
        assert torch.equal(torch.cat(pieces, tensor.entry.dim), hf[name]), name


def test_mla_has_no_counterpart() -> None:
    with pytest.raises(ConfigError, match=r"attention\.variant is mla"):
        hf_table(config_of(["attention.variant=mla"]), VOCAB)
