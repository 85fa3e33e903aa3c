"""The memory model's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.planning import host, sharded_states, states
from mka_megatron.planning.memory import node_memory, rank_memory
from mka_megatron.planning.parameters import Parameter
from mka_megatron.planning.states import filled, touched
from mka_megatron.planning.steps import Layout
from mka_megatron.training import deepspeed_config

VOCAB = 1000
# 1 layer, gqa: embedding 1024 x 64; two norms and the last 3 x 64; qkv (64 + 2 x 32) x 64 + 128; output 64 x 64; MLP 3 x 64 x 160
SHAPE = ["attention.variant=gqa", "model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=160",
         "model.num_attention_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.vocab_multiple=64",
         "data.sequence_length=8", "training.micro_batch_size=1", "memory_hierarchy.l1.chunk_size=8"]  # fmt: skip
EMBEDDING, NORMS, QKV, OUTPUT, MLP = 1024 * 64, 3 * 64, 128 * 64 + 128, 64 * 64, 3 * 64 * 160
P = EMBEDDING + NORMS + QKV + OUTPUT + MLP
ROTARY = (4096 + 8) * 16 * 2 * 4  # tables of all positions, and of the 8 slots at hand


ONE = Layout(1, 1, 1)
SPILLED = ["memory_hierarchy.l3.placement=ssd", "memory_hierarchy.ssd_spill_path=/tmp", "memory_hierarchy.l3.dram_pool_gib=0.0001"]


def configured(*overrides: str, world: int = 1) -> Config:
    batch = f"training.global_batch_size={world}"
    return load_config([], [*SHAPE, batch, *overrides], world_size=world)


def parts(*overrides: str, world: int = 1, layout: Layout = ONE, device="cpu") -> dict[str, int]:
    found = rank_memory(configured(*overrides, world=world), layout, VOCAB, device)
    assert [part.name for part in found] == ["weights", "gradients", "optimizer", "activations", "kv", "logits", "workspace"]
    assert all(part.formula for part in found)
    return {part.name: part.bytes for part in found}


def test_stage_0_in_fp32_peaks_where_gradients_are_flattened() -> None:
    """16 bytes a parameter, and 4 of the flat copy."""
    found = parts("engine.zero_stage=0")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (4 * P, 4 * P, 8 * P)
    assert found["workspace"] >= 4 * P and found["activations"] == found["logits"] == 0


def test_stage_1_shares_master_weights_and_moments_over_replicas_and_context() -> None:
    """Of 4 ranks each has a quarter of 12 bytes a parameter: two replicas of two context ranks like four replicas."""
    shared = ["parallel.context_parallel=2", "data.sequence_length=16"]
    by_context = parts("engine.zero_stage=1", *shared, world=4, layout=Layout(1, 2, 2))
    by_replicas = parts("engine.zero_stage=1", world=4, layout=Layout(1, 1, 4))
    assert by_context["optimizer"] == by_replicas["optimizer"] == 12 * -(-P // 4)
    assert by_context["weights"] == by_replicas["weights"] == 4 * P


def test_stage_1_in_bf16_keeps_all_gradients_in_fp32() -> None:
    found = parts("engine.zero_stage=1", "training.precision=bf16", world=2, layout=Layout(1, 1, 2), device="cuda")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * P, (4 + 2) * P, 12 * -(-P // 2))
    # one flat copy of both groups in fp32, and one of that in bf16
    assert found["workspace"] == (4 + 2) * P + ROTARY


def test_stage_2_in_bf16_has_a_share_of_the_gradients_and_two_buckets_on_a_gpu() -> None:
    found = parts("engine.zero_stage=2", "training.precision=bf16", world=4, layout=Layout(1, 1, 4), device="cuda")
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * P, 4 * -(-P // 4), 12 * -(-P // 4))
    # two buckets of 50 million bf16; the model in one of them, once more to reduce it; the embedding in fp32, and two
    # of its gradients
    assert found["workspace"] == 2 * 50_000_000 * 2 + 2 * P + 4 * EMBEDDING + 2 * 2 * EMBEDDING + ROTARY


def test_stage_3_shares_the_weights_and_gathers_those_in_use() -> None:
    found = parts("engine.zero_stage=3", "training.precision=bf16", world=2, layout=Layout(1, 1, 2), device="cuda")
    # every parameter is smaller than 100,000 elements: all are kept whole besides the shares
    assert P > 100_000 > max(EMBEDDING, MLP)
    assert found["weights"] == 2 * (P // 2) + 2 * P
    assert (found["gradients"], found["optimizer"]) == (4 * P // 2, 12 * P // 2)


def test_tensor_parallel_ranks_share_matrices_and_the_vocabulary_but_not_norms() -> None:
    found = parts("engine.zero_stage=0", "parallel.tensor_parallel=2", world=2, layout=Layout(2, 1, 1))
    assert found["weights"] == 4 * ((P - NORMS) // 2 + NORMS)


def test_earlier_passes_leave_their_gradients() -> None:
    """With a long sequence the peak is at the loss; in the second pass the first one's gradients are there."""
    long = ["engine.zero_stage=0", "data.sequence_length=4096"]
    once = rank_memory(configured(*long), Layout(1, 1, 1), VOCAB, "cpu")
    twice = rank_memory(configured(*long, "training.global_batch_size=2"), Layout(1, 1, 1), VOCAB, "cpu")
    assert [part.bytes for part in once if part.name == "gradients"] == [0]
    assert [part.bytes for part in twice if part.name == "gradients"] == [4 * P]


