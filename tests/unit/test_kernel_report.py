"""The README's kernel table shows what a run of these sources measured, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import kernel_plots, kernel_report

SCRIPT = Path(kernel_report.__file__)
TIMING = {
    "case": "pool",
    "slots": 32768,
    "ms": 0.5,
    "bytes_moved": 1,
    "peers": {"eager": 4.0},
    "copy_share": 0.874,
    "goal": "",
    "flops": 0,
}


def record(sources: str, quick: bool = False, complete: bool = True) -> dict[str, Any]:
    return {
        "complete": complete,
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
    assert "| recall: pool | 32,768 | 0.5000 | 87% | eager 8.0× |  |" in text
    assert "copy 2900 GB/s; 1 of 2 checks passed; compute-sanitizer: memcheck clean" in text


@pytest.mark.parametrize("records", [[], [record("b")], [record("a", quick=True)], [record("a", complete=False)]])
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


def three_lengths() -> dict[str, Any]:
    """A made-up record: nothing of it was measured."""
    made = record("a")
    made["ops"]["recall"]["timings"] = [
        {**TIMING, "slots": slots, "ms": slots / 1e5, "bytes_moved": 1000 * slots} for slots in (131072, 4096, 32768)
    ]
    made["ops"]["decode"] = {"checks": [], "skipped": [], "timings": [{**TIMING, "case": "close", "bytes_moved": 0}]}
    return made


def attention() -> dict[str, Any]:
    """The same of an op that is bound by its products: made up as well."""
    timing = {**TIMING, "case": "forward, mma", "ms": 2.0, "copy_share": None, "bytes_moved": 0, "flops": 600 * 10**9}
    made = record("a")
    made["ops"] = {"block_attention": {"checks": [], "skipped": [], "timings": [timing]}}
    return made


def test_products_are_told_by_rate() -> None:
    text = kernel_report.section([attention()], "a")
    assert "| block_attention: forward, mma | 32,768 | 2.0000 | 300.0 TFLOP/s | eager 2.0× |  |" in text
    assert kernel_plots.rates(attention(), "block_attention") == {"forward, mma": [(32768, 300.0)]}
    assert kernel_plots.rates(three_lengths(), "recall") == {}


def test_the_lines_of_the_plots() -> None:
    made = three_lengths()
    points = [(4096, 0.04096), (32768, 0.32768), (131072, 1.31072)]
    assert kernel_plots.times(made, "recall") == {"pool": points, "pool, eager": [(slots, 4.0) for slots, _ in points]}
    assert kernel_plots.bandwidths(made, "recall") == {"pool": [(slots, pytest.approx(100.0)) for slots, _ in points]}
    assert kernel_plots.bandwidths(made, "decode") == {}, "what moves no bytes has no bandwidth"


def test_plots_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = kernel_plots.write([three_lengths()], tmp_path / "plots")
    assert [path.name for path in written] == ["gpu-1-time.png", "gpu-1-bandwidth.png"]
    for path, panels in zip(written, (2, 1), strict=True):
        image = path.read_bytes()
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(image[16:20], "big") == 120 * 7 * panels, "one panel per op that has the quantity"


def test_rates_have_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = kernel_plots.write([attention()], tmp_path)
    assert [path.name for path in written] == ["gpu-1-time.png", "gpu-1-tflops.png"]


def test_plots_without_matplotlib_or_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_report.py", "--plots", str(tmp_path)])
    monkeypatch.setattr(kernel_report, "results", list)
    pytest.importorskip("matplotlib")
    assert kernel_report.main() == 1
    assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert kernel_report.main() == 1
    assert capsys.readouterr().err == "kernel_report.py: plots need matplotlib: pip install 'mka-megatron[plots]'.\n"


def test_the_readme_says_what_was_run() -> None:
    readme = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    assert kernel_report.replaced(readme, kernel_report.current()) == readme, (
        "run python tools/kernel_report.py --readme README.md"
    )
