"""Slices that are missing, doubled or split along the wrong dimension are named; so are groups and partitions that do
not fit together."""

from __future__ import annotations

import dataclasses

import pytest

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.dry_run.layout import (
    gaps,
    group_problems,
    kinds_of,
    partition_problems,
    table_problems,
    weight_problems,
)
from mka_megatron.dry_run.rank import Held, RankRun
from mka_megatron.dry_run.world import Created
from mka_megatron.model.hf_table import Entry, Run, hf_table
from mka_megatron.training.partitions import Partition


def held(name: str, shape: tuple[int, ...], dim: int | None) -> Held:
    return Held(name, shape, "bfloat16", True, dim)


WHOLE = [held("rows", (8, 6), 0), held("columns", (8, 6), 1), held("norm", (6,), None)]
SHARD = [held("rows", (4, 6), 0), held("columns", (8, 3), 1), held("norm", (6,), None)]


def test_parts_that_tile_the_whole_are_right() -> None:
    assert weight_problems(WHOLE, {0: SHARD, 1: SHARD}, 2) == []
    assert weight_problems(WHOLE, {0: WHOLE}, 1) == []


@pytest.mark.parametrize(("number", "wrong", "told"), [
    (0, held("rows", (4, 6), 1), "no tiling"),
    (0, held("rows", (3, 6), 0), "no tiling"),
    (1, held("columns", (4, 6), 0), ""),  # tiles it too: the mapping table knows better
    (0, held("rows", (8, 6), 0), "no tiling"),
    (0, held("rows", (4, 6), None), "unsplit"),
    (2, held("norm", (3,), 0), ""),
    (2, held("norm", (3,), None), "unsplit"),
])  # fmt: skip
def test_a_wrong_shape_or_split_dimension_is_named(number: int, wrong: Held, told: str) -> None:
    shard = [*SHARD[:number], wrong, *SHARD[number + 1 :]]
    found = weight_problems(WHOLE, {0: shard, 1: shard}, 2)
    if told:
        assert len(found) == 1 and found[0].startswith(f"{wrong.name}:") and told in found[0]
    one = weight_problems(WHOLE, {0: SHARD, 1: shard}, 2)
    assert len(one) == 1 and one[0].startswith(f"{wrong.name}:")


def test_a_missing_rank_or_parameter_is_named() -> None:
    assert "tensor-parallel rank 1" in weight_problems(WHOLE, {0: SHARD}, 2)[0]
    assert weight_problems(WHOLE, {0: SHARD, 1: SHARD[:2]}, 2) == ["norm: tensor-parallel rank 1 has no part of it."]
    more = [*SHARD, held("extra", (1,), None)]
    assert "extra: tensor-parallel rank 1" in weight_problems(WHOLE, {0: SHARD, 1: more}, 2)[0]


def config(tensor: int) -> Config:
    return load_config([], [f"parallel.tensor_parallel={tensor}", "model.vocab_size=190"], world_size=tensor)


def shards(table: dict[str, Entry], ranks: int) -> dict[int, list[Held]]:
    found = [held(name, entry.shard(ranks), entry.dim if entry.split and ranks > 1 else None) for name, entry in table.items()]
    return dict.fromkeys(range(ranks), found)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
UP = "decoder.layers.0.mlp.linear_fc1.weight"


def test_the_shipped_table_owns_every_slice_once() -> None:
    for ranks in (1, 2):
        table = hf_table(config(ranks), 190)
        assert table_problems(table, hf_table(config(1), 190), shards(table, ranks), ranks) == []


@pytest.mark.parametrize(("name", "runs", "told"), [
    (QKV, lambda runs: runs[:-1], "v_proj.weight: owned up to 64, it has 128"),
    (QKV, lambda runs: (runs[0], *runs), "q_proj.weight: [0, 128) is owned more than once"),
    (UP, lambda runs: (Run(runs[0].source, 1, runs[0].length), *runs[1:]), "gate_proj.weight: [0, 1) is owned by nobody"),
])  # fmt: skip
def test_a_slice_that_the_table_drops_or_doubles_is_named(name: str, runs: object, told: str) -> None:
    table = hf_table(config(2), 190)
    broken = table | {name: dataclasses.replace(table[name], runs=runs(table[name].runs))}
    found = table_problems(broken, hf_table(config(1), 190), shards(table, 2), 2)
    assert any(told in each for each in found), found


def test_a_table_that_contradicts_the_model_is_named() -> None:
    table = hf_table(config(2), 190)
    built = shards(table, 2)
    turned = table | {QKV: dataclasses.replace(table[QKV], dim=1)}
    assert any(QKV in each and "mapping table says" in each for each in table_problems(turned, hf_table(config(1), 190), built, 2))
    without = {name: entry for name, entry in table.items() if name != QKV}
    assert any("does not have it" in each for each in table_problems(without, hf_table(config(1), 190), built, 2))


