"""Worker: what rank 0 of eight sends per group in a step, by a dry run of the real model and engine.

python dry_traffic.py OUT.json CASES.json, the cases {name: overrides}.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from typing import Any
from unittest import mock

from mka_megatron.config.load import load_config
from mka_megatron.dry_run import rank
from mka_megatron.dry_run.rank import prepared, record_step, run_rank

RANK, RANKS = 0, 8


def third_step(*arguments: Any) -> Any:
    """ZeRO-3 traces the first, in which it gathers more, and has the ranks agree on it in the second."""
    for _ in range(2):
        record_step(*arguments)
    return record_step(*arguments)


def sent(overrides: list[str]) -> dict[str, int]:
    """Bytes by the first group that has the collective's ranks."""
    config = prepared(load_config([], overrides, world_size=RANKS))
    with mock.patch.object(rank, "record_step", third_step if config.engine.zero_stage == 3 else record_step):
        run = run_rank(config, RANK, RANKS, RANKS)
    found: Counter[str] = Counter()
    for collective, count in zip(run.step, run.counts, strict=True):
        group = next(name for name in ("tensor", "replicas", "context") if run.groups[name] == collective.ranks)
        found[group] += count * collective.sent(RANK)
    return dict(found)


if __name__ == "__main__":
    gc.freeze()  # DeepSpeed collects garbage seven times a case: not through all that was imported
    with open(sys.argv[2]) as file:
        cases = json.load(file)
    results = {name: sent(overrides) for name, overrides in cases.items()}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