def test_tiles_bound_the_logits() -> None:
    """Three fp32 arrays of tokens x 1,024 entries."""
    whole = parts("engine.zero_stage=0", "data.sequence_length=4096")
    assert whole["logits"] == 4096 * 1024 * 12
    tiled = parts("engine.zero_stage=0", "data.sequence_length=4096", "training.logits_tile=128", "training.recompute=full")
    assert tiled["logits"] in (0, 128 * 1024 * 12)
    assert sum(tiled.values()) < sum(whole.values())


@pytest.mark.parametrize(("precision", "vocab", "each"), [("fp32", 1024, 4), ("fp32", 1000, 8), ("bf16", 1024, 6), ("bf16", 1000, 8)])
def test_logits_of_a_split_vocabulary_become_their_losses_in_place(precision: str, vocab: int, each: int) -> None:
    """Half of 1,024 entries: the logits, where some are padding a masked copy, and in bf16 a copy in fp32."""
    config = configured("engine.zero_stage=0", "data.sequence_length=4096", f"training.precision={precision}",
                        "parallel.tensor_parallel=2", world=2)
    found = {part.name: part.bytes for part in rank_memory(config, Layout(2, 1, 1), vocab, "cpu")}
    assert found["logits"] == 4096 * 512 * each


def test_context_parallel_ranks_keep_the_keys_and_values_of_those_before() -> None:
    """The last of 4 ranks has 3 x 1,024 slots of 2 heads x 16 channels, keys and values, fp32, in one layer."""
    overrides = ["engine.zero_stage=0", "data.sequence_length=4096", "parallel.context_parallel=4"]
    config = load_config([], [*SHAPE, "training.global_batch_size=1", *overrides], world_size=4)
    found = {part.name: part.bytes for part in rank_memory(config, Layout(1, 4, 1), VOCAB, "cpu")}
    assert found["kv"] == 3 * 1024 * 2 * (2 * 16) * 4


def test_each_level_that_attends_has_keys_and_values_of_the_ranks_before() -> None:
    """mka: of both levels; mla: 4 heads of 24 + 8 channels of keys and 20 of values."""
    shared = ["engine.zero_stage=0", "data.sequence_length=4096", "parallel.context_parallel=4", "training.global_batch_size=1",
              "attention.mla.qk_nope_head_dim=24", "attention.mla.qk_rope_head_dim=8", "attention.mla.v_head_dim=20"]
    for variant, slot in (("mka", 2 * 2 * (2 * 16)), ("mla", 4 * (24 + 8 + 20))):
        config = load_config([], [*SHAPE, *shared, f"attention.variant={variant}"], world_size=4)
        found = {part.name: part.bytes for part in rank_memory(config, Layout(1, 4, 1), VOCAB, "cpu")}
        assert found["kv"] == 3 * 1024 * slot * 4, variant


def test_gradients_of_shared_rows_are_reduced_in_fp32() -> None:
    """Stage 0 in bf16: beside the flat copy of 2 bytes an element one of 4, more than the fp32 gradients of the update."""
    config = load_config([], [*SHAPE, "engine.zero_stage=0", "training.precision=bf16", "data.sequence_length=16",
                              "parallel.context_parallel=2", "training.global_batch_size=1"], world_size=2)
    alone, shared = (rank_memory(config, layout, VOCAB, "cpu")[-1].formula for layout in (Layout(1, 1, 2), Layout(1, 2, 1)))
    assert alone.startswith(f"at the update; {P:,} fp32 gradients;")
    assert shared.startswith("at the reduction of gradients;") and "elements x 6 B to reduce" in shared


