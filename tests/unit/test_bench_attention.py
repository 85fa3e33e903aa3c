"""The benchmark of the attention cores counts what the cores compute, and runs to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import block_oracle
from tests.helpers.block_oracle import Pages, Table
from tests.helpers.launch import ROOT
from tools import bench_attention


@pytest.mark.parametrize(("length", "recalled"), [(40, 2), (67, 0), (93, 3)])
def test_scores_are_the_pairs_that_see_each_other(length: int, recalled: int) -> None:
    chunk, window = 8, 16
    table = Table.of(chunk, [[(min(chunk, length - begin), 0) for begin in range(0, length, chunk)]])
    index = torch.full((1, table.count, 1, recalled), -1)
    for here in range(table.count):
        old = list(range(here - window // chunk + 1))[:recalled]
        index[0, here, 0, : len(old)] = torch.tensor(old, dtype=torch.int64)
    none = torch.empty(1, 1, 0, chunk, 1)
    pages = Pages(none, none, torch.empty(1, 1, 0, dtype=torch.int64), index)
    seen = block_oracle.levels(table, length, window, 0, 0, table.count, pages)
    setting = bench_attention.Setting("cpu", "float32", 1, 1, 4, chunk, window, recalled, 64, "reference", False, 1)
    assert bench_attention.scores("blockmka", length, setting) == int((seen >= 0).sum())
    assert bench_attention.scores("gqa", length, setting) == length * (length + 1) // 2


def test_growth_is_per_doubling() -> None:
    def point(length: int, seconds: float) -> dict:
        return {
            "variant": "blockmka", "length": length, "forward_seconds": 1.0, "forward_backward_seconds": seconds,
            "peak_mib": length / 4, "scores": length**2,
        }  # fmt: skip

    points = [point(1000, 1.0)]
    bench_attention.relate(points)
    assert points[0]["time_per_doubling"] is None and points[0]["times_faster_than_gqa"] is None
    points.append(point(4000, 9.0))
    bench_attention.relate(points)
    grown = [points[1][f"{name}_per_doubling"] for name in ("time", "scores", "memory")]
    assert grown == pytest.approx([3, 4, 2])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench_attention.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_runs_and_writes_its_figures(tmp_path) -> None:
    done = run("--seq", 256, "--chunk", 32, "--window", 64, "--repeats", 1, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr[-4000:]
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [point["variant"] for point in points] == ["gqa", "blockmka"]
    for point in points:
        assert 0 < point["forward_seconds"] < point["forward_backward_seconds"]
        assert f"{point['variant']:10}{256:>8}" in done.stdout
    assert points[0]["times_faster_than_gqa"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "gqa,flash"], "--variants has 'flash'"),
        (["--seq", "4k"], "--seq is '4k'"),
        (["--window", "100"], "--window is 100"),
        (["--backend", "flex"], "has no backward on cpu"),
    ],
)
def test_refuses_in_a_sentence(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments])
    with pytest.raises(SystemExit):
        bench_attention.parse()
    assert message in capsys.readouterr().err
