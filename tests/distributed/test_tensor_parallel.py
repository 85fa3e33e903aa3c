"""TP=2 and TP=2 with sequence parallelism follow TP=1, for every variant, over 50 fp32 steps of the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import torchrun

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2"]
BLOCK = [*L3, "memory_hierarchy.l1.window=16"]
CASES = {
    "mha": ["attention.variant=mha"],
    "mqa": ["attention.variant=mqa"],
    "gqa": ["attention.variant=gqa"],
    "mla": ["attention.variant=mla"],
    "mka-output": ["attention.variant=mka", "attention.mixture=output"],
    "mka-score": ["attention.variant=mka", "attention.mixture=score"],
    "fastmka": ["attention.variant=fastmka"],
    "fastmka-x": ["attention.variant=fastmka", "routing.gate_input=x"],
    "fastmka-group": ["attention.variant=fastmka", "routing.scope=group"],
    "fastmka-x-group": ["attention.variant=fastmka", "routing.scope=group", "routing.gate_input=x"],
    "fastmka-top1-head": ["attention.variant=fastmka", "routing.mode=top1", "memory_hierarchy.l2.decay=head"],
    "fastmka-mean": ["attention.variant=fastmka", "memory_hierarchy.l2.summary=mean"],
    "fastmka-l3": ["attention.variant=fastmka", *L3],
    "mka-score-l3": ["attention.variant=mka", "attention.mixture=score", *L3],
    "fastmka-block": ["attention.variant=fastmka", "attention.core=block", *BLOCK],
    "blockmka": ["attention.variant=blockmka", *BLOCK, "model.qk_norm=false", "model.qkv_bias=true"],
    "blockmka-x-group": ["attention.variant=blockmka", *BLOCK, "routing.scope=group", "routing.gate_input=x"],
    "gqa-bias-untied": ["attention.variant=gqa", "model.qk_norm=false", "model.qkv_bias=true",
                        "model.tie_embeddings=false"],
}
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["parallel.tensor_parallel=2"]),
    "tp2-sp": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]),
    "tp2-sp-full-recompute": (2, ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true",
                                  "training.recompute=full"]),
    "tp1-selective-recompute": (1, ["training.recompute=selective"]),
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    directory = tmp_path_factory.mktemp("tp")
    cases = directory / "cases.json"
    cases.write_text(json.dumps(CASES))
    found = {}
    for layout, (ranks, overrides) in LAYOUTS.items():
        out = directory / f"{layout}.json"
        torchrun(WORKER, cases, out, *overrides, ranks=ranks, timeout=600)
        found[layout] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_losses_follow_one_rank(losses, case, layout):
    one, many = losses["tp1"][case], losses[layout][case]
    assert len(one) == len(many) == 50
    worst = max(abs(a - b) / a for a, b in zip(one, many, strict=True))
    assert worst <= 1e-5, f"{case} at {layout}: worst relative difference {worst:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_the_runs_learn(losses, case):
    """A comparison of two runs that stand still would prove nothing."""
    curve = losses["tp1"][case]
    assert sum(curve[-5:]) / 5 < 0.9 * curve[0]
