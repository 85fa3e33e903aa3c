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


def test_bytes_between_context_parallel_ranks_are_counted(tmp_path):
    out = tmp_path / "out.json"
    shape = ("--ranks", 3, "--seq", 768, "--chunk", 16, "--window", 32, "--kv-heads", 2, "--head-dim", 8, "--recalled", 2)
    run_tool("bench_context", *shape, "--dtype", "fp32", "--json", out)
    sent = json.loads(out.read_text())["sent"]
    # keys and values of 256 slots to both others; gradients to the ranks before
    shard, chunk = 2 * 256 * 2 * 8 * 4, 2 * 16 * 2 * 8 * 4
    for rank, dense in enumerate(sent["gqa"]):
        assert dense == {"keys and values": 2 * shard, "keys and values gradient": rank * shard}
    for rank, block in enumerate(sent["blockmka without L3"]):
        # one halo chunk goes to the next rank and comes back; 16 summaries as the keys and values above
        assert block["halo"] == (chunk if rank < 2 else 0)
        assert block["halo gradient"] == (chunk if rank > 0 else 0)
        assert block["summaries"] == 2 * shard / 16
        assert "pages" not in block
    for rank, block in enumerate(sent["blockmka"]):
        assert (block["pages"] > 0) == (rank < 2)
        assert block["pages"] % (chunk // 2) == 0
