"""What makes the comparison fair, on real models: parameters, batches, held-out documents, what is run again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys

import pytest

import mka_megatron
from mka_megatron.benchmark.cells import Budget, Cell, measure, run_cells
from mka_megatron.benchmark.data import held_out, prepared, train_rows
from mka_megatron.benchmark.parity import match_parameters
from mka_megatron.benchmark.settings import ATTENTION, contender
from mka_megatron.config.errors import ConfigError
from mka_megatron.data.batch import DataError
from mka_megatron.model.build import build_model
from mka_megatron.training.norms import parameter_count
from tests.helpers.benchmarks import TOKENS, overrides


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return overrides(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def trained(small, topology, tmp_path_factory):
    """All types for three steps, by the function that users call."""
    output = tmp_path_factory.mktemp("output")
    rows = mka_megatron.run_benchmark(
        ["mha", "mqa", "gqa", "mla", "mka", "fmka", "blockmka"], tokens=TOKENS, overrides=small, output=output,
        topology=topology, distributed=False,
    )  # fmt: skip
    return {row["name"]: row for row in rows}, output


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, mka_megatron; assert not {'torch', 'numpy', 'yaml'} & set(sys.modules); print(mka_megatron.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mka_megatron.__version__


def test_signatures() -> None:
    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(mka_megatron, name)).parameters)

    assert parameters("train_model")[:4] == ["model", "loader", "epochs", "learning_rate"]
    assert parameters("evaluate_model") == ["model", "loader"]
    assert parameters("get_model")[0] == "attention_type" and parameters("get_dataloader")[0] == "split"
    assert "distributed" in parameters("run_benchmark")
    with pytest.raises(AttributeError, match="nothing"):
        mka_megatron.nothing  # noqa: B018


def test_functions_one_by_one(small, topology) -> None:
    with mka_megatron.get_model("fmka", overrides=small, topology=topology) as model:
        train = mka_megatron.get_dataloader("train", config=model.config, tokens=TOKENS, topology=topology)
        valid = mka_megatron.get_dataloader("valid", config=model.config, topology=topology)
        before = mka_megatron.evaluate_model(model, valid)
        result = mka_megatron.train_model(model, train, epochs=2, learning_rate=5e-3)
        after = mka_megatron.evaluate_model(model, valid)
        assert len(result.losses) == 2 * len(train) == 6 and result.tokens == 2 * TOKENS
        assert model.config.training.learning_rate == 5e-3 and model.config.training.steps == 6
        assert result.loss == pytest.approx(sum(result.losses) / 6)
    # an untrained model guesses among 384 tokens; six steps teach which are frequent
    assert after < before
    assert abs(math.log(before) - math.log(384)) < math.log(384) / 4


def test_every_type_is_trained_on_the_same_rows(trained) -> None:
    rows, _ = trained
    assert list(rows) == list(ATTENTION)
    assert len({row["data_sha256"] for row in rows.values()}) == 1
    assert len({row["eval_tokens"] for row in rows.values()}) == 1
    assert len({row["eval_loss"] for row in rows.values()}) == len(rows)
    for row in rows.values():
        assert row["steps"] == 3 and row["perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
        assert row["allocated_bytes"] < row["reserved_bytes"] and row["train_seconds"] > 0 < row["eval_seconds"]


def test_the_hash_sees_order_and_seed(small, topology) -> None:
    config = contender("gqa", overrides=small)
    data = prepared(config, topology)
    budget = Budget(TOKENS)

    def digest(**changes: object) -> str:
        changed = dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))
        return measure(changed, budget, topology)["data_sha256"]

    first = digest()
    assert digest() == first != digest(seed=99)
    batches = [batch.tokens for step in train_rows(config, data, topology, TOKENS) for batch in step]
    again = [batch.tokens for step in train_rows(config, data, topology, TOKENS) for batch in step]
    assert all(a.equal(b) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("name", ATTENTION)
def test_parameters_within_one_percent(name: str, small, topology) -> None:
    like = contender("gqa", overrides=small)
    size = prepared(like, topology).vocab_size
    wanted = parameter_count(build_model(like, topology, size), topology)
    config = match_parameters(contender(name, overrides=small), "gqa", size)
    found = parameter_count(build_model(config, topology, size), topology)
    assert abs(found - wanted) <= 0.01 * wanted
    assert config.model.ffn_hidden_size % 8 == 0


def test_what_cannot_be_matched_is_refused() -> None:
    shape = "model={num_layers: 2, hidden_size: 64, ffn_hidden_size: 8, num_attention_heads: 4, num_kv_heads: 1, head_dim: 64}"
    with pytest.raises(ConfigError, match="no width gives mha"):
        match_parameters(contender("mha", overrides=[shape]), "mqa", 64)


def test_halves_of_the_held_out_documents_share_none(small, topology) -> None:
    config = contender("gqa", overrides=[*small, "training.eval_batches=0"])
    data = prepared(config, topology)
    halves = [held_out(config, data, topology, split) for split in ("valid", "test")]
    begins = [{int(b) for packing in half.packings for b in packing._corpus.begins} for half in halves]
    assert not begins[0] & begins[1]
    assert begins[0] | begins[1] == {int(b) for corpus in data.valid for b in corpus.begins}
    train = {int(b) for corpus in data.train for b in corpus.begins}
    assert not train & (begins[0] | begins[1])


def test_finished_runs_are_not_repeated(trained, small, topology, monkeypatch) -> None:
    _, output = trained
    before = json.loads((output / "results.json").read_text())
    measured = []
    monkeypatch.setattr("mka_megatron.benchmark.cells.measure", lambda *a, **k: measured.append(a) or {"eval_loss": 9.0, "parameters": 1})
    rows = mka_megatron.run_benchmark(["gqa", "mla"], seeds=[0, 7], tokens=TOKENS, overrides=small, output=output, topology=topology)
    assert [a[0].training.seed for a in measured] == [7, 7]
    assert [row["eval_loss"] for row in rows] == [*(r["eval_loss"] for r in before["rows"] if r["name"] in ("gqa", "mla")), 9.0, 9.0]
    assert len(json.loads((output / "results.json").read_text())["rows"]) == len(before["rows"]) + 2


def test_a_run_that_diverges_does_not_end_the_others(small, topology) -> None:
    good = contender("gqa", overrides=small)
    bad = dataclasses.replace(good, training=dataclasses.replace(good.training, learning_rate=1e30, max_bad_steps=1))
    rows = run_cells([Cell("bad", 0, bad), Cell("good", 0, good)], Budget(TOKENS), topology, baseline="good")
    assert "not finite" in rows[0]["error"] and rows[1]["perplexity"] > 1


def test_lengths_are_compared_at_equal_tokens(small, topology) -> None:
    rows = mka_megatron.run_benchmark(["gqa", "blockmka"], sequence_lengths=[64, 256], overrides=small, topology=topology)
    assert [(row["name"], row["sequence_length"]) for row in rows] == [
        ("gqa", 64), ("blockmka", 64), ("gqa", 256), ("blockmka", 256)]  # fmt: skip
    assert all("eval_loss" not in row and row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"distributed": True}, "torchrun"),
        ({"attention_types": ["mba"]}, "mba"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "multiple of 2"),
        ({"overrides": ["model.head_dim=3"]}, "head_dim"),
    ],
)
def test_refused_in_one_sentence(arguments, words, topology) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        mka_megatron.run_benchmark(**{"topology": topology} | arguments)
    assert "\n" not in str(refusal.value)


def test_too_small_a_budget_is_refused(small, topology) -> None:
    with pytest.raises(DataError, match="less than a step"):
        mka_megatron.run_benchmark(["gqa"], tokens=100, overrides=small, topology=topology)
