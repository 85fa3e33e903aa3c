"""Generation over two tensor-parallel ranks gives the tokens of one: models of many variants, and the tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.generate_worker import NEW, tokens
from tests.helpers.launch import ROOT, free_port, torchrun
from tests.helpers.runs import Workplace
from tests.unit.model.test_causality import CASES, TINY

WORKER = Path(__file__).with_name("generate_worker.py")
SOME = ("mqa", "mla", "mka-score-l3", "fastmka-x-mean", "fastmka-l3", "fastmka-block", "blockmka-exact-group")
BLOCK = [
    "attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.chunk_size=8",
    "memory_hierarchy.l1.window=16", "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2",
    "data.pad_documents_to_chunks=true", "training.steps=4", "training.warmup_steps=1", "training.eval_interval=0",
    "training.eval_batches=1", "training.save_interval=0", "model.max_position_embeddings=4096",
]  # fmt: skip


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> dict[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("generate")
    cases, out = folder / "cases.json", folder / "out.json"
    cases.write_text(json.dumps({name: [*TINY, *CASES[name]] for name in SOME}))
    torchrun(WORKER, cases, out, ranks=2, timeout=600)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", SOME)
def test_two_ranks_generate_what_one_does(on_two_ranks, case: str, topology) -> None:
    one = tokens([*TINY, *CASES[case]], topology)
    assert [len(row) for row in one] == [NEW, NEW] and len({token for row in one for token in row}) > 3
    assert on_two_ranks[case] == one


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workplace = Workplace(tmp_path_factory.mktemp("trained"))
    return workplace.start("run", *BLOCK).finish().out


def tool(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            f"--master_port={free_port()}",
        ]
        arguments = (*arguments, f"parallel.tensor_parallel={ranks}")
    command = [*launcher, str(ROOT / "tools" / "generate.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_tool_continues_a_text_from_a_checkpoint_at_any_size(trained: Path, tmp_path: Path) -> None:
    """Sampled, so that the text says more than the likeliest token of a model that has learned nothing."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("async def connect(self, host, port):\n    return await self.open(host, port)\n" * 8)
    wanted = ("configs/run/tiny.yaml", f"training.output_dir={trained}", "--prompt-file", prompt, "--max-new-tokens", 24,
              "--temperature", 1, "--top-k", 50, "--seed", 5)  # fmt: skip
    one, two = tool(*wanted), tool(*wanted, ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout and len(one.stdout) > 24
    assert "tokens/s" in one.stderr and "tokens/s" not in one.stdout


@pytest.mark.parametrize(("wrong", "sentence"), [
    (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read"),
    (["--prompt", "x", "--top-p", "2"], "top-p is 2"),
    (["--prompt", "x", "parallel.tensor_parallel=2"], "parallel.tensor_parallel is 2"),
    (["--prompt", "x", "training.output_dir=nowhere"], "training.output_dir is nowhere"),
])  # fmt: skip
def test_the_tool_refuses_in_one_sentence(wrong: list[str], sentence: str) -> None:
    found = tool("configs/run/tiny.yaml", *wrong)
    assert found.returncode == 2 and not found.stdout
    assert sentence in found.stderr and "Traceback" not in found.stderr
