"""A thousand random faults: every answer of the store is right or a refusal. Longer: tests/helpers/tier_drill.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_no_fault_gives_wrong_numbers(tmp_path: Path, aio: str | None) -> None:
    # a process of its own: DeepSpeed's way of refusing is to abort
    command = [sys.executable, "-m", "tests.helpers.tier_drill", "--faults", "1000", "--seed", "0"]
    command += ["--backends", "plain" if aio else "plain,aio", "--directory", str(tmp_path)]
    command += ["--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (tmp_path / "report.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wrong"] == [] and report["faults"] >= 1000
    told, by_kind = report["told"], report["by_kind"]
    # what strikes a page that is on the disk alone, as most are, is always told of; the rest often
    for kind in ("flip_bit", "break_header", "lose_sector", "truncate", "delete", "swap", "stale_generation", "other_run",
                 "full budget", "write fails"):  # fmt: skip
        assert by_kind[kind] > 20 and told[kind] > 0.9 * by_kind[kind], (kind, told, by_kind)
    for kind in (f"{way} {fault}" for way in ("read", "write") for fault in ("flips a bit", "does nothing")):
        assert told[kind] > 5, (kind, told, by_kind)
    assert by_kind["kill"] >= 5 and told["full disk"] > 20
