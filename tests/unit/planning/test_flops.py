"""FLOPs against numbers worked out by hand from published shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    L1Config,
    L2Config,
    L3Config,
    MemoryConfig,
    MLAConfig,
    ModelConfig,
    RoutingConfig,
)
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.planning.flops import ModelFlops, block_pairs, causal_pairs, model_flops

QWEN25_7B = ModelConfig(
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_kv_heads=4,
    head_dim=128,
    tie_embeddings=False,
)
# Per layer: q and o 3584x3584 each, k and v 3584x512 each, gate, up and down 3584x18944 each; the output layer once.
QWEN25_7B_WEIGHTS = 28 * (2 * 12_845_056 + 2 * 1_835_008 + 3 * 67_895_296) + 544_997_376


def qwen(variant: str, **sections) -> ModelFlops:
    attention = AttentionConfig(variant=variant)  # type: ignore[arg-type]
    return model_flops(Config(model=QWEN25_7B, attention=attention, **sections), vocab_size=152_064)


def test_qwen25_7b_is_six_n_plus_attention() -> None:
    assert QWEN25_7B_WEIGHTS == 7_070_285_824
    flops = qwen("gqa")
    assert flops.per_token == 2 * QWEN25_7B_WEIGHTS
    assert flops.per_pair == 28 * 2 * 2 * 3584  # QK^T and PV, 28 heads of 128, 28 layers
    # 4096 tokens: 6 * 7,070,285,824 + 3 * 401,408 * 4097 / 2
    assert flops.training_per_token(4096) == 42_421_714_944 + 2_466_852_864


def test_other_kv_head_counts_change_only_k_and_v() -> None:
    key_value = 28 * 2 * 3584 * 128
    assert qwen("mha").per_token == 2 * (QWEN25_7B_WEIGHTS + (28 - 4) * key_value)
    assert qwen("mqa").per_token == 2 * (QWEN25_7B_WEIGHTS - (4 - 1) * key_value)
    assert qwen("mha").per_pair == qwen("mqa").per_pair == qwen("gqa").per_pair


def test_fastmka_adds_its_gate_and_no_attention() -> None:
    gate = 28 * (3584 * 64 + 64 * 2)
    assert qwen("fastmka").per_token == 2 * (QWEN25_7B_WEIGHTS + gate)
    assert qwen("fastmka").per_pair == qwen("gqa").per_pair


def test_mka_attends_each_level() -> None:
    assert qwen("mka").per_token == qwen("fastmka").per_token
    assert qwen("mka").per_pair == 2 * qwen("gqa").per_pair
    only_tokens = MemoryConfig(l2=L2Config(enabled=False))
    assert qwen("mka", memory_hierarchy=only_tokens).per_pair == qwen("gqa").per_pair


def test_group_gates_read_their_own_heads() -> None:
    gate = 28 * 4 * (7 * 128 * 64 + 64 * 2)
    flops = qwen("fastmka", routing=RoutingConfig(scope="group"))
    assert flops.per_token == 2 * (QWEN25_7B_WEIGHTS + gate)


def test_group_gates_of_the_layer_input_share_their_first_matrix() -> None:
    gate = 28 * (3584 * 64 + 64 * 4 * 2)
    flops = qwen("fastmka", routing=RoutingConfig(scope="group", gate_input="x"))
    assert flops.per_token == 2 * (QWEN25_7B_WEIGHTS + gate)


def test_the_block_core_has_a_gate_of_its_own() -> None:
    memory = MemoryConfig(l1=L1Config(window=256), l3=L3Config(enabled=True))
    gate = 28 * 64 * (28 * 128 + 3)
    assert qwen("blockmka", memory_hierarchy=memory).per_token == 2 * (QWEN25_7B_WEIGHTS + gate)
    fused = replace(Config(model=QWEN25_7B, memory_hierarchy=memory), attention=AttentionConfig(core="block"))
    assert model_flops(fused, 152_064).per_token == 2 * (QWEN25_7B_WEIGHTS + gate + 28 * 64 * (28 * 128 + 2))


def test_latent_ranks() -> None:
    # DeepSeek-V2-Lite's attention: hidden 2048, 16 heads, kv rank 512, 128 + 64 query channels, 128 value channels.
    model = ModelConfig(
        num_layers=1, hidden_size=2048, ffn_hidden_size=1, num_attention_heads=16, num_kv_heads=16
    )
    mla = MLAConfig(
        q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    config = Config(model=model, attention=AttentionConfig(variant="mla", mla=mla))
    query, down, up, out = 2048 * 3072, 2048 * 576, 512 * (2048 + 2048), 2048 * 2048
    flops = model_flops(config, vocab_size=1)
    assert flops.per_token == 2 * (query + down + up + out + 3 * 2048 + 2048)
    assert flops.per_pair == 2 * (16 * 192 + 16 * 128)
    ranked = replace(config, attention=replace(config.attention, mla=replace(mla, q_lora_rank=1536)))
    assert model_flops(ranked, 1).per_token - flops.per_token == 2 * (2048 * 1536 + 1536 * 3072 - query)


def test_pairs_are_counted_within_documents() -> None:
    assert causal_pairs([(0, 0, 4)]) == 10
    assert causal_pairs([(0, 0, 3), (0, 3, 4), (1, 0, 4)]) == 6 + 1 + 10
    assert ModelFlops(per_token=5, per_pair=7, pairs=causal_pairs).training(tokens=4, pairs=10) == 3 * (20 + 70)


def test_the_block_core_visits_window_summaries_and_recalled_chunks() -> None:
    def memory(l2: bool, recalled: int) -> MemoryConfig:
        return MemoryConfig(
            l1=L1Config(chunk_size=4, window=8), l2=L2Config(enabled=l2),
            l3=L3Config(enabled=recalled > 0, recalled_chunks=recalled or 1),
        )  # fmt: skip

    spans = [(0, 0, 18), (1, 4, 7)]
    # token by token: own chunk up to itself, the chunk before, then what lies before those two
    window = sum(t % 4 + 1 + (4 if t >= 4 else 0) for t in range(18)) + 6
    before = [max(0, t // 4 - 1) for t in range(18)]
    assert block_pairs(spans, memory(False, 0)) == window
    assert block_pairs(spans, memory(True, 0)) == window + sum(before)
    assert block_pairs(spans, memory(True, 2)) == window + sum(n + 4 * min(2, n) for n in before)
    config = Config(attention=AttentionConfig("blockmka"), memory_hierarchy=memory(True, 2))
    assert model_flops(config, 1).pairs(spans) == block_pairs(spans, config.memory_hierarchy)


SMALL = ModelConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=4, num_kv_heads=2, head_dim=32
)
SMALL_MLA = MLAConfig(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=32)
CASES = {
    "mha": {"attention": AttentionConfig("mha")},
    "mqa": {"attention": AttentionConfig("mqa")},
    "gqa": {"attention": AttentionConfig("gqa")},
    "mla": {"attention": AttentionConfig("mla", mla=SMALL_MLA)},
    "mka": {"attention": AttentionConfig("mka")},
    "mka-score": {"attention": AttentionConfig("mka", mixture="score")},
    "fastmka": {"attention": AttentionConfig("fastmka")},
    "fastmka-x": {"routing": RoutingConfig(gate_input="x")},
    "fastmka-group": {"routing": RoutingConfig(scope="group")},
    "fastmka-x-group": {"routing": RoutingConfig(gate_input="x", scope="group")},
    "fastmka-fixed": {"routing": RoutingConfig(mode="fixed")},
    "fastmka-no-l2": {"memory_hierarchy": MemoryConfig(l2=L2Config(enabled=False))},
}


@pytest.mark.parametrize("case", CASES)
def test_per_token_cost_is_what_pytorch_counts_in_the_model(case, topology) -> None:
    """PyTorch counts the matrix multiplications that the built model runs; attention kernels are left out."""
    config = Config(model=SMALL, **CASES[case])
    batch, sequence, vocab_size = 2, 64, 192
    model = build_model(config, topology, vocab_size)
    tokens = torch.zeros(batch, sequence, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, Documents.unpacked(batch, sequence))
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in products)
    assert counted == batch * sequence * model_flops(config, vocab_size).per_token
