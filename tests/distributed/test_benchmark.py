"""The benchmark on two real ranks: data prepared once, equal rows for every type, the figures of one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mka_megatron
from tests.helpers.benchmarks import TOKENS, overrides
from tests.helpers.launch import torchrun

WORKER = Path(__file__).with_name("benchmark_worker.py")
# Relative; fp32 sums in another order, grown over three steps of a model this small.
LOSS = 1e-5


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    done = torchrun(WORKER, directory, ranks=2, timeout=280)
    return directory, [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)], done


def test_data_are_prepared_by_one_rank_once(launched) -> None:
    directory, _, _ = launched
    assert (directory / "prepared.txt").read_text() == "train_bpe 0\nwrite_dataset 0\n"


def test_ranks_agree_and_rank_0_alone_reports(launched) -> None:
    directory, (first, second), done = launched
    for a, b in zip(first["plain"] + first["sharded"], second["plain"] + second["sharded"], strict=True):
        assert {key: a[key] for key in ("name", "train_loss", "eval_loss", "data_sha256", "eval_tokens", "allocated_bytes")} == {
            key: b[key] for key in ("name", "train_loss", "eval_loss", "data_sha256", "eval_tokens", "allocated_bytes")}  # fmt: skip
    assert done.stdout.count("| gqa |") == 1
    assert [row["name"] for row in json.loads((directory / "out" / "results.json").read_text())["rows"]] == ["gqa", "fastmka", "blockmka"]


def test_every_type_got_the_same_rows(launched) -> None:
    _, (ranks, _), _ = launched
    assert len({row["data_sha256"] for row in ranks["plain"]}) == 1


def test_two_ranks_find_what_one_finds(launched, topology) -> None:
    directory, (ranks, _), _ = launched
    alone = mka_megatron.run_benchmark(
        ["gqa", "fmka", "blockmka"], tokens=TOKENS, overrides=overrides(directory / "cache"), topology=topology
    )
    fused = ranks["sharded"][0]
    for one, several in [*zip(alone, ranks["plain"], strict=True), (alone[1], fused)]:
        assert one["name"] == several["name"] and one["eval_tokens"] == several["eval_tokens"]
        for key in ("train_loss", "eval_loss"):
            assert several[key] == pytest.approx(one[key], rel=LOSS)
