"""FLOPs per rank, links and seconds of a step, worked out by hand for round numbers."""

from __future__ import annotations

import pytest

from mka_megatron.config.load import load_config
from mka_megatron.planning.cluster import CPU, Cluster, Gpu
from mka_megatron.planning.compute import link, times, work
from mka_megatron.planning.steps import Layout, passes, tokens_per_step
from mka_megatron.planning.traffic import Flow

SHAPE = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4",
    "model.num_kv_heads=4", "model.head_dim=16", "model.tie_embeddings=false", "model.qkv_bias=false", "attention.variant=gqa",
    "data.sequence_length=8", "training.micro_batch_size=2", "training.global_batch_size=8", "training.precision=bf16",
]
# 1e12 FLOP/s, memory of 1e9 B/s, links of 10e9 and 1e9 B/s
ROUND = Gpu("round", "ROUND", 1.0, 10.0, 1.0, 10.0, 1.0)
# a layer: q, k, v, o 64 x 64 each, gate, up and down 64 x 128 each; the output layer
LAYER, OUTPUT = 4 * 64 * 64 + 3 * 64 * 128, 64 * 100


def test_flops_of_the_heaviest_rank() -> None:
    """8 rows of 8 tokens, 36 causal pairs each, of which the second half of a row has 26."""
    config = load_config([], SHAPE)
    done = work(config, Layout(1, 2, 2), 100)
    per_pair = 2 * 2 * 2 * 64  # layers, products, multiply-add, channels
    tokens = 3 * 2 * (2 * LAYER + OUTPUT) * 64
    assert done.tokens == 64 and done.pairs == 8 * 36
    assert done.model_flops == tokens + 3 * per_pair * 8 * 36
    assert done.recomputed_flops == 0
    assert done.rank_flops == (tokens + 3 * per_pair * 8 * 26 * 2) / 4


@pytest.mark.parametrize(
    ("overrides", "again"),
    [
        (["training.recompute=selective"], 2 * 2 * 2 * 64 * 8 * 36),
        (["training.recompute=full"], 64 * 2 * 2 * LAYER + 2 * 2 * 2 * 64 * 8 * 36),
        (["training.mlp_tile=4", "training.logits_tile=4"], 64 * 2 * (2 * 3 * 64 * 128 + OUTPUT)),
        (["training.mlp_tile=16", "training.logits_tile=16"], 0),  # a rank's 16 tokens are one tile
    ],
)
def test_recomputation_is_no_work_of_the_model(overrides: list[str], again: int) -> None:
    plain, done = (work(load_config([], [*SHAPE, *more]), Layout(2, 1, 2), 100) for more in ([], overrides))
    assert done.recomputed_flops == again
    assert done.model_flops == plain.model_flops
    assert done.rank_flops == (done.model_flops + again) / 4


def test_a_step_of_some_segments() -> None:
    config = load_config("configs/run/tiny-256k.yaml", ["training.segments_per_step=8"])
    assert passes(config, Layout(1, 1, 1)) == 8
    assert tokens_per_step(config) == 8 * 1024
    whole = load_config("configs/run/tiny-256k.yaml")
    one, all_of_it = (work(each, Layout(1, 1, 1), 1024) for each in (config, whole))
    assert all_of_it.tokens == 262_144 and one.tokens * 32 == all_of_it.tokens
    assert one.pairs == pytest.approx(all_of_it.pairs / 32, abs=1)


def test_links() -> None:
    """4 nodes of 8: tensor groups are neighbours, then context, then data."""
    cluster = Cluster(ROUND, 8, 4)
    layout = Layout(2, 2, 8)
    found = {group: link(cluster, layout, group) for group in ("tensor", "context", "data")}  # type: ignore[arg-type]
    assert [(at.ranks, at.per_node, at.name) for at in found.values()] == [
        (2, 2, "inside a node"), (2, 2, "inside a node"), (16, 4, "between nodes")]
    assert [at.gbs for at in found.values()] == [10, 10, 4]  # a ring of four ranks a node has four network cards
    wide = link(cluster, Layout(4, 4, 2), "context")
    assert (wide.ranks, wide.per_node, wide.name, wide.gbs) == (4, 2, "between nodes", 1)
    # 2 x 3 ranks do not divide a node of 8: the second group goes on in the next node
    ragged = link(Cluster(ROUND, 8, 3), Layout(2, 3, 4), "context")
    assert (ragged.ranks, ragged.per_node, ragged.name, ragged.gbs) == (3, 1, "between nodes", 1)
    assert link(Cluster(ROUND, 6, 1), Layout(4, 1, 1), "tensor").name == "inside a node"


def test_seconds() -> None:
    config = load_config([], [*SHAPE, "engine.zero_stage=1"])
    cluster, layout = Cluster(ROUND, 2, 2), Layout(1, 1, 4)
    done = work(config, layout, 100)
    compute = done.rank_flops / 0.5e12
    backward = compute * 2 / 3
    # between nodes 2 cards of 1e9 B/s, at 80%
    sent = (Flow("data", "reduced", 16_000, "", "backward"), Flow("data", "gathered", 1_600_000_000, ""))
    took = times(config, cluster, layout, 100, done, sent, utilisation=0.5)
    assert took.compute == pytest.approx(compute)
    assert took.whole == pytest.approx((1e-5, 1.0))
    assert took.exposed == pytest.approx((1e-5 - min(backward, 1e-5), 1.0))
    # embedding and output 128 rows of 64 (a vocabulary of 100 is padded), two norms a layer and one: 28 B each over 4 ranks
    elements = 2 * 128 * 64 + 2 * (LAYER + 2 * 64) + 64
    assert took.update == pytest.approx(elements / 4 * 28 / 1e9)
    assert took.step == pytest.approx(took.compute + sum(took.exposed) + took.update)


def test_a_long_reduction_is_hidden_as_far_as_the_backward_pass_lasts() -> None:
    config = load_config([], [*SHAPE, "engine.zero_stage=2", "training.global_batch_size=32"])
    layout = Layout(1, 1, 4)
    done = work(config, layout, 100)
    sent = (Flow("data", "reduced", 1_600_000_000, "", "passes"),)
    took = times(config, Cluster(ROUND, 2, 2), layout, 100, done, sent, utilisation=0.5)
    assert took.exposed == pytest.approx((1.0 - took.compute,))
    on_cpu = times(config, Cluster(CPU, 2, 2), layout, 100, done, sent, utilisation=0.5)
    assert on_cpu.exposed == on_cpu.whole