def test_an_offloaded_optimizer_is_in_the_nodes_memory() -> None:
    """Stage 2, fp32, 2 ranks: moments, master weights and gradients 16, the weights handed back 4; the embedding's gradient."""
    offloaded = ["engine.zero_stage=2", "engine.offload_optimizer=cpu"]
    config = configured(*offloaded, world=2)
    dram, ssd = node_memory(config, Layout(1, 1, 2), VOCAB, 2, "cpu")
    assert [(part.name, part.bytes) for part in dram] == [("offloaded optimizer", 2 * (20 * P // 2 + 4 * EMBEDDING))]
    assert ssd == ()
    assert parts(*offloaded, world=2, layout=Layout(1, 1, 2))["optimizer"] == 0


def test_pinned_buffers_take_a_power_of_two() -> None:
    """The same for a GPU: AdamW's two moments are plain; weights, gradients and copies of both groups are pinned."""
    config = configured("engine.zero_stage=2", "engine.offload_optimizer=cpu", world=2)
    dram, _ = node_memory(config, Layout(1, 1, 2), VOCAB, 1, "cuda")
    undecayed = (NORMS + 128) // 2  # norms and biases
    decayed = P // 2 - undecayed
    assert (4 * decayed, 4 * undecayed, 4 * EMBEDDING) == (217088, 640, 262144)
    assert [part.bytes for part in dram] == [8 * P // 2 + 3 * (262144 + 1024) + 262144]


def test_an_asynchronous_save_holds_a_copy_of_the_states() -> None:
    """Stage 1, bf16, 4 ranks on the node: 12 bytes of states each, and the weights once per tensor-parallel rank."""
    config = configured("engine.zero_stage=1", "training.precision=bf16", "training.async_save=true", world=4)
    dram, _ = node_memory(config, Layout(1, 1, 4), VOCAB, 4, "cuda")
    assert [(part.name, part.bytes) for part in dram] == [("asynchronous save", 4 * 12 * -(-P // 4) + 2 * P)]


PAGES = 32 * 2
"""256 slots in segments of 64: 32 chunks of 8 slots, 2 KV heads, 1 layer."""
RECORD = 128 + 8 + 2 * (8 + 1) * 16 * 4 + 8
"""128 B before and 8 behind a 64-bit code, 8 slots and a mean of keys and values of 16 channels."""


def pages_of_segments(*overrides: str) -> tuple[list[int], list[int]]:
    segments = ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", "memory_hierarchy.l3.enabled=true",
                "data.pad_documents_to_chunks=true", "data.sequence_length=256", "training.segment_length=64"]  # fmt: skip
    dram, ssd = node_memory(configured(*segments, *overrides), Layout(1, 1, 1), VOCAB, 1, "cuda")
    return [part.bytes for part in dram if part.name == "L3 pages"], [part.bytes for part in ssd]


def test_pages_of_segments_in_dram() -> None:
    assert pages_of_segments() == ([PAGES * -(-RECORD // 64) * 64], [])


def test_pages_on_an_ssd_are_those_that_no_budget_keeps_away() -> None:
    """Half of the DRAM pool is written behind; a limit on the files, or forgetting the oldest, takes less."""
    pool, pages = int(0.0001 * (1 << 30)), PAGES * -(-RECORD // 4096) * 4096
    assert pages_of_segments(*SPILLED) == ([pool], [pages - pool // 2])
    assert pages_of_segments(*SPILLED, "memory_hierarchy.l3.dram_pool_gib=1") == ([pages], [0])
    assert pages_of_segments(*SPILLED, "memory_hierarchy.l3.ssd_pool_gib=0.00005") == ([pool], [int(0.00005 * (1 << 30))])
    assert pages_of_segments(*SPILLED, "memory_hierarchy.l3.when_full=evict") == ([pool], [0])


def test_constants_are_those_of_the_engine_and_of_deepspeed() -> None:
    defaults = DeepSpeedZeroConfig(stage=3)
    assert (sharded_states.PREFETCHED, sharded_states.LIVE) == (defaults.prefetch_bucket_size, defaults.max_live_parameters)
    assert sharded_states.PERSISTENT == defaults.param_persistence_threshold
    assert states.FLATTENED == MEMORY_OPT_ALLREDUCE_SIZE
    ours = deepspeed_config.build(configured("engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/tmp"), 1, True)
    assert ours["zero_optimization"]["reduce_bucket_size"] == states.BUCKET
    assert ours["zero_optimization"]["sub_group_size"] == host.SUB_GROUP
    offload = DeepSpeedZeroOffloadOptimizerConfig(), DeepSpeedZeroOffloadParamConfig()
    assert tuple(each.buffer_count for each in offload) == (host.OPTIMIZER_BUFFERS, host.WEIGHT_BUFFERS)


def test_a_partition_touches_whole_parameters() -> None:
    """Of 10 + 4 + 6 elements two ranks have 10 each; of 9 + 5 + 6 the second begins within the 5."""
    def sized(*sizes: int) -> list[Parameter]:
        return [Parameter(str(size), size, True, True) for size in sizes]

    assert touched(sized(10, 4, 6), 2) == 10
    assert touched(sized(9, 5, 6), 2) == 14
    assert touched(sized(20), 4) == 20
    # as many shards as elements, and more than can be gone through one by one
    assert touched(sized(10, 4, 6), 20) == touched(sized(10, 4, 6), 1 << 40) == 10


def test_a_bucket_is_reduced_before_a_gradient_that_would_not_fit() -> None:
    million = 1_000_000
    sizes = [30 * million, 15 * million, 10 * million, 45 * million, 60 * million]
    assert filled([Parameter(str(size), size, True, True) for size in sizes[:4]]) == 45 * million
    assert filled([Parameter(str(size), size, True, True) for size in sizes]) == 60 * million
