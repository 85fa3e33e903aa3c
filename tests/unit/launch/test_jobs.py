"""What a Slurm job does around its step, with Slurm's commands stood in for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.launch_environment import launch_environment

ROOT = Path(__file__).resolve().parents[3]
SCONTROL = """
case "$2" in
    hostnames) seq --format 'node-%g' 20000 ;;
    show) echo " NodeAddr=127.0.0.1 " ;;
    *) echo "scontrol $*" >>calls ;;
esac
"""
WARNED = 'kill -USR1 "$PPID"; sleep 1'
ENDED = 'shift; "$@" & sleep 2; kill -TERM "$PPID"; wait'


class Job:
    """A checkout in `folder` and what Slurm sets there; `calls` has the requests to Slurm."""

    def __init__(self, folder: Path, srun: str, **chosen: str) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        for name in ("constraints.txt", "pyproject.toml"):
            (folder / name).write_text("")
        (folder / "job.yaml").write_text("")
        (folder / "bin").mkdir()
        for name, body in (("srun", srun), ("scontrol", SCONTROL), ("scancel", 'echo "scancel $*" >>calls')):
            command = folder / "bin" / name
            command.write_text(f"#!/usr/bin/env bash\n{body}\n")
            command.chmod(0o755)
        self.environment = launch_environment(folder / ".venv", folder) | {
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-20000]",
            "SLURM_JOB_NUM_NODES": "20000", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node-1", "CONFIG": "job.yaml",
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        } | chosen  # fmt: skip

    def run(self) -> subprocess.CompletedProcess[str]:
        """The batch script as Slurm would start it on the first node."""
        command = ["bash", "launch/slurm/pretrain.sbatch"]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("array", "name"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "7_0")])
def test_a_warned_job_speaks_for_itself_only(tmp_path: Path, array: dict[str, str], name: str) -> None:
    """The last task of an array has the array's number: with that, all tasks would stop and start again."""
    job = Job(tmp_path / "checkout", WARNED, **array)
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.calls() == [f"scancel --signal=USR1 {name}", f"scontrol requeue {name}"]


def test_a_requeue_waits_for_the_ranks_in_a_folder_of_any_name(tmp_path: Path) -> None:
    job = Job(tmp_path / "c++ (old) [1]", ENDED)
    (job.folder / "launch/torchrun.sh").write_text("sleep 4; echo saved >saved\n")
    done = job.run()
    assert done.returncode == 0 and (job.folder / "saved").exists(), done.stderr


@pytest.mark.parametrize("name", ["exp #3: it's [new]", "plain"])
def test_every_job_has_its_own_folder(tmp_path: Path, name: str) -> None:
    job = Job(tmp_path / "checkout", 'printf "%s\\n" "$@"', SLURM_JOB_NAME=name)
    given = job.run().stdout.splitlines()[-1]
    assert given.startswith("training.output_dir=")
    assert yaml.safe_load(given.partition("=")[2]) == f"{job.folder}/runs/{name}-7"
