"""Ranks that would wait for each other for ever, or meet with different collectives, are named."""

from __future__ import annotations

import dataclasses

from mka_megatron.dry_run.order import order_problems
from mka_megatron.dry_run.recorder import Collective

WORLD, LEFT, RIGHT = (0, 1, 2, 3), (0, 1), (0, 2)


def call(ranks: tuple[int, ...], given: int = 8, op: str = "all-reduce") -> Collective:
    return Collective(op, ranks, "float32", given, given)


def exchange(given: tuple[int, int], received: tuple[int, int]) -> Collective:
    return Collective("all-to-all", LEFT, "float32", sum(given), sum(received), (given, received))


def test_steps_that_go_through() -> None:
    steps = {
        0: [call(LEFT), call(RIGHT), call(WORLD), call(LEFT)],
        1: [call(LEFT), call(WORLD), call(LEFT)],
        2: [call(RIGHT), call(WORLD)],
    }  # rank 3 was not run
    assert order_problems(steps) == []
    assert order_problems({0: [exchange((0, 12), (0, 4))], 1: [exchange((4, 0), (12, 0))]}) == []


def test_a_circle_of_ranks_that_wait_is_found() -> None:
    between = (1, 2)
    steps = {0: [call(LEFT), call(RIGHT)], 1: [call(between), call(LEFT)], 2: [call(RIGHT), call(between)]}
    (found,) = order_problems(steps)
    assert "waits for ever" in found
    ahead = {0: [call(LEFT), call(WORLD)], 1: [call(WORLD), call(LEFT)]}
    (found,) = order_problems(ahead)
    assert "rank 0 waits for ever at its collective 1 of 2" in found


def test_one_that_a_member_leaves_out_is_found() -> None:
    (found,) = order_problems({0: [call(LEFT), call(LEFT)], 1: [call(LEFT)]})
    assert "rank 0 waits for ever at its collective 2 of 2" in found and "rank 1 does not come" in found


def test_members_that_meet_with_different_collectives_are_found() -> None:
    for other in (call(LEFT, 16), call(LEFT, op="broadcast"), dataclasses.replace(call(LEFT), dtype="bfloat16")):
        (found,) = order_problems({0: [call(LEFT)], 1: [other]})
        assert "meet with different collectives" in found
    (found,) = order_problems({0: [exchange((0, 12), (0, 4))], 1: [exchange((8, 0), (12, 0))]})
    assert "meet with different collectives" in found


def test_bytes_that_a_rank_sends() -> None:
    assert call(WORLD, 80).sent(2) == 2 * 80 * 3 // 4
    assert Collective("all-gather", WORLD, "float32", 80, 320).sent(0) == 240
    assert Collective("reduce-scatter", WORLD, "float32", 320, 80).sent(0) == 240
    assert exchange((5, 7), (5, 9)).sent(0) == 7 and exchange((5, 7), (5, 9)).sent(1) == 5
    assert call((0,), 80).sent(0) == 0
