"""A dry run says what real ranks do: the same collectives in the same order with the same bytes, the same shards and
ZeRO partitions; and tools/dry_run.py over a world that does not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.dry_run_worker import CASES, RANKS
from tests.helpers.launch import ROOT, torchrun

WORKER = Path(__file__).with_name("dry_run_worker.py")
# which chunks are recalled depends on data where not all are: the dry run assumes the most
BOUND = "context 4, block core, fewer recalled"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("dry-run") / "rank"
    torchrun(WORKER, out, ranks=RANKS, timeout=900)
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", [case for case in CASES if case != BOUND])
def test_the_collectives_are_those_of_real_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    for found in ranks:
        dry, real = found[case]["dry"]["step"], found[case]["real"]["step"]
        for number, (one, other) in enumerate(zip(dry, real, strict=False)):
            assert one == other, f"collective {number}"
        assert len(dry) == len(real) > 20


def test_no_selection_sends_more_than_the_dry_run_assumes(ranks: list[dict[str, Any]]) -> None:
    sent = {}
    for kind in ("dry", "real"):
        steps = [found[BOUND][kind]["step"] for found in ranks]
        sent[kind] = sum(each["given"] for step in steps for each in step)
    for found in ranks:
        dry, real = ([(each["op"], each["ranks"], each["dtype"]) for each in found[BOUND][kind]["step"]] for kind in ("dry", "real"))
        assert dry == real
    assert 0 < sent["real"] < sent["dry"], "as many would be another case of the test above"


@pytest.mark.parametrize("case", CASES)
def test_the_shards_and_partitions_are_those_of_real_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    for found in ranks:
        dry, real = found[case]["dry"], found[case]["real"]
        assert dry["held"] == real["held"] and len(dry["held"]) > 10
        assert dry["partitions"] == real["partitions"]
        assert (dry["partitions"] is None) == ("zero 0" in case)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/dry_run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_tool_runs_the_corners_of_512_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_tool("configs/run/qwen2.5-7b_256k.yaml", "model.num_layers=1", "training.global_batch_size=64", "--ranks", "512",
                    "--json", str(out))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["problems"] == [] and "0 problems" in done.stdout
    places = [tuple(each["place"].values()) for each in found["ranks"]]
    assert places == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (0, 1, 0), (0, 1, 32), (3, 1, 63)]
    # one layer of Qwen2.5-7B with its routes, embedding and head
    plain = 2 * 152064 * 3584 + 3584 + 2 * 3584 + 3584 * 3584 + 4608 * 3584 + 4608 + 3 * 18944 * 3584
    gates = 64 * 3584 + 64 + 2 * 64 + 2, 64 * 3584 + 64 + 3 * 64 + 3
    assert found["parameters"] == plain + sum(gates) + 1 + 2 * 4 * 128


def test_the_tool_names_what_it_was_not_shown_and_what_is_wrong(tmp_path: Path) -> None:
    alone = run_tool("configs/run/tiny.yaml", "model.vocab_size=512", "model.num_layers=1", "parallel.tensor_parallel=2", "training.global_batch_size=32",
                     "training.micro_batch_size=1", "--ranks", "16", "--rank", "0")  # fmt: skip
    assert alone.returncode == 1 and "no rank stands for tensor-parallel rank 1" in alone.stderr
    refused = run_tool("configs/run/tiny.yaml", "parallel.tensor_parallel=3", "--ranks", "16")
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
