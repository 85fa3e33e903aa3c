"""The benchmark of the attention cores counts what the cores compute, and runs to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from tests.helpers import block_oracle
from tests.helpers.block_oracle import Pages, Table
from tests.helpers.launch import ROOT
from tools import attention_cores, attention_figures, bench_attention
from tools.attention_cores import CORES, Setting, Work
from tools.attention_figures import relate
from tools.attention_layers import LAYERS


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
    setting = small(heads=1, kv_heads=1, chunk=chunk, window=window, recalled=recalled)
    assert CORES["blockmka"].pairs(length, setting) == int((seen >= 0).sum())
    assert CORES["gqa"].pairs(length, setting) == length * (length + 1) // 2


def small(**changes: Any) -> Setting:
    given = Setting("cpu", "float32", 4, 2, 64, 32, 64, 2, 64, "reference", False, 1)
    return replace(given, **changes)


def test_pairs_of_compressed_blocks() -> None:
    """NSA: every query its selected tokens, and the blocks of 64 that end at or before it."""
    setting = small(window=64, recalled=1)
    for length in (1, 63, 64, 95, 96, 97, 200, 256):
        expected = sum(min(t + 1, 96) + (t + 1) // 64 for t in range(length))
        assert attention_cores.nsa_pairs(length, setting) == expected, length


def test_deepseeks_heads_for_a_hidden_size() -> None:
    """Qwen2.5-7B's hidden size is half of DeepSeek-V3's, which has 128 heads."""
    setting = small(heads=28, kv_heads=4, head_dim=128)
    assert setting.mla_heads == 64 and CORES["mla"].cost(setting) == 2 * 64 * (192 + 128)
    assert CORES["gqa"].cost(setting) == 4 * 28 * 128


def test_equal_work_of_every_implementation() -> None:
    """The same lists: what is not measured by a kernel here computes the same as the whole core."""
    setting = small()
    whole, alone = (CORES[name].make(setting, 300) for name in ("blockmka", "reference"))
    torch.testing.assert_close(whole.forward(), alone.forward(), rtol=0, atol=0)


@pytest.mark.parametrize(("known", "name"), [(CORES, name) for name in ("gqa", "mla", "blockmka", "reference")] + [(LAYERS, name) for name in ("gqa", "mla", "blockmka", "fastmka")])
@pytest.mark.parametrize("recalled", [0, 2])
def test_every_leaf_has_a_gradient(known: dict[str, Any], name: str, recalled: int) -> None:
    """Output of the shape that is said, and gradients that reach what the step updates; later tokens change nothing."""
    work = known[name].make(small(recalled=recalled), 200)
    out = work.forward()
    assert out.shape == work.shape
    grads = torch.autograd.grad(out, work.leaves, torch.ones_like(out))
    assert all(bool(g.isfinite().all()) for g in grads) and sum(bool(g.any()) for g in grads) >= 3
    with torch.no_grad():
        work.leaves[0][:, 150:] += 1
        changed = (work.forward() != out).flatten(2).any(dim=2)[0]
    assert not bool(changed[:150].any()) and bool(changed[150:].all())


def test_pinned_runs_by_that_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whose dense kernels are math and flash: the pin is in place while the core attends, and not after."""
    used = []

    def attend(*_: Any) -> Work:
        return Work(lambda: used.append(torch.backends.cuda.math_sdp_enabled()), [], ())

    core = attention_cores.pinned(replace(CORES["gqa"], make=attend), SDPBackend.FLASH_ATTENTION)
    core.make(small(), 64).forward()
    assert used == [False] and torch.backends.cuda.math_sdp_enabled()
    assert core.lacks(small()) == "it needs a GPU" and set(attention_cores.with_pinned(core, core)) < set(LAYERS)


def test_heads_of_its_own() -> None:
    core, setting = bench_attention.contender("nsa@64/4", small())
    assert core is CORES["nsa"] and (setting.heads, setting.kv_heads) == (64, 4)
    assert bench_attention.contender("gqa", small(layer=True))[0] is LAYERS["gqa"]


