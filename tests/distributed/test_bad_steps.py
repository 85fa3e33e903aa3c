"""Steps without a finite loss: told of at once with their samples, skipped, and after too many the run stops; a resume
that changes nothing meets them again and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mka_megatron.drills.tiny import overrides
from tests.helpers.launch import ROOT

WORKER = Path(__file__).with_name("bad_step_worker.py")
SEGMENTS = [
    "attention.core=block", "memory_hierarchy.l1.chunk_size=16", "memory_hierarchy.l1.window=32",
    "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2", "data.reset_at_documents=false",
    "data.sequence_length=256", "training.segment_length=64", "training.segments_per_step=2",
]  # fmt: skip
# By case: first and last sample of the batch of steps 3, 6, 7 and 8; a batch in segments takes two steps.
SAMPLES = {
    "whole": {3: (8, 11), 6: (20, 23), 7: (24, 27), 8: (28, 31)},
    "segments": {3: (4, 7), 6: (8, 11), 7: (12, 15), 8: (12, 15)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    config = str(ROOT / "configs" / "run" / "tiny.yaml")
    runs = [
        (str(folder / name), [config, *overrides(folder, name, 12, 7), *more, "training.eval_interval=0"])
        for name, more in (("whole", []), ("segments", SEGMENTS))
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER, folder / "runs.json"], env=environment, cwd=ROOT, capture_output=True,
                          text=True, timeout=400, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def turns(folder: Path, case: str) -> list[dict[str, Any]]:
    return json.loads((folder / case / "told.json").read_text())


@pytest.mark.parametrize("case", SAMPLES)
def test_each_bad_step_is_told_of_with_its_samples(folder: Path, case: str) -> None:
    first = turns(folder, case)[0]
    lines = [line for line in first["printed"].splitlines() if "the step was not applied" in line]
    expected = [(step, streak) for step, streak in zip((3, 6, 7, 8), (1, 1, 2, 3), strict=True)]
    assert len(lines) == 4
    for line, (step, streak) in zip(lines, expected, strict=True):
        low, high = SAMPLES[case][step]
        assert f"step {step}: loss nan" in line
        assert f"bad step {streak} in a row, samples {low} to {high} in data order" in line
    books = [json.loads(line) for line in first["losses"].splitlines()]
    assert [line["step"] for line in books if line["skipped"]] == [3, 6, 7, 8]
    assert {line["step"]: tuple(line["samples"]) for line in books if line["skipped"]} == SAMPLES[case]


@pytest.mark.parametrize("case", SAMPLES)
def test_the_third_in_a_row_stops_the_run_and_a_resume_says_the_same(folder: Path, case: str) -> None:
    first, second, _ = turns(folder, case)
    low, high = SAMPLES[case][6][0], SAMPLES[case][8][1]
    assert (first["code"], second["code"]) == (1, 1)
    assert first["refused"] == second["refused"]
    assert first["refused"].count("\n") == 1
    assert "3 consecutive steps (steps 6 to 8, last loss nan)" in first["refused"]
    assert f"samples {low} to {high} in data order" in first["refused"]
    assert "step-00000007 at step 7" in second["printed"]


@pytest.mark.parametrize("case", SAMPLES)
def test_without_them_it_goes_on_to_the_end(folder: Path, case: str) -> None:
    last = turns(folder, case)[2]
    assert last["code"] == 0, last["refused"]
    metrics = json.loads((folder / case / "metrics.json").read_text())
    assert metrics["finished"] and metrics["resumed_from"] == 7 and metrics["skipped_steps"] == 0


def test_tensorboard_shows_them(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "whole" / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("bad steps in a row")}
    assert points == {3: 1.0, 6: 1.0, 7: 2.0}, "step 8 was taken again, and was good"
