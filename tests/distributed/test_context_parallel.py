"""Rows shared by 2 and 4 ranks, with tensor parallelism, replicas and every ZeRO stage, train as on one rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from mka_megatron.config.load import load_config
from mka_megatron.planning.context_traffic import layer_traffic
from mka_megatron.planning.steps import Layout
from tests.distributed.context_parallel_worker import KINDS, LAYOUTS, ROWS, SEQUENCE, SHAPE
from tests.helpers.launch import torchrun
from tests.helpers.numerics import assert_same

WORKER = Path(__file__).with_name("context_parallel_worker.py")
# As in test_engine.py: the order of fp32 summation differs, and Adam amplifies it where a second moment is small.
FIRST, LOSS, NORM = 5e-7, 1e-6, 1e-5
SELECT = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2"]
L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=8"]  # every chunk of a row
BLOCK = ["attention.variant=blockmka", "memory_hierarchy.l1.window=16"]
CASES = {
    "gqa": ["attention.variant=gqa", "model.qk_norm=true"],
    "mqa": ["attention.variant=mqa"],
    "mla": ["attention.variant=mla"],
    "mka output": ["attention.variant=mka", *L3],
    "fastmka": ["memory_hierarchy.l2.decay=head"],
    "fastmka, L3": L3,
    "fastmka, selective recomputation": ["training.recompute=selective"],
    "fastmka, full recomputation": ["training.recompute=full"],
    "blockmka, local": BLOCK,
    "blockmka": [*BLOCK, *L3],
    "blockmka, window over ranks": [*BLOCK, *L3, "memory_hierarchy.l1.window=40"],
    "blockmka, selective recomputation": [*BLOCK, *L3, "training.recompute=selective"],
    "fastmka, block": ["attention.core=block", "memory_hierarchy.l1.window=16", *L3],
}
# Keys that differ by a rounding may flip a bit of a code and so what is recalled: their first step counts only.
SELECTING = {
    "fastmka, L3 selects": SELECT,
    "blockmka selects": [*BLOCK, *SELECT],
    "fastmka, block selects": ["attention.core=block", "memory_hierarchy.l1.window=16", *SELECT],
}
ALL = CASES | SELECTING
SOME = {name: CASES[name] for name in ("gqa", "fastmka", "blockmka")}
ZERO = {f"blockmka, zero{stage}": [*CASES["blockmka"], f"engine.zero_stage={stage}"] for stage in (0, 2, 3)}
PLANS = {
    1: {"one": ALL},
    2: {"cp2": SOME | SELECTING | ZERO},
    4: {"cp4": ALL, "cp2-dp2": SOME | ZERO, "tp2-cp2": {"gqa": CASES["gqa"]}, "tp2-cp2-sp": SOME | ZERO},
}
RUNS = [(layout, case) for ranks in (2, 4) for layout, cases in PLANS[ranks].items() for case in cases]
GRADIENTS = [(layout, case) for layout, case in RUNS if layout in ("cp2", "cp4") and "zero" not in case]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, dict]], dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("context-parallel")
    runs: dict[str, dict[str, dict]] = {}
    gradients: dict[str, Tensor] = {}
    for ranks, plan in PLANS.items():
        path = directory / f"plan{ranks}.json"
        path.write_text(json.dumps(plan))
        torchrun(WORKER, directory / f"out{ranks}", path, ranks=ranks, timeout=600)
        runs |= json.loads((directory / f"out{ranks}.json").read_text())
        gradients |= load_file(directory / f"out{ranks}.safetensors")
    return runs, gradients


def error(values: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize(("layout", "case"), RUNS, ids=[" ".join(run) for run in RUNS])
def test_training_follows_one_rank(outputs, layout: str, case: str) -> None:
    runs, _ = outputs
    run, one = runs[layout][case], runs["one"][case.split(", zero")[0]]
    assert run["ranks_agree"]
    assert not any(run["skipped"])
    assert (run["tokens"], run["labels"]) == (one["tokens"], one["labels"])
    assert error(run["loss"][:1], one["loss"][:1]) < FIRST
    assert error(run["grad_norm"][:1], one["grad_norm"][:1]) < FIRST
    if case in SELECTING:
        return
    assert error(run["loss"], one["loss"]) < LOSS
    assert error(run["grad_norm"], one["grad_norm"]) < NORM
    assert error([run["evaluation"]], [one["evaluation"]]) < LOSS
    assert error([run["parameter_norm"]], [one["parameter_norm"]]) < LOSS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "case"), GRADIENTS, ids=[" ".join(run) for run in GRADIENTS])
def test_gradients_are_those_of_one_rank(outputs, layout: str, case: str, kind: str) -> None:
    """Of every parameter; those of the gates cancel to little, so they are measured by the layer's largest."""
    _, gradients = outputs
    names = [key.split("/")[-1] for key in gradients if key.startswith(f"one/{case}/{kind}/")]
    assert names
    largest = {}
    for name in names:
        layer, grad = name.split(".self_attention")[0], gradients[f"one/{case}/{kind}/{name}"].flatten()
        largest[layer] = grad if layer not in largest or grad.abs().max() > largest[layer].abs().max() else largest[layer]
    for name in names:
        found, expected = (gradients[f"{which}/{case}/{kind}/{name}"] for which in (layout, "one"))
        assert_same(found, expected, terms=ROWS * SEQUENCE, scale=largest[name.split(".self_attention")[0]])


@pytest.mark.parametrize(("layout", "case"), GRADIENTS, ids=[" ".join(run) for run in GRADIENTS])
def test_the_plan_knows_what_every_rank_sends(outputs, layout: str, case: str) -> None:
    """The planner's bytes by purpose are those that the layers counted; where chunks are chosen, at most those."""
    runs, _ = outputs
    config = load_config([], [*SHAPE, *ALL[case], *LAYOUTS[layout], f"training.micro_batch_size={ROWS}"])
    ranks = config.parallel.context_parallel
    for rank in range(ranks):
        planned = layer_traffic(config, Layout(1, ranks, 1), rank)
        for sent in runs[layout][case]["sent"][rank]:
            counted = {purpose: size for purpose, size in sent.items() if size}
            if case in SELECTING:
                for purpose in ("pages", "pages gradient"):
                    assert counted.pop(purpose, 0) <= planned[purpose]
                counted |= {purpose: planned[purpose] for purpose in ("pages", "pages gradient") if planned[purpose]}
            assert counted == planned


@pytest.mark.parametrize("case", ALL)
def test_the_runs_learn(outputs, case: str) -> None:
    """A comparison of two runs that stand still would prove nothing."""
    curve = outputs[0]["one"][case]["loss"]
    assert sum(curve[-3:]) < 0.98 * sum(curve[:3])
