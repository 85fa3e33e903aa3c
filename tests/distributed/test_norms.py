"""The reported size and norm of a model do not depend on how it is spread over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import torchrun

WORKER = Path(__file__).with_name("norms_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[float]]:
    out = tmp_path_factory.mktemp("norms") / "norms.json"
    torchrun(WORKER, out, ranks=2, timeout=170)
    return json.loads(out.read_text())


def test_a_whole_replica_counts_itself(found) -> None:
    count, before, after, held, norm = found["replicas"]
    assert count == held
    assert before == pytest.approx(norm, rel=1e-6)
    assert after != before


@pytest.mark.parametrize("layout", ["zero1", "zero3", "tp2", "tp2-sp"])
def test_a_spread_model_reports_the_same(found, layout) -> None:
    count, before, after, _, _ = found["replicas"]
    assert found[layout][0] == count
    assert found[layout][1] == pytest.approx(before, rel=1e-6)
    assert found[layout][2] == pytest.approx(after, rel=1e-6)
    assert found[layout][3] < count or layout == "zero1"
