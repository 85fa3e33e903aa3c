"""Worker: the benchmark on all ranks, with every preparation of data noted.

python -m torch.distributed.run --nproc_per_node=2 benchmark_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import mka_megatron
from mka_megatron.data import prepare
from tests.helpers.benchmarks import TOKENS, overrides


def main(directory: Path) -> None:
    rank = int(os.environ["RANK"])
    for name in ("train_bpe", "write_dataset"):
        note(name, rank, directory / "prepared.txt")
    options = {"tokens": TOKENS, "overrides": overrides(directory / "cache"), "distributed": True}
    plain = mka_megatron.run_benchmark(["gqa", "fmka", "blockmka"], output=directory / "out", **options)
    sharded = mka_megatron.run_benchmark(["fmka"], zero_stage=2, gradient_accumulation_steps=2, **options)
    (directory / f"rank{rank}.json").write_text(json.dumps({"plain": plain, "sharded": sharded}))


def note(name: str, rank: int, path: Path) -> None:
    """Have calls of a function of `prepare` leave a line in `path`."""
    real = getattr(prepare, name)

    def noted(*arguments: object, **more: object) -> object:
        with path.open("a") as file:
            file.write(f"{name} {rank}\n")
        return real(*arguments, **more)

    setattr(prepare, name, noted)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
