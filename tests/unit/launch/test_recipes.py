"""MODEL and CONTEXT choose a recipe in the sbatch scripts: what Slurm's step would run, with Slurm's commands stood in for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = """
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
say() { printf '%s\\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
make_environment() { :; }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts of this repository, where no environment is made and srun prints its arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch/env.sh").write_text(ENVIRONMENT)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", 'echo " NodeAddr=127.0.0.1 "')):
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    return tmp_path


def submit(checkout: Path, script: str, *arguments: str, **chosen: str) -> subprocess.CompletedProcess[str]:
    """The script as Slurm would start it on the first node."""
    job = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a",
           "SLURM_JOB_NUM_NODES": "1", "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", f"launch/slurm/{script}.sbatch", *arguments]
    return subprocess.run(command, cwd=checkout, env=job | chosen, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "configs/run").glob("*_*k.yaml")))
def test_model_and_context_name_a_recipe(checkout: Path, script: str, recipe: str) -> None:
    model, context = recipe.split("_")
    done = submit(checkout, script, "model.init_from=weights", "training.steps=3", MODEL=model, CONTEXT=context)
    assert done.returncode == 0, done.stderr
    ran = done.stdout.splitlines()
    assert ran[ran.index("torchrun.sh"):] == [
        "torchrun.sh", f"configs/run/{recipe}.yaml", f"training.output_dir='{checkout}/runs/job-7'", "model.init_from=weights",
        "training.steps=3",
    ]


@pytest.mark.parametrize(("script", "chosen", "arguments", "message"), [
    ("pretrain", {"MODEL": "qwen2.5-7b", "CONTEXT": "512k"}, [], "MODEL is 'qwen2.5-7b' and CONTEXT is '512k', which name no recipe"),
    ("pretrain", {"MODEL": "qwen2.5-7b"}, [], "and CONTEXT is '', which name no recipe; configs/run has llama-3.1-8b_128k.yaml"),
    ("finetune", {"MODEL": "llama-3.1-8b", "CONTEXT": "64k"}, [], "Say which weights to fine-tune: model.init_from=DIR."),
    ("pretrain", {}, [], "Say what to train"),
    ("pretrain", {"CONFIG": "nowhere.yaml"}, [], "CONFIG is nowhere.yaml, which is not there"),
])
def test_what_names_no_recipe_is_refused(checkout: Path, script: str, chosen: dict[str, str], arguments: list[str],
                                         message: str) -> None:
    done = submit(checkout, script, *arguments, **chosen)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
