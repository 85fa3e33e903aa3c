"""A thousand mutated configurations: each is taken, or refused in one sentence, in time and in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.cases import Case
from tests.fuzz.config_fuzz import fault

ROOT = Path(__file__).parents[3]


def test_a_thousand_mutations() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.fuzz.config_fuzz", "--count", "1000"], cwd=ROOT, capture_output=True, text=True,
                         timeout=900)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["cases"] == 1000 and found["faults"] == 0
    assert found["valid"] > 100 and found["refused"] > 500, "a fuzzer that makes one kind only shows little"


@pytest.mark.parametrize(("message", "wrong"), [
    ("training.steps is 0: it must be at least 1.", None),
    ("x.yaml line 3 is not valid YAML: a tab.", None),
    ("training.steps is 0: it must be at least 1", "sentence"),
    (" training.steps is 0.", "sentence"),
    ("training.steps is 0:\nit must be at least 1.", "line breaks"),
    ("KeyError.", "names no key"),
    ("training.steps is " + "9" * 600 + ".", "characters"),
])
def test_what_counts_as_one_sentence(message: str, wrong: str | None) -> None:
    found = fault(message, Case("run", names={"x.yaml"}))
    assert found is None if wrong is None else wrong in (found or "")