def test_what_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudnn", "flash", "mla-cudnn", "flex", "mma", "wgmma", "nsa"):
        point = bench_attention.measure(name, 64, small())
        assert set(point) == {"variant", "length", "missing"}, name
        assert attention_figures.line(point).startswith(f"{name:14}{64:>8}  not measured: ")
    monkeypatch.setattr(attention_cores, "find_spec", lambda name: object())
    assert "nsa@64/4" in CORES["nsa"].lacks(small(heads=28, kv_heads=4))
    assert CORES["nsa"].lacks(small(heads=64, kv_heads=4)) == "it needs a GPU"


def test_growth_is_per_doubling() -> None:
    def point(length: int, seconds: float) -> dict:
        return {
            "variant": "blockmka", "length": length, "forward_seconds": 1.0, "forward_backward_seconds": seconds,
            "peak_mib": length / 4, "scores": length**2,
        }  # fmt: skip

    points = [point(1000, 1.0)]
    relate(points)
    assert points[0]["time_per_doubling"] is None and points[0]["times_faster"] == {}
    points.append({"variant": "blockmka", "length": 2000, "missing": "memory"})
    relate(points)
    points.append(point(4000, 9.0))
    relate(points)
    grown = [points[2][f"{name}_per_doubling"] for name in ("time", "scores", "memory")]
    assert grown == pytest.approx([3, 4, 2])
    for variant, seconds in (("gqa", 18.0), ("nsa@64/4", 36.0), ("mla", 27.0), ("reference", 9.0)):
        points.append(point(4000, seconds) | {"variant": variant})
        relate(points)
    assert points[-1]["times_faster"] == {"gqa": 2, "mla": 3}, "with these heads alone"
    points.append(point(4000, 9.0) | {"variant": "wgmma@64/4"})
    relate(points)
    assert points[-1]["times_faster"] == {"nsa": 4}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/bench_attention.py", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_runs_and_writes_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("--seq", 256, "--chunk", 32, "--window", 64, "--repeats", 1, "--json", tmp_path / "out.json",
               "--variants", "gqa,blockmka,wgmma", "--plot", tmp_path / "out.png")  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    *points, missing = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [point["variant"] for point in points] == ["gqa", "blockmka"]
    for point in points:
        forward, both = point["forward_seconds"], point["forward_backward_seconds"]
        assert 0 < forward < both
        assert f"{point['variant']:14}{256:>8}" in done.stdout
        pairs = point["scores"] * 4 * 2 * 64
        assert point["tflops"] == pytest.approx({"forward": 2 * pairs / forward / 1e12, "backward": 5 * pairs / (both - forward) / 1e12})
    assert points[1]["times_faster"] == {"gqa": pytest.approx(points[0]["forward_backward_seconds"] / points[1]["forward_backward_seconds"])}
    assert "missing" in missing and "wgmma              256  not measured: " in done.stdout
    image = (tmp_path / "out.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(image[16:20], "big") == 4 * 500, "time, memory and two rates"


def test_layers_run_and_write_their_figures(tmp_path: Path) -> None:
    done = run("--layer", "--seq", 256, "--chunk", 32, "--window", 64, "--repeats", 1, "--json", tmp_path / "out.json",
               "--variants", "gqa,mla,fastmka")  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [set(point["times_faster"]) for point in points] == [set(), {"gqa"}, {"gqa", "mla"}]
    assert all(point["forward_backward_seconds"] > 0 and "tflops" not in point for point in points)


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of\n memory")

    monkeypatch.setattr(bench_attention, "measure", fails)
    sent: list[Any] = []
    bench_attention.report(SimpleNamespace(send=sent.append), "gqa", 64, small(), torch.get_num_threads())
    assert sent == [{"variant": "gqa", "length": 64, "missing": "OutOfMemoryError: out of memory"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "gqa,fast"], "--variants has 'fast'"),
        (["--variants", "gqa,nsa@64/5"], "--variants has 'nsa@64/5'"),
        (["--variants", "gqa,nsa@64"], "--variants has 'nsa@64'"),
        (["--layer", "--variants", "gqa,flex"], "--variants has 'flex': choose of gqa, cudnn"),
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
