"""The README's kernel table shows what a run of these sources measured, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import kernel_report

SCRIPT = Path(kernel_report.__file__)
TIMING = {
    "case": "pool",
    "slots": 32768,
    "ms": 0.5,
    "bytes_moved": 1,
    "peers": {"eager": 4.0},
    "copy_share": 0.874,
    "goal": "",
}


def record(sources: str, quick: bool = False) -> dict[str, Any]:
    return {
        "source_hash": sources,
        "quick": quick,
        "device": {"device": "GPU 1", "driver": "1.2", "torch": "2.13"},
        "copy_gbps": 2900.4,
        "sanitizer": {"memcheck": "clean"},
        "ops": {
            "recall": {"checks": [{"passed": True}, {"passed": False}], "timings": [TIMING], "skipped": []}
        },
    }


def test_numbers_of_these_sources() -> None:
    text = kernel_report.section([record("b"), record("a")], "a")
    assert text.count("GPU 1") == 1
    assert "| recall: pool | 32,768 | 0.5000 | 87% | eager 8.0× |" in text
    assert "copy 2900 GB/s; 1 of 2 checks passed; compute-sanitizer: memcheck clean" in text


@pytest.mark.parametrize("records", [[], [record("b")], [record("a", quick=True)]])
def test_no_numbers_of_other_sources_or_short_runs(records: list[dict[str, Any]]) -> None:
    text = kernel_report.section(records, "a")
    assert text.startswith("The CUDA kernels were not yet run on a GPU at this version") and "|" not in text


def test_the_readme_keeps_the_rest(tmp_path: Path) -> None:
    at = tmp_path / "README.md"
    at.write_text(f"before\n{kernel_report.BEGIN}\nold\n{kernel_report.END}\nafter\n")
    for _ in range(2):
        subprocess.run([sys.executable, SCRIPT, "--readme", at], check=True)
    lines = at.read_text().splitlines()
    assert lines[:2] == ["before", kernel_report.BEGIN] and lines[-2:] == [kernel_report.END, "after"]
    assert "old" not in lines
    at.write_text("nothing")
    run = subprocess.run([sys.executable, SCRIPT, "--readme", at], capture_output=True, text=True)
    assert run.returncode == 1 and "needs the lines" in run.stderr and at.read_text() == "nothing"


def test_the_readme_says_what_was_run() -> None:
    readme = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    assert kernel_report.replaced(readme, kernel_report.current()) == readme, (
        "run python tools/kernel_report.py --readme README.md"
    )
