"""The comparison tools run to the end on a tiny model and report what they say they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.helpers.launch import ROOT
from tests.helpers.runs import CONFIG, Workplace


def run_tool(name: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_step_times_are_ratios_of_equal_models(tmp_path):
    overrides = Workplace(tmp_path).overrides
    run_tool("bench_step", "--steps", 3, "--json", tmp_path / "out.json", CONFIG, *overrides)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["parameters"]["gqa"] == figures["parameters"]["huggingface"] < figures["parameters"]["fastmka"]
    assert set(figures["ratios"]) == {"fastmka/gqa", "gqa/huggingface"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert all(len(times) == 3 for times in figures["all_seconds"].values())


def test_variants_are_tabulated(tmp_path):
    overrides = [*Workplace(tmp_path).overrides, "training.save_interval=0", "training.eval_interval=0"]
    names = ["gqa", "mka (score)"]
    run_tool(
        "compare_variants", "--steps", 6, "--output", tmp_path / "runs", "--variants", *names, "--", CONFIG, *overrides
    )
    rows = json.loads((tmp_path / "runs" / "variants.json").read_text())
    table = (tmp_path / "runs" / "variants.md").read_text()
    assert list(rows) == names
    for name, row in rows.items():
        assert row["step"] == 6
        assert f"| {name} | {row['parameters']:,} |" in table
        assert f"| {row['final']['valid_perplexity']:.2f} |" in table
    assert rows["mka (score)"]["config"]["attention"]["mixture"] == "score"
