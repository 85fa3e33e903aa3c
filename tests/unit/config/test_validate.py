"""Every impossible combination is refused, with the key, the value and the fix in the sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.fields import sections
from mka_megatron.config.load import ConfigError, load_config
from mka_megatron.config.schema import ModelConfig, ParallelConfig
from mka_megatron.config.validate import LIMITS, data_parallel_size
from mka_megatron.config.variants import GATED, effective_kv_heads

BLOCK = ["attention.variant=blockmka", "memory_hierarchy.l1.window=256", "data.pad_documents_to_chunks=true"]
L3 = ["memory_hierarchy.l3.enabled=true", "data.pad_documents_to_chunks=true"]
SEGMENTS = [*BLOCK, *L3, "training.segment_length=128"]

REFUSED: list[tuple[list[str], int | None, tuple[str, ...]]] = [
    (["model.num_layers=1001"], None, ("model.num_layers is 1001", "at most 1000")),
    # heads
    (["model.head_dim=63"], None, ("model.head_dim is 63", "even")),
    (["attention.mla.qk_rope_head_dim=33"], None, ("attention.mla.qk_rope_head_dim is 33", "even")),
    (["model.num_kv_heads=3"], None, ("model.num_kv_heads is 3", "divide model.num_attention_heads (4)")),
    (["parallel.tensor_parallel=3"], None, ("parallel.tensor_parallel is 3", "model.num_attention_heads (4)")),
    (["parallel.tensor_parallel=2", "model.ffn_hidden_size=705"], None,
     ("parallel.tensor_parallel is 2", "model.ffn_hidden_size (705)")),
    (["parallel.tensor_parallel=4"], None, ("parallel.tensor_parallel is 4", "fastmka", "KV head", "2")),
    (["parallel.tensor_parallel=2", "model.num_kv_heads=1"], None, ("parallel.tensor_parallel is 2", "fastmka")),
    (["parallel.tensor_parallel=2", "model.num_kv_heads=1", "attention.variant=mka"], None,
     ("parallel.tensor_parallel is 2", "mka", "KV head")),
    (["parallel.tensor_parallel=4", "attention.variant=gqa", "model.num_attention_heads=12", "model.num_kv_heads=6"],
     None, ("parallel.tensor_parallel is 4", "6 KV heads")),
    (["parallel.tensor_parallel=4", "attention.variant=gqa", "model.num_attention_heads=12", "model.num_kv_heads=3"],
     None, ("parallel.tensor_parallel is 4", "3 KV heads")),
    (["parallel.tensor_parallel=2", "model.vocab_multiple=1"], None, ("model.vocab_multiple is 1", "(2)")),
    # rope
    (["model.rope.factor=2"], None, ("model.rope.factor is 2", "model.rope.scaling")),
    (["model.rope.scaling=llama3", "model.rope.high_freq_factor=1"], None, ("model.rope.high_freq_factor is 1",)),
    (["model.rope.scaling=yarn", "model.rope.beta_fast=1"], None, ("model.rope.beta_fast is 1",)),
    # attention and routing
    (["attention.variant=mka", "attention.mixture=score", "routing.mode=top1"], None,
     ("routing.mode is top1", "score", "top2")),
    (["attention.mixture=score"], None, ("attention.mixture is score", "fastmka")),
    (["attention.variant=gqa", "attention.fuse=k"], None, ("attention.fuse is k", "gqa")),
    (["memory_hierarchy.l2.enabled=false", "routing.mode=top2"], None, ("routing.mode is top2", "l2.enabled")),
    (["memory_hierarchy.l2.enabled=false", "routing.mode=top1"], None, ("routing.mode is top1", "l2.enabled")),
    # memory
    (["memory_hierarchy.l1.window=200"], None, ("memory_hierarchy.l1.window is 200", "multiple", "chunk_size (128)")),
    (["memory_hierarchy.l1.window=1000"], None, ("memory_hierarchy.l1.window is 1000", "multiple")),
    (["memory_hierarchy.l1.window=256"], None, ("memory_hierarchy.l1.window is 256", "block core", "512")),
    (["attention.variant=gqa", "attention.core=block"], None, ("attention.core is block", "gqa")),
    (["attention.block_backend=flex"], None, ("attention.block_backend is flex", "block core")),
    (["attention.variant=gqa", "attention.kernels=cuda"], None, ("attention.kernels is cuda", "gqa", "leave it out")),
    (["attention.variant=mka", "attention.kernels=cuda"], None, ("attention.kernels is cuda", "mka", "leave it out")),
    (BLOCK[:1], None, ("memory_hierarchy.l1.window is null", "block core")),
    (BLOCK[:2], None, ("data.pad_documents_to_chunks is false", "block core")),
    ([*BLOCK, "routing.mode=top1"], None, ("routing.mode is top1", "block core", "top2")),
    (["attention.variant=gqa", "memory_hierarchy.l3.enabled=true"], None, ("l3.enabled is true", "gqa")),
    (["memory_hierarchy.l3.enabled=true"], None, ("data.pad_documents_to_chunks is false", "l3.enabled")),
    ([*L3, "memory_hierarchy.l3.hash_bits=100"], None, ("l3.hash_bits is 100", "64")),
    ([*L3, "memory_hierarchy.l3.dram_pool_gib=4"], None, ("l3.dram_pool_gib is 4", "attention.core block")),
    ([*L3, "memory_hierarchy.l3.placement=ssd"], None, ("l3.placement is ssd", "attention.core block")),
    (["memory_hierarchy.l3.hbm_pool_gib=1"], None, ("l3.hbm_pool_gib is 1", "l3.enabled")),
    ([*L3, "memory_hierarchy.ssd_spill_path=/x"], None, ("ssd_spill_path is /x", "l3.placement is dram")),
    ([*L3, "memory_hierarchy.l3.ssd_pool_gib=2"], None, ("l3.ssd_pool_gib is 2", "l3.placement is dram")),
    ([*SEGMENTS, "memory_hierarchy.l3.placement=ssd"], None, ("l3.placement is ssd", "ssd_spill_path")),
    ([*SEGMENTS, "memory_hierarchy.l3.placement=ssd", "memory_hierarchy.ssd_spill_path=/x"], None,
     ("l3.placement is ssd", "l3.dram_pool_gib")),
    # segments
    (["training.segments_per_step=2"], None, ("training.segments_per_step is 2", "training.segment_length")),
    (["training.segment_length=128"], None, ("training.segment_length is 128", "blockmka")),
    ([*BLOCK, "training.segment_length=100"], None, ("training.segment_length is 100", "chunk_size (128)")),
    ([*BLOCK, "training.segment_length=384"], None, ("training.segment_length is 384", "data.sequence_length (512)")),
    ([*BLOCK, "training.segment_length=128", "training.segments_per_step=3"], None,
     ("training.segments_per_step is 3", "(4)")),
    ([*SEGMENTS, "attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l2.summary=mean"], None,
     ("memory_hierarchy.l2.summary is mean", "ema")),
    (["memory_hierarchy.l2.min_span=1"], None, ("memory_hierarchy.l2.min_span is 1", "greater than 1")),
    (["memory_hierarchy.l2.min_span=0.5"], None, ("memory_hierarchy.l2.min_span is 0.5", "at least 1")),
    (["memory_hierarchy.l2.min_span=8", "memory_hierarchy.l2.max_span=4"], None,
     ("memory_hierarchy.l2.max_span is 4", "min_span (8")),
    # parallel
    (["parallel.pipeline_parallel=2"], None, ("parallel.pipeline_parallel is 2", "not supported")),
    (["parallel.pipeline_parallel=2", "engine.zero_stage=2"], None, ("engine.zero_stage is 2", "pipeline_parallel")),
    (["parallel.pipeline_parallel=2", "engine.zero_stage=3"], None, ("engine.zero_stage is 3", "pipeline_parallel")),
    (["parallel.context_parallel=2", "attention.variant=mka", "attention.mixture=score"], None,
     ("parallel.context_parallel is 2", "score")),
    (["parallel.context_parallel=2", "memory_hierarchy.l2.summary=mean"], None,
     ("memory_hierarchy.l2.summary is mean", "ema")),
    (["parallel.context_parallel=3"], None, ("data.sequence_length is 512", "parallel.context_parallel (3)")),
    ([*BLOCK, "parallel.context_parallel=8"], None, ("data.sequence_length is 512", "chunk_size (1024)")),
    (["parallel.context_parallel=2", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true",
      "data.sequence_length=510"], None, ("data.sequence_length is 510", "x context_parallel (4)")),
    (["parallel.sequence_parallel=true"], None, ("parallel.sequence_parallel is true", "tensor_parallel")),
    (["parallel.sequence_parallel=true", "parallel.tensor_parallel=2", "data.sequence_length=511"], None,
     ("data.sequence_length is 511", "multiple of parallel.tensor_parallel x context_parallel (2)")),
    (["parallel.tensor_parallel=2"], 3, ("parallel.tensor_parallel 2", "multiple of 2", "3", "NPROC")),
    (["parallel.data_parallel=2"], 3, ("parallel.data_parallel is 2", "2 ranks", "3")),
    (["parallel.data_parallel=2", "parallel.tensor_parallel=2"], 2, ("parallel.data_parallel is 2", "4 ranks")),
    # data
    (["data.sequence_length=8192"], None, ("data.sequence_length is 8192", "max_position_embeddings (4096)")),
    (["data.train=[]"], None, ("data.train is []", "source")),
    (["data.train=[{path: a, weight: 0}]"], None, ("data.train[0].weight is 0", "greater than 0")),
    (["data.valid_fraction=1.0"], None, ("data.valid_fraction is 1.0", "less than 1")),
    (["data.valid_fraction=0"], None, ("data.valid_fraction is 0", "held out")),
    (["data.train_on_prompts=true"], None, ("data.train_on_prompts is true", "data.format sft")),
    (["data.pad_documents_to_chunks=true", "data.sequence_length=500"], None,
     ("data.sequence_length is 500", "chunk_size (128)")),
    # training
    (["training.warmup_steps=500"], None, ("training.warmup_steps is 500", "training.steps (400)")),
    (["training.schedule=wsd", "training.decay_steps=380"], None, ("training.decay_steps is 380", "400")),
    (["training.min_learning_rate=1"], None, ("training.min_learning_rate is 1", "training.learning_rate")),
    (["training.adam_beta1=1"], None, ("training.adam_beta1 is 1", "less than 1")),
    (["training.global_batch_size=12"], None, ("training.global_batch_size is 12", "multiple", "16")),
    (["training.global_batch_size=8"], 2, ("training.global_batch_size is 8", "2 replicas", "16")),
    (["training.global_batch_size=8", "parallel.data_parallel=4"], None, ("training.global_batch_size is 8", "4 replicas")),
    (["training.resume=no/such/checkpoint"], None, ("training.resume is no/such/checkpoint", "auto")),
    (["logging.profile_steps=[500]"], None, ("logging.profile_steps is 500", "400")),
    # engine
    (["engine.zero_stage=0", "engine.offload_optimizer=cpu"], None, ("engine.offload_optimizer is cpu", "zero_stage")),
    (["engine.zero_stage=2", "engine.offload_optimizer=nvme", "engine.nvme_path=/tmp"], None,
     ("engine.offload_optimizer is nvme", "zero_stage 3")),
    (["engine.zero_stage=2", "engine.offload_param=cpu"], None, ("engine.offload_param is cpu", "zero_stage 3")),
    (["engine.zero_stage=3", "engine.offload_param=nvme"], None, ("engine.offload_param is nvme", "nvme_path")),
    (["engine.zero_stage=3", "engine.offload_optimizer=nvme"], None, ("engine.offload_optimizer is nvme", "nvme_path")),
    (["engine.initial_loss_scale_power=40"], None, ("engine.initial_loss_scale_power is 40", "32")),
    (["engine.deepspeed_config=no.json"], None, ("engine.deepspeed_config is no.json", "no such file")),
]


@pytest.mark.parametrize(("overrides", "world_size", "parts"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_refused_in_one_sentence(overrides: list[str], world_size: int | None, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config((), overrides, world_size)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    assert all(part in text for part in parts), text


ALLOWED: list[tuple[list[str], int | None]] = [
    (["attention.variant=gqa", "parallel.tensor_parallel=4"], 4),
    (["attention.variant=mqa", "parallel.tensor_parallel=4"], 4),
    (["attention.variant=mha", "model.num_kv_heads=1", "parallel.tensor_parallel=4"], 4),
    (["attention.variant=mla", "model.num_kv_heads=1", "parallel.tensor_parallel=2"], 2),
    (["attention.variant=mla", "parallel.context_parallel=2"], 2),
    (["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "training.global_batch_size=16"], 4),
    (["attention.variant=mka", "attention.mixture=score", "routing.mode=top2"], 1),
    (["attention.variant=gqa", "routing.mode=top1"], 1),
    (["memory_hierarchy.l2.enabled=false"], 1),
    (["memory_hierarchy.l1.window=512"], 1),
    (["memory_hierarchy.l2.min_span=2", "memory_hierarchy.l2.max_span=2"], 1),
    (BLOCK, 1), (L3, 1), (SEGMENTS, 1),
    ([*BLOCK, "attention.variant=fastmka", "attention.core=block", "data.pad_documents_to_chunks=false",
      "data.reset_at_documents=false", "routing.mode=top2"], 1),
    ([*SEGMENTS, "training.segments_per_step=2", "memory_hierarchy.l3.placement=ssd",
      "memory_hierarchy.ssd_spill_path=/x", "memory_hierarchy.l3.dram_pool_gib=1",
      "memory_hierarchy.l3.ssd_pool_gib=2"], 1),
    ([*BLOCK, *L3, "memory_hierarchy.l3.dram_pool_gib=1", "memory_hierarchy.l3.placement=ssd",
      "memory_hierarchy.ssd_spill_path=/x"], 1),
    (["training.schedule=wsd", "training.decay_steps=360"], 1),
    (["training.schedule=cosine", "training.decay_steps=4000"], 1),
    (["engine.zero_stage=3", "engine.offload_param=cpu", "engine.offload_optimizer=nvme", "engine.nvme_path=/tmp"], 1),
    (["engine.zero_stage=1", "engine.offload_optimizer=cpu"], 1),
    (["data.valid=x", "data.valid_fraction=0"], 1),
    (["training.global_batch_size=48"], 3),
]


@pytest.mark.parametrize(("overrides", "world_size"), ALLOWED, ids=[" ".join(a[0]) for a in ALLOWED])
def test_allowed(overrides: list[str], world_size: int | None) -> None:
    load_config((), overrides, world_size)


@pytest.mark.parametrize("key", LIMITS)
def test_every_number_has_a_lower_limit_that_holds(key: str) -> None:
    smallest = LIMITS[key]
    below = -1 if smallest is None else smallest - 1
    with pytest.raises(ConfigError, match=f"{key} is {below}") as caught:
        load_config((), [f"{key}={below}"])
    assert "at least" in str(caught.value) or "greater than" in str(caught.value)


def test_every_number_of_the_schema_is_limited() -> None:
    numbers = {field.key for _, _, own in sections() for field in own
               if field.kind.split()[:2] in (["an", "integer"], ["a", "number"])}
    elsewhere = {"data.valid_fraction", "training.adam_beta1", "training.adam_beta2", "routing.beta_init",
                 "data.train[].weight", "data.valid[].weight"}
    assert numbers == set(LIMITS) | elsewhere


def test_the_deepspeed_file_must_be_a_json_object(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for text, part in (("{", "not JSON"), ("[1]", "not a JSON object")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=part):
            load_config((), [f"engine.deepspeed_config={path}"])
    path.write_text(json.dumps({"wall_clock_breakdown": True}))
    load_config((), [f"engine.deepspeed_config={path}"])


@given(tensor=st.integers(1, 8), replicas=st.integers(1, 16), extra=st.integers(0, 7))
def test_the_layout_fills_the_world_or_is_refused(tensor: int, replicas: int, extra: int) -> None:
    world = tensor * replicas + extra
    parallel = ParallelConfig(tensor_parallel=tensor)
    if world % tensor:
        with pytest.raises(ConfigError, match=f"{world} were started"):
            data_parallel_size(parallel, world)
    else:
        assert data_parallel_size(parallel, world) * tensor == world


def test_the_variant_facts_agree_with_the_registry() -> None:
    model = ModelConfig(num_attention_heads=8, num_kv_heads=2)
    assert {name for name, variant in VARIANTS.items() if variant.gated} == GATED & set(VARIANTS)
    for name, variant in VARIANTS.items():
        if variant.projection == "grouped":
            assert variant.kv_heads(model) == effective_kv_heads(name, model)
