"""The same model through every back end: equal perplexities and tokens; and the tool on a training checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.evaluated import tiny_directory
from tests.helpers.launch import ROOT
from tests.helpers.numerics import assert_same
from tests.helpers.runs import Workplace

WORKER = Path(__file__).with_name("evaluate_worker.py")


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("evaluate")
    done = python(WORKER, tiny_directory(folder / "model"), folder / "out.json")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("case", ["gqa", "fastmka", "blockmka"])
def test_all_back_ends_give_the_same(found: dict, case: str) -> None:
    first, *others = found[case].values()
    assert len(others) == (3 if case == "gqa" else 1) and first["tokens"] > 200
    for other in others:
        assert other["tokens"] == first["tokens"]
        assert other["greedy"] == first["greedy"] and len(first["greedy"][0]) == 12
        assert other["stopped"] == first["stopped"] and len(first["stopped"][0]) <= 4
        assert other["later"] == first["later"] and all(len(row) >= 3 for row in first["later"])
        nats, wanted = (torch.tensor(each["nats"], dtype=torch.float64) for each in (other, first))
        # norms and rotary tables are fp32 everywhere
        assert_same(nats.float(), wanted.float(), terms=1)


def test_the_tool_on_a_training_checkpoint(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)
    steps = ("training.steps=4", "training.warmup_steps=1", "training.eval_interval=0", "training.eval_batches=1",
             "training.save_interval=0")  # fmt: skip
    trained = workplace.start("run", *steps).finish().out
    text = tmp_path / "text.txt"
    text.write_text("async def connect(self, host, port):\n    return await self.open(host, port)\n" * 20)
    done = python(
        ROOT / "tools" / "evaluate.py", "perplexity", "--out", tmp_path / "out", "--text", text, "--length", 128, "--stride", 64,
        "configs/run/tiny.yaml", f"training.output_dir={trained}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    # a model of 384 tokens that has learned next to nothing
    assert 50 < figures["perplexity"] < 1000 and figures["bytes"] > 1500
    assert figures["settings"]["model"]["back_end"] == "megatron"
