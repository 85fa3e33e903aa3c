"""Studies: every row is a valid configuration of its own, and one runs to its end; routes against known shares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mka_megatron.benchmark import routing
from mka_megatron.benchmark.ablation import STUDIES, cells, decode
from mka_megatron.benchmark.cells import Budget, run_cells
from mka_megatron.benchmark.model import get_model
from mka_megatron.config.errors import ConfigError
from tests.helpers.benchmarks import TOKENS, overrides


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return overrides(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", STUDIES)
def test_rows_differ_in_one_thing(name: str) -> None:
    found = cells(name, (3,), [], 1)
    assert [cell.name for cell in found] == list(STUDIES[name].rows)
    assert len({cell.config for cell in found}) == len(found), "two rows are the same model"
    assert {cell.config.training.seed for cell in found} == {3}
    assert len({cell.config.data for cell in found}) == 1, "rows of a study must see the same batches"
    assert all(cell.config.model == found[0].config.model for cell in found)


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(ConfigError, match="tears"):
        cells("tears", (0,), [], 1)


def test_tiers_are_trained_and_timed(small, topology, tmp_path) -> None:
    more = [*small, "memory_hierarchy.l1.window=64"]
    rows = run_cells(cells("block-tiers", (0,), more, 1), Budget(TOKENS, split="valid"), topology, baseline="L1", output=tmp_path, extra=decode)
    assert [row["name"] for row in rows] == ["L1", "L1+L2", "L1+L3", "L1+L2+L3"]
    assert len({row["data_sha256"] for row in rows}) == 1 and len({row["eval_loss"] for row in rows}) == 4
    assert all(row["decode_ms_per_token"] > 0 for row in rows)
    header = (tmp_path / "table.md").read_text().splitlines()[0]
    for column in ("perplexity", "train s", "tokens/s", "decode ms/token"):
        assert column in header


def test_routes_of_a_fixed_gate(small, topology, tmp_path) -> None:
    """Uniform over the levels that have something in them: L3 needs a complete chunk before the token's own."""
    fixed = [*small, "routing.mode=fixed", "memory_hierarchy.l3={enabled: true, recalled_chunks: 2}", "data.sequence_length=512"]
    (tmp_path / "prose.txt").write_text("It was a dark and stormy night. " * 2000)
    with get_model("fastmka", overrides=fixed, topology=topology) as model:
        tasks = routing.tasks_of(model, {"prose": tmp_path / "prose.txt"})
        # prompts shorter than the row: padding must not be counted
        found = routing.analyse(model, tasks)
        routing.write(found, model.config, tmp_path / "out")
    assert list(found) == ["held-out", "passkey", "prose"]
    for routes in found.values():
        assert routes.levels == ("L1", "L2", "L3") and routes.shares.shape == (2, routing.BUCKETS, 3)
    # 512 slots in 16 buckets of 32, and chunks of 32: the first bucket is the first chunk
    prose = found["prose"].shares
    np.testing.assert_allclose(prose[:, :1, 2], 0)
    np.testing.assert_allclose(prose[:, 1:], 1 / 3, rtol=1e-6)
    assert len(found["prose"].samples[0]) == 512 * len([row for batch in tasks["prose"] for row in batch.tokens])
    written = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert np.allclose(written["tasks"]["prose"]["shares"], prose)
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_a_model_without_a_gate_has_no_routes(small, topology) -> None:
    with get_model("gqa", overrides=small, topology=topology) as model, pytest.raises(ConfigError, match="gqa"):
        routing.analyse(model, {})
