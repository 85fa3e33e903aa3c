"""What the launch scripts say before they start a rank."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.launch import ROOT
from tests.helpers.launch_environment import launch_environment


def launch(folder: Path, *command: str, **chosen: str) -> subprocess.CompletedProcess[str]:
    environment = launch_environment(folder / "venv") | chosen
    return subprocess.run(["/usr/bin/env", "bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_print_config_is_that_of_all_ranks(tmp_path: Path) -> None:
    """A layout of more ranks than one is not refused."""
    done = launch(tmp_path, "launch/torchrun.sh", "configs/run/qwen2.5-7b.yaml", "data.train=[a.jsonl]", "--print-config", NNODES="2", NPROC="4")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["parallel"]["tensor_parallel"] == 4


@pytest.mark.parametrize("rank", ["2", "-1", "01", "node1"])
def test_a_machine_has_a_number_from_zero(tmp_path: Path, rank: str) -> None:
    """With numbers from 1 no machine would be the one where all meet."""
    meeting = {"NNODES": "2", "MASTER_ADDR": "node1", "NODE_RANK": rank}
    ranks = f"source {ROOT}/launch/env.sh; source {ROOT}/launch/ranks.sh; run_torchrun 1 program.py"
    done = launch(tmp_path, "-c", ranks, **meeting)
    assert done.returncode == 1
    assert done.stderr == f"NODE_RANK is {rank}: it must be this machine's number among the 2 of NNODES, counted from 0.\n"


@pytest.mark.parametrize(("command", "name", "things"), [
    (["launch_dp_torchrun.sh", "configs/hf_qwen_fastmka.yaml", "1"], "NNODES", "machines"),
    (["torchrun.sh", "configs/run/tiny.yaml"], "NNODES", "machines"),
    (["torchrun.sh", "configs/run/tiny.yaml"], "NPROC", "processes"),
    (["run_ruler.sh", "out", "configs/run/tiny.yaml"], "NPROC", "processes"),
    (["run_longbench.sh", "out", "README.md", "configs/run/tiny.yaml"], "NPROC", "processes"),
    (["slurm/eval.sbatch", "ruler"], "NPROC", "processes"),
])
@pytest.mark.parametrize("number", ["two", "0"])
def test_a_number_is_a_number(tmp_path: Path, command: list[str], name: str, things: str, number: str) -> None:
    script, *arguments = command
    done = launch(tmp_path, f"launch/{script}", *arguments, **{name: number, "SLURM_SUBMIT_DIR": str(ROOT)})
    assert done.returncode == 1 and done.stderr == f"{name} is {number}: it must be a positive number of {things}.\n"
