"""tools/plan.py: exit codes, one sentence for each refusal, and suggestions that themselves fit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tools import plan as tool

SEVEN = "configs/run/qwen2.5-7b.yaml"
TINY = "configs/run/tiny.yaml"
RECIPES = [f"configs/run/{model}_{context}.yaml" for model in ("qwen2.5-7b", "qwen2.5-14b", "llama-3.1-8b")
           for context in ("64k", "128k", "256k")]
GPUS = ["--gpu", "h100-80g", "--nodes", "4"]


def run(capsys, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    code = tool.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_that_fits(capsys, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, printed, said = run(capsys, monkeypatch, SEVEN, *GPUS, "--json", str(out), "--tokens", "1e12")
    assert (code, said) == (0, "")
    assert "fits" in printed and "DOES NOT FIT" not in printed
    found = json.loads(out.read_text())
    assert [part["name"] for part in found["device"]] == [
        "weights", "gradients", "optimizer", "activations", "kv", "logits", "workspace"]
    assert found["fits"] and found["shortages"] == []
    assert found["tokens"] == 128 * 8192
    assert found["budget_days"] == pytest.approx(1e12 / found["tokens_per_second"] / 86_400)
    # 7.07e9 weights of matrix multiplications and the gates', six FLOPs each per token, and dense attention
    per_token = 6 * (7_070_285_824 + 28 * (3584 * 64 + 64 * 2)) + 3 * 28 * 2 * 2 * 3584 * (8192 + 1) / 2
    assert found["model_flops"] == pytest.approx(per_token * found["tokens"], rel=1e-12)


def test_every_figure_is_explained_and_sums_up(capsys, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, printed, _ = run(capsys, monkeypatch, SEVEN, *GPUS, "--explain", "--json", str(out))
    assert code == 0
    found = json.loads(out.read_text())
    for part in found["device"]:
        assert f"GPU {part['name']}: {part['formula']} = {part['bytes']:,} B" in printed
    for flow in found["flows"]:
        assert flow["formula"] in printed
    total = sum(part["bytes"] for part in found["device"]) / 2**30
    assert re.search(rf"in all +{total:,.2f}  of 74\.44", printed)


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (["training.micro_batch_size=8", "training.recompute=none"], "activations"),
        (["model.num_layers=400", "engine.zero_stage=1"], "gradients"),
        (["training.micro_batch_size=64", "training.global_batch_size=512"], "logits"),
    ],
)
def test_what_does_not_fit_is_named_with_a_change_that_helps(capsys, monkeypatch, overrides: list[str], largest: str) -> None:
    code, printed, said = run(capsys, monkeypatch, SEVEN, *overrides, *GPUS)
    assert code == 1
    assert "DOES NOT FIT" in printed
    assert said.startswith("The run does not fit: a GPU's memory would need ")
    assert f"of which {largest} " in said
    assert said.count("\n") == 1 and said.endswith(".\n")
    change = re.search(r"makes it fit is (.*)\.\n$", said)
    if change is None:
        assert "no layout that is allowed fits here" in said
        return
    code, _, said = run(capsys, monkeypatch, SEVEN, *overrides, *change[1].split(), *GPUS)
    assert (code, said) == (0, "")


def test_a_node_that_is_too_small_is_named(capsys, monkeypatch) -> None:
    code, _, said = run(capsys, monkeypatch, SEVEN, "engine.offload_optimizer=cpu", *GPUS, "--dram-gib", "16")
    assert code == 1
    assert said.startswith("The run does not fit: a node's DRAM would need ") and "of which offloaded optimizer" in said


def test_the_suggestion_fits_and_is_the_cheapest(capsys, monkeypatch, tmp_path: Path) -> None:
    code, printed, said = run(capsys, monkeypatch, SEVEN, "data.sequence_length=32768", "--gpu", "a100-40g", "--nodes", "2",
                              "--suggest")
    assert (code, said) == (0, "")
    pasted = next(line for line in printed.splitlines() if line.startswith("parallel."))
    out = tmp_path / "plan.json"
    code, _, said = run(capsys, monkeypatch, SEVEN, "data.sequence_length=32768", *pasted.split(), "--gpu", "a100-40g",
                        "--nodes", "2", "--json", str(out))
    assert (code, said) == (0, "")
    costs = [float(line.split()[-1]) for line in printed.splitlines() if re.match(r" +\d+ +\d+ +\d+ +\d ", line)]
    assert costs == sorted(costs) and len(costs) == 5
    assert costs[0] == pytest.approx(16e6 / json.loads(out.read_text())["tokens_per_second"], abs=0.06)


def test_nothing_to_suggest(capsys, monkeypatch) -> None:
    code, printed, said = run(capsys, monkeypatch, SEVEN, "model.num_layers=1000", "--gpu", "l4", "--gpus-per-node", "1",
                              "--suggest")
    assert (code, printed) == (1, "")
    assert said.startswith("No layout that is allowed fits on 1 x 1 l4;") and said.count("\n") == 1


def test_the_largest_cluster_has_suggestions_in_seconds(capsys, monkeypatch) -> None:
    """2^32 GPUs, of which no layout has work for all."""
    code, _, said = run(capsys, monkeypatch, SEVEN, "--nodes", "65536", "--gpus-per-node", "65536", "--suggest")
    assert code == 1 and said.startswith("No layout that is allowed fits on 65536 x 65536 h100-80g;")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([SEVEN, "--gpu", "v100"], "--gpu is v100: the table has no such device"),
        ([SEVEN, "--nodes", "0"], "--nodes is 0: "),
        ([SEVEN, "--gpus-per-node", "-8"], "--gpus-per-node is -8: "),
        ([SEVEN, "--nodes", "100000000"], "--nodes is 100000000: "),
        ([SEVEN, "--dram-gib", "nan"], "--dram-gib is nan: "),
        ([SEVEN, "--utilisation", "1.5"], "--utilisation is 1.5: "),
        ([SEVEN, "--gpus-per-node", "3"], "parallel.tensor_parallel 4 needs a multiple of 4 ranks"),
        ([TINY, "--gpu", "cpu", "--gpus-per-node", "1"], "--gpu is cpu: "),
        (["no_such.yaml"], "no_such.yaml does not exist"),
        ([SEVEN, "training.stepz=3"], "training.stepz"),
        ([SEVEN, *GPUS, "--json", "/no/such/folder/plan.json"], "--json is /no/such/folder/plan.json: it cannot be written"),
    ],
)
def test_a_wrong_cluster_or_configuration_is_one_sentence(capsys, monkeypatch, arguments: list[str], expected: str) -> None:
    code, _, said = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert expected in said and said.count("\n") == 1 and said.endswith(".\n")


def test_an_assumed_vocabulary_is_said(capsys, monkeypatch) -> None:
    _, printed, _ = run(capsys, monkeypatch, TINY, "--gpu", "cpu", "--gpus-per-node", "1", "--dram-gib", "8")
    assert "model.vocab_size is null: planned with data.tokenizer_vocab_size, 1,024." in printed


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("nodes", ["1", "4", "32"])
def test_recipes_fit_and_say_nothing_wrong(capsys, monkeypatch, recipe: str, nodes: str) -> None:
    code, _, said = run(capsys, monkeypatch, recipe, "--gpu", "h100-80g", "--nodes", nodes, "--dram-gib", "2048")
    assert (code, said) == (0, "")


