"""A checkpoint goes on in other layouts: one rank to two and back, tensor, context and data parallel, every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import torchrun
from tests.helpers.numerics import assert_same

WORKER = Path(__file__).with_name("reshape_worker.py")
STAGES = [f"zero{stage}" for stage in range(4)]
LAYOUTS = {"dp2": "data", "tp2": "tensor", "cp2": "context"}
HALVES = ("zero0 bf16", "zero1 bf16", "zero2 fp16")
TURNS = ("tp2 zero3 to dp2 zero1 cpu", "cp2 zero0 to tp2 zero3", "tp2 block zero2 to dp2 zero2")
TUNED = ("zero2 to round robin", "zero1 from round robin", "zero3 to other sub-groups")
TERMS = 16
"""Roundings between two orders of the fp32 sums, over four steps of training (seen: one)."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, async_io: bool) -> dict:
    directory = tmp_path_factory.mktemp("reshape")
    for phase, ranks in (("first", 1), ("second", 2), ("third", 1)):
        torchrun(WORKER, phase, directory, "nvme" if async_io else "no-nvme", ranks=ranks, timeout=900)
    return json.loads((directory / "results.json").read_text())


def go_on(found: list[dict], straight: list[dict], dtype: torch.dtype = torch.float32) -> None:
    """Every rank has the losses of the uninterrupted run, which change from step to step by far more."""
    expected = torch.tensor(straight[0]["losses"], dtype=torch.float64)
    assert len(set(straight[0]["losses"])) == len(expected)
    for rank in found:
        assert_same(torch.tensor(rank["losses"], dtype=dtype), expected, terms=TERMS if dtype == torch.float32 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_becomes_two(results: dict, stage: str, layout: str) -> None:
    found = results[f"second {stage} {layout}"]
    go_on(found, results[f"first {stage}"])
    for index, rank in enumerate(found):
        assert (rank["step"], rank["state"]) == (3, {"consumed_samples": 24})
        said = "was written with parallel.{0}_parallel 1; continuing with parallel.{0}_parallel 2.".format(LAYOUTS[layout])
        assert [said in line for line in rank["said"]] == ([True] if index == 0 else [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_and_two_become_one_again_with_every_bit(results: dict, stage: str, layout: str) -> None:
    """Masters, moments, update counts and the model's weights, against the first checkpoint loaded by DeepSpeed."""
    [back] = results[f"third {stage} {layout}"]
    assert back["unlike"] == []
    assert back["compared"] > 60 and back["moments"] > 0.9 * 2 / 3 * back["compared"]
    go_on([back], results[f"first {stage}"])


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_keeps_masters_moments_and_loss_scale(results: dict, name: str) -> None:
    [back], [first] = results[f"third {name} tp2"], results[f"first {name}"]
    assert back["unlike"] == []
    for rank in results[f"second {name} tp2"]:
        assert rank["scale"] == first["scale"]
    go_on(results[f"second {name} tp2"], [first], torch.float16 if "fp16" in name else torch.bfloat16)


def test_the_loss_scale_had_moved(results: dict) -> None:
    assert results["first zero2 fp16"][0]["scale"] not in (1.0, 2.0**18)


@pytest.mark.parametrize("name", TURNS)
def test_layout_stage_and_offload_change_at_once(results: dict, name: str) -> None:
    go_on(results[f"turned {name}"], results[f"straight {name}"])


@pytest.mark.parametrize("name", TUNED)
def test_a_deepspeed_json_may_order_and_group_the_states_anew(results: dict, name: str) -> None:
    """DeepSpeed takes the files for its own order (round robin: other losses, without a word) or has a traceback."""
    go_on(results[f"turned {name}"], results[f"straight {name}"])


def test_states_go_to_nvme_and_back(results: dict) -> None:
    if "second nvme" not in results:
        pytest.skip("async_io cannot be built here: libaio's header is missing")
    go_on(results["second nvme"], results["first nvme"])
    assert results["third nvme"][0]["unlike"] == []


def test_a_variant_without_a_table_goes_on_at_its_tensor_parallel_size_only(results: dict) -> None:
    go_on(results["second mla"], results["first mla"])
    for said in results["refused mla"]:
        assert "written with parallel.tensor_parallel 1, but this run has 2: the parameters of attention.variant mla" in said


def test_segments_go_on_between_samples_only(results: dict) -> None:
    go_on(results["second segments"], results["first segments"])
    for said in results["refused segments"]:
        assert "written with parallel.data_parallel 1 in the middle of a sample" in said and "but this run has 2" in said
