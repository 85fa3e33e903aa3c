"""Fine-tuning on several ranks, started by the launch scripts, is fine-tuning on one with as large a batch."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mka_megatron.config.fine_tune import load_fine_tune
from mka_megatron.hf.training import fine_tune
from tests.helpers.fine_tuning import FineTuning
from tests.helpers.launch import ROOT, end_tree
from tests.helpers.launch_environment import launch_environment
from tests.helpers.numerics import assert_same

STEPS = 8
LABELS = 4 * 64  # of a step
SETTINGS = ("gradient_accumulation=1", f"max_steps={STEPS}", "eval_ppl=true", "eval_batches=4")


class Launched:
    """A launch script that was started."""

    def __init__(self, workplace: FineTuning, script: str, ranks: int, out: Path, *overrides: str) -> None:
        self.log = out.with_suffix(".log")
        arguments = [str(workplace.config), str(ranks), f"output_dir={out}", *SETTINGS, *overrides]
        with self.log.open("a") as log:
            command = ["/usr/bin/env", "bash", f"launch/{script}.sh", *arguments]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=workplace.environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.out = out

    def finish(self) -> dict[str, Any]:
        """What it printed as JSON; AssertionError shows its log where it failed."""
        try:
            out, _ = self.process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            end_tree(self.process)
            raise
        assert self.process.returncode == 0, self.log.read_text()[-6000:]
        return json.loads(out)

    def wait_for_step(self, step: int) -> None:
        """Until losses.jsonl holds `step` steps."""
        deadline = time.monotonic() + 300
        path = self.out / "losses.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= step):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-6000:]
            time.sleep(0.01)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> FineTuning:
    place = FineTuning(tmp_path_factory.mktemp("fine-tuning"))
    place.environment = launch_environment(place.folder / "venv")
    return place


@pytest.fixture(scope="module")
def alone(workplace: FineTuning) -> tuple[Path, dict[str, Any]]:
    """One process with the batch of all replicas."""
    out = workplace.folder / "alone"
    return out, fine_tune(load_fine_tune(workplace.config, [f"output_dir={out}", *SETTINGS, "batch_size=4"]))


def curve(out: Path) -> torch.Tensor:
    """[steps, 2]: loss and gradient norm."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])


def assert_same_run(out: Path, metrics: dict[str, Any], alone: tuple[Path, dict[str, Any]]) -> None:
    expected, expected_metrics = alone
    assert_same(curve(out), curve(expected).double(), STEPS * LABELS)
    for key in ("train_mean_loss", "eval_perplexity_start", "eval_perplexity"):
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-4), key
    assert metrics["parameters"] == expected_metrics["parameters"]
    found, wanted = (load_file(Path(each["checkpoint"]) / "model.safetensors") for each in (metrics, expected_metrics))
    assert found.keys() == wanted.keys()


def test_replicas_stop_together_and_go_on(workplace: FineTuning, alone: tuple[Path, dict[str, Any]]) -> None:
    first = Launched(workplace, "launch_dp_torchrun", 2, workplace.folder / "replicas")
    first.wait_for_step(3)
    first.process.send_signal(signal.SIGTERM)
    stopped = first.finish()
    assert stopped["interrupted"] == "SIGTERM" and 3 <= stopped["step"] < STEPS, first.log.read_text()
    assert "Traceback" not in first.log.read_text()
    second = Launched(workplace, "launch_dp_torchrun", 2, workplace.folder / "replicas")
    metrics = second.finish()
    assert metrics["resumed_from"] == stopped["step"]
    assert_same_run(second.out, metrics, alone)


def test_shared_layers_and_replicas(workplace: FineTuning, alone: tuple[Path, dict[str, Any]]) -> None:
    run = Launched(workplace, "launch_tp_dp_accelerate", 4, workplace.folder / "shared", "tp_size=2")
    assert_same_run(run.out, run.finish(), alone)


@pytest.mark.parametrize("script", ["launch_dp_torchrun", "launch_tp_dp_accelerate"])
def test_a_wrong_configuration_is_one_sentence(script: str, workplace: FineTuning) -> None:
    run = Launched(workplace, script, 3, workplace.folder / script, "tp_size=2")
    run.process.communicate(timeout=300)
    assert run.process.returncode == 2
    assert run.log.read_text() == (
        "tp_size is 2 but 3 processes were started: start a multiple of it, or change it.\n")
