"""kernels/verify.py, as far as a machine without a GPU can run it: the recall's section over the host's kernels."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch

from mka_megatron.ops.recall import cuda
from tests.helpers import host_block_attention
from tests.helpers.host_kernels import register_recall
from tests.helpers.host_route_fuse import run_on_host
from tests.helpers.numerics import assert_same
from tests.unit.kernels.conftest import REPOSITORY

KERNELS = REPOSITORY / "kernels"


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; the names it imports from its folder are gone afterwards."""
    monkeypatch.syspath_prepend(KERNELS)
    before = set(sys.modules)
    yield importlib.import_module("verify")
    own = {path.stem for path in KERNELS.glob("*.py")}
    for name in own & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would run")
def test_without_a_gpu_one_sentence() -> None:
    run = subprocess.run([sys.executable, KERNELS / "verify.py"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "no CUDA device" in run.stderr


def test_every_section_has_its_parts(verify: ModuleType) -> None:
    assert "recall" in verify.sections()
    for name in verify.sections():
        module = verify.section(name)
        assert all(callable(getattr(module, part)) for part in ("checks", "launches", "benchmarks"))


def test_the_recall_section_on_the_host(
    verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_recall(library)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    record = verify.verify(["recall"], torch.device("cpu"), (1, 129), (129,), False)
    found = record["ops"]["recall"]
    assert [c["case"] for c in found["checks"] if not c["passed"]] == []
    assert len(found["checks"]) == 2 * (1 + 18) + 3
    assert len(found["timings"]) == 3 and all(t["ms"] > 0 for t in found["timings"])
    assert verify.passed(record)
    device = {"device": "host", "driver": "", "torch": torch.__version__}
    text = verify.table({"device": device, **json.loads(json.dumps(record))})
    assert "41 of 41 checks passed" in text and "pool K, V, codes" in text


def test_the_fusion_section_on_the_host(
    verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_host(library, monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    record = verify.verify(["route_fuse"], torch.device("cpu"), (1, 129), (129,), False)
    found = record["ops"]["route_fuse"]
    assert [c["case"] for c in found["checks"] if not c["passed"]] == []
    assert [t["case"] for t in found["timings"]] == ["forward", "backward"]
    assert verify.passed(record)
    # what is compiled as a peer computes the same
    module = verify.section("route_fuse")
    inputs = module.Inputs.draw(torch.device("cpu"), 300, dtype=torch.float32)
    given = (inputs.logits, inputs.beta, *(x for s in inputs.streams for x in (s.x, s.decay)))
    for peer, exact in zip(module._doubled(*given), module._specified(inputs.rows, *given), strict=True):
        assert_same(peer, exact, 300)


def test_the_layers_section_on_the_host(
    verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on_host(library, monkeypatch)
    draw = verify.section("layer").Layer.draw
    monkeypatch.setattr(
        verify.section("layer").Layer, "draw", lambda device, slots, **_: draw(device, slots, heads=4, groups=2, channels=64)
    )
    saved = []
    record = verify.verify(["layer"], torch.device("cpu"), (1, 65), (65,), False, lambda r: saved.append(r["complete"]))
    found = record["ops"]["layer"]
    assert [c["case"] for c in found["checks"] if not c["passed"]] == [] and len(found["checks"]) == 8
    assert [(t["case"], set(t["peers"])) for t in found["timings"]] == [("forward + backward, host", {"GQA", "eager"})]
    assert record["complete"] and saved == [False, False], "what there is is saved as it goes"


def test_the_block_attention_section_on_the_host(
    verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_recall(library)
    host_block_attention.run_on_host(library, monkeypatch)
    section = verify.section("block_attention")
    drawn = section.Inputs.draw
    monkeypatch.setattr(section, "FANS", (1,))
    monkeypatch.setattr(section, "LAUNCHES", (("shard", 300, 64, 128), ("closed", 150, 128, 64)))
    monkeypatch.setattr(
        section.Inputs, "draw", lambda device, slots, **given: drawn(device, slots, **{"heads": 4, "channels": 64, **given})
    )
    record = verify.verify(["block_attention"], torch.device("cpu"), (1, 129), (129,), False)
    found = record["ops"]["block_attention"]
    assert [c["case"] for c in found["checks"] if not c["passed"]] == []
    # two checks of each of 8 cases by mma and, of the 4 with chunks of 128, by wgmma; and two runs of each launch
    assert len(found["checks"]) == 2 * 2 * (8 + 4) + 3
    assert [t["case"] for t in found["timings"]] == [
        "forward, mma", "backward, mma", "forward, wgmma", "backward, wgmma", "recall: pool, codes, top 16",
    ]  # fmt: skip
    assert verify.passed(record)
    device = {"device": "host", "driver": "", "torch": torch.__version__}
    assert "TFLOP/s" in verify.table({"device": device, **json.loads(json.dumps(record))})


def test_time_that_is_up_fails(verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    register_recall(library)
    monkeypatch.setattr(verify, "CHECKS_S", 0)
    record = verify.verify(["recall"], torch.device("cpu"), (1, 129), (), False)
    assert [c["passed"] for c in record["ops"]["recall"]["checks"]] == [True, False]
    assert "time was up after S=1" in record["ops"]["recall"]["checks"][-1]["case"] and not verify.passed(record)


def test_runs_of_several_ops_are_joined(verify: ModuleType) -> None:
    def record(ops: str, hash_: str = "a", memcheck: str = "clean", complete: bool = True) -> dict[str, Any]:
        return {
            "source_hash": hash_, "quick": False, "device": {"device": "GPU 1"}, "complete": complete,
            "ops": {op: {"of": memcheck} for op in ops}, "sanitizer": {"memcheck": memcheck},
        }  # fmt: skip

    both = verify.joined(record("xy"), record("yz", memcheck="failed: z"))
    assert both["ops"] == {"x": {"of": "clean"}, "y": {"of": "clean"}, "z": {"of": "failed: z"}} and both["complete"]
    assert both["sanitizer"] == {"memcheck": "failed: z"}
    assert verify.joined(record("x", memcheck="not run: x"), record("y"))["sanitizer"] == {"memcheck": "not run: x"}
    assert not verify.joined(record("x"), record("y", complete=False))["complete"]
    for other in (None, record("y", hash_="b"), record("x", memcheck="failed: x"), {**record("y"), "quick": True}):
        assert verify.joined(record("x"), other) == record("x"), "other sources, or the same op again"
    assert verify.joined({**record("x"), "sanitizer": {}}, record("y"))["sanitizer"] == {"memcheck": "clean"}


ALONE = """
import importlib, importlib.abc, sys
allowed = {"torch", "numpy", "mka_megatron"} | set(sys.stdlib_module_names)
import torch, numpy, torch._dynamo
have = set(name.split(".")[0] for name in sys.modules)

class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if not (top in allowed | have or top.startswith("verify") or top.startswith("mka_")):
            raise ImportError(f"{name} is none of PyTorch's")

sys.meta_path.insert(0, Only())
sys.path.insert(0, sys.argv[1])
import verify
print(*[verify.section(name).__name__ for name in verify.sections()])
"""


def test_pytorch_is_all_it_needs() -> None:
    """Its sections import neither Megatron, DeepSpeed, transformers nor pydantic or YAML."""
    run = subprocess.run([sys.executable, "-c", ALONE, KERNELS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = ["block_attention", "decode", "layer", "recall", "route_fuse"]
    assert run.stdout.split() == [f"verify_{name}" for name in names]


def test_a_wrong_kernel_fails(
    verify: ModuleType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_recall(library)
    pool = cuda.pool

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        k_mean, v_mean, codes = pool(*args)
        codes[0, 0, 0, 0] ^= 1
        return k_mean, v_mean, codes

    monkeypatch.setattr(cuda, "pool", wrong)
    record = verify.verify(["recall"], torch.device("cpu"), (1,), (), False)
    assert not verify.passed(record)
    assert "FAILED S=1: error" in verify.table(
        {"device": dict.fromkeys(("device", "driver", "torch"), ""), **record}
    )


def test_what_raises_is_a_failed_check(verify: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(cuda, "pool", raising)
    record = verify.verify(["recall"], torch.device("cpu"), (1,), (129,), False)
    assert [c["case"] for c in record["ops"]["recall"]["checks"]] == [
        "checks: RuntimeError: no such kernel",
        "benchmark S=129: RuntimeError: no such kernel",
    ]
    assert not verify.passed(record)


def test_checks_fail_on_what_is_not_finite_or_differs(verify: ModuleType) -> None:
    common = sys.modules["verify_common"]
    one = torch.tensor([1.0, 2.0])
    assert not common.Check("", float("nan"), 1.0).passed
    assert common.same_bits("", [one], [one]).passed
    assert not common.same_bits("", [one], [one.double()]).passed
    assert not common.same_bits("", [torch.tensor([0.0])], [torch.tensor([-0.0])]).passed
    assert not common.as_accurate("", torch.tensor([float("nan"), 2.0]), one, one.double()).passed
    assert common.as_accurate("", one, one, one.double()).passed
    assert asdict(common.Check("a", 0.0, 0.0)) == {"case": "a", "error": 0.0, "bound": 0.0}


def test_results_in_the_tree_belong_to_a_run(verify: ModuleType) -> None:
    """A results file names its sources: what it says holds for these only where the hash is theirs."""
    for path in (KERNELS / "results").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert len(record["source_hash"]) == 64 and record["ops"], path
