"""The benchmark of generation measures the cells it was asked for, and says what it cannot."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT
from tools import bench_inference

TINY = ["model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.head_dim=16",
        "data.tokenizer_vocab_size=300"]  # fmt: skip


def test_cells_are_measured_and_a_failing_one_does_not_stop_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    # 2 layers * 2 heads * 2 chunks of 8 KiB and more: there is room for the pages of one row, not of four
    done = subprocess.run(
        [sys.executable, "tools/bench_inference.py", "--variants", "gqa,blockmka", "--seq", "100", "--batch", "1,4",
         "--warmup", "1", "--tokens", "2", "--prefill-seconds", "0", "--dram-gib", str(12 * 9000 / 2**30),
         "--json", str(out), "configs/model/tiny.yaml", *TINY],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(out.read_text())
    assert figures["machine"]["model"]["hidden_size"] == 64
    cells = figures["cells"]
    assert [(c["variant"], c["batch"], c["seq"]) for c in cells] == [
        (variant, batch, 100) for variant in ("gqa", "blockmka") for batch in (1, 4)
    ]
    assert "dram_pool_gib" in cells[3]["error"] and "\n" not in cells[3]["error"]
    for each in cells[:3]:
        assert each["prefill_tok_s"] > 0 and each["ms_per_token"] > 0
        assert bench_inference.line(each) in done.stdout
    assert cells[1]["kv_cache_bytes"]["device"] == 4 * cells[0]["kv_cache_bytes"]["device"] == 4 * 2 * 100 * 2 * 2 * 16 * 4
    assert cells[2]["kv_cache_bytes"]["dram"] > 2 * 2 * 2 * 64 * 2 * 16 * 4


def test_a_process_that_dies_costs_its_cell_only(monkeypatch) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(bench_inference.multiprocessing, "get_context", lambda method: fork)

    def work(sender, config, cells, arguments) -> None:
        sender.send({"machine": len(cells)})
        for batch, _ in cells:
            if batch == 2:
                os._exit(9)
            sender.send({"ms_per_token": batch})

    monkeypatch.setattr(bench_inference, "work", work)
    found = list(bench_inference.in_a_process(None, [(1, 8), (2, 8), (3, 8)], None))  # type: ignore[arg-type]
    assert [each.get("machine") for each in found if "machine" in each] == [3, 1]
    first, dead, last = [each for each in found if "machine" not in each]
    assert (first["ms_per_token"], last["ms_per_token"]) == (1, 3) and (dead["batch"], dead["seq"]) == (2, 8)
    assert "code 9" in dead["error"]


def test_the_papers_protocol_is_its_grid(capsys) -> None:
    assert bench_inference.main(["--protocol", "paper", "--dry-run", "configs/model/qwen2.5-7b.yaml"]) == 0
    lines = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert {tuple(row) for row in lines} == {
        (variant, "batch", str(batch), "prompt", str(length), "tokens", "100+1000")
        for variant in ("mha", "mqa", "gqa", "mla", "mka", "fastmka", "blockmka")
        for batch in (1, 4, 8, 16) for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144)
    }  # fmt: skip
    _, configs = bench_inference.parse(["--protocol", "paper", "--chunk", "64", "--variants", "gqa,blockmka"])
    assert configs["gqa"].memory_hierarchy.l1.window is None
    block = configs["blockmka"].memory_hierarchy
    assert (block.l1.chunk_size, block.l1.window, block.l3.recalled_chunks) == (64, 2048, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "gqa,flash"], "--variants has 'flash'"),
        (["--seq", "4k"], "--seq is '4k'"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--ssd", "pages"], "--ssd without --dram-gib"),
        (["--window", "100", "--variants", "blockmka"], "memory_hierarchy.l1.window is 100"),
        (["configs/none.yaml"], "configs/none.yaml does not exist"),
        (["parallel.tensor_parallel=2"], "parallel.tensor_parallel 2"),
    ],
)
def test_refuses_in_a_sentence(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        bench_inference.parse(arguments)
    assert message in capsys.readouterr().err


def test_plots_need_matplotlib(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_inference, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench_inference.parse(["--plots", "x"])
    assert "--plots needs matplotlib" in capsys.readouterr().err


def test_a_plot_for_each_batch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [
        {
            "variant": variant, "batch": batch, "seq": length, "decode_tok_s": 10.0, "prefill_seconds": length / 1e3,
            "kv_cache_bytes": {"device": length, "dram": 0, "ssd": 0}, "prefill_peak_bytes": 5, "decode_peak_bytes": 9,
        }
        for variant in ("gqa", "fastmka") for batch in (1, 4) for length in (128, 256)
    ]  # fmt: skip
    bench_inference.plot([*cells, {"variant": "gqa", "batch": 16, "seq": 128, "error": "no memory"}], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch-1.png", "batch-4.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