def test_gaps() -> None:
    assert gaps("x", [(2, 4), (0, 2)], 4) == []
    assert gaps("x", [(0, 2)], 4) == ["x: owned up to 2, it has 4."] and gaps("x", [(0, 2)], 4, padded=True) == []
    assert gaps("x", [(0, 3), (2, 4)], 4, padded=True) == ["x: [2, 3) is owned more than once."]
    assert gaps("x", [(0, 5)], 4) == ["x: owned up to 5, it has 4."]


CREATED = tuple(
    Created(kind, ranks)
    for kind, groups in {
        "DATA_PARALLEL_GROUP_WITH_CP": [(0, 2, 4, 6), (1, 3, 5, 7)],
        "DATA_PARALLEL_GROUP": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "CONTEXT_PARALLEL_GROUP": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "TENSOR_MODEL_PARALLEL_GROUP": [(0, 1), (2, 3), (4, 5), (6, 7)],
    }.items()
    for ranks in groups
)
SIZES = {"tensor": 2, "context": 2, "data": 2, "replicas": 4}


def rank_run(rank: int = 0, created: tuple[Created, ...] = CREATED, cut: Partition | None = None) -> RankRun:
    groups = {kind: next(g for g in of if rank in g) for kind, of in kinds_of(CREATED).items()}
    place = (rank % 2, rank // 2 % 2, rank // 4)
    return RankRun(rank, place, groups, created, (held("a", (3, 2), None), held("b", (1,), None)),
                   None if cut is None else (cut,), (), (), 1, 0.0)  # fmt: skip


def test_groups_that_tile_the_world_are_right() -> None:
    assert group_problems([rank_run(0), rank_run(5)], 8, SIZES, 2) == []


@pytest.mark.parametrize(("old", "new", "told"), [
    ((2, 3), (2, 1), "rank 1 is in 2 of them"),
    ((1, 3), (3, 1), "ascending order"),
    ((4, 5), (4, 5, 5), "rank 5 is in 2"),
])  # fmt: skip
def test_groups_that_do_not_tile_the_world_are_named(old: tuple[int, ...], new: tuple[int, ...], told: str) -> None:
    created = tuple(dataclasses.replace(each, ranks=new) if each.ranks == old else each for each in CREATED)
    assert any(told in each for each in group_problems([rank_run(6, created)], 8, SIZES, 2))


def test_tensor_groups_over_two_nodes_and_other_orders_are_named() -> None:
    assert any("one node of 3" in each for each in group_problems([rank_run()], 8, SIZES, 3))
    turned = (*CREATED[1:], CREATED[0])
    assert any("in another order" in each for each in group_problems([rank_run(0), rank_run(1, turned)], 8, SIZES, 2))
    elsewhere = dataclasses.replace(rank_run(3), place=(1, 0, 1))
    assert any("takes itself for (1, 0, 1)" in each for each in group_problems([elsewhere], 8, SIZES, 2))


CUT = Partition(8, (("a", 0, 6), ("b", 6, 7)), (2, 2, 2, 2), (0, 2, 4, 6), 2)


def test_partitions_that_tile_the_buffer_are_right() -> None:
    assert partition_problems([rank_run(0, cut=CUT), rank_run(4, cut=CUT)]) == []


@pytest.mark.parametrize(("wrong", "told"), [
    ({"pieces": (2, 2, 2, 1)}, "do not make up its 8"),
    ({"held": 1}, "the optimizer holds 1"),
    ({"ranks": (0, 1, 2, 3)}, "not over the replicas"),
    ({"spans": (("a", 0, 6),)}, "b: rank 0 has it in the model or in ZeRO's buffers"),
    ({"spans": (("a", 0, 6), ("b", 5, 6))}, "[5, 6) is owned more than once"),
    ({"spans": (("a", 0, 5), ("b", 6, 7))}, "a is not whole"),
])  # fmt: skip
def test_partitions_that_do_not_are_named(wrong: dict, told: str) -> None:
    found = partition_problems([rank_run(0, cut=dataclasses.replace(CUT, **wrong))])
    assert any(told in each for each in found), found


def test_ranks_that_cut_the_same_weights_otherwise_are_named() -> None:
    other = dataclasses.replace(CUT, spans=(("b", 0, 1), ("a", 1, 7)))
    assert any("otherwise than rank 0" in each for each in partition_problems([rank_run(0, cut=CUT), rank_run(2, cut=other)]))
