"""Kill random ranks of a tiny run with SIGKILL, again and again: it must end with the bits of a run left alone.

    python tools/kill_drill.py --kills 100 --seed 0 --directory /tmp/kill_drill [section.key=value ...]

Two gloo ranks under ZeRO-1 train about 100,000 parameters under torchrun's elastic agent, which starts them again after
each kill. The seed fixes each kill's rank, moment (while they start, prepare the data, take a step, write a checkpoint)
and delay. Then every tensor of the last checkpoint (weights, optimizer, random generators) is compared with that of an
uninterrupted run, and so are all losses and evaluations. The same command goes on with a drill that was interrupted.
Exit codes: 0 equal; 1 not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from mka_megatron.drills.compare import compare
from mka_megatron.drills.kills import DrillError, deliver, plan
from mka_megatron.drills.tiny import Run, evaluations, finished, losses, overrides

SAVE_INTERVAL = 4
STEPS_PER_KILL = 8
"""More than a start of the ranks gets through before it is struck."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True, help="for both runs and their logs")
    parser.add_argument("overrides", nargs="*", help="configuration keys of both runs")
    options = parser.parse_args()
    folder: Path = options.directory.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    steps = STEPS_PER_KILL * (options.kills + 1)
    began = time.monotonic()
    try:
        met = drill(folder, options.kills, options.seed, steps, options.overrides)
    except DrillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"kills: {sum(met.values())} ({', '.join(f'{count} {name}' for name, count in met.most_common())})")
    return verdict(folder, steps, time.monotonic() - began)


def drill(folder: Path, kills: int, seed: int, steps: int, keys: list[str]) -> Counter[str]:
    """Both runs, as far as they are not done; returns what the kills met."""
    if not finished(folder / "alone"):
        with Run(folder, "alone", [*overrides(folder, "alone", steps, SAVE_INTERVAL), *keys]) as run:
            if run.process.wait():
                raise DrillError(f"the uninterrupted run failed; its log is {run.log}.")
    book = folder / "kills.jsonl"
    done = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    met = Counter(line["met"] for line in done)
    if finished(folder / "killed"):
        return met
    left = plan(kills, seed)[len(done) :]
    arguments = [*overrides(folder, "killed", steps, SAVE_INTERVAL), *keys]
    with Run(folder, "killed", arguments, max_restarts=len(left) + 50) as run, book.open("a", buffering=1) as file:
        for number, doing in enumerate(deliver(run, left, run.cache), len(done) + 1):
            file.write(json.dumps({"kill": number, "met": doing}) + "\n")
            print(f"kill {number}/{kills}: {doing}, after step {run.steps()} of {steps}", flush=True)
            met[doing] += 1
        if run.process.wait():
            raise DrillError(f"the run ended with {run.process.returncode} after the last kill; its log is {run.log}.")
    return met


def verdict(folder: Path, steps: int, seconds: float) -> int:
    """Compare the two runs and say so; returns the exit code."""
    alone, killed = folder / "alone", folder / "killed"
    last = Path("checkpoints", f"step-{steps:08d}")
    found = compare(alone / last, killed / last)
    same_losses = losses(alone) == losses(killed) and len(losses(alone)) == steps
    same_evaluations = evaluations(alone) == evaluations(killed)
    print(f"last checkpoint: {found.tensors} tensors, {found.bytes:,} bytes in {found.files} files: "
          + ("bitwise equal" if not found.different else f"different: {', '.join(found.different[:5])}"))  # fmt: skip
    print(f"losses and gradient norms of {steps} steps: {'bitwise equal' if same_losses else 'different'}; "
          f"{len(evaluations(alone))} evaluations: {'equal' if same_evaluations else 'different'}; {seconds:.0f} s")  # fmt: skip
    return 0 if same_losses and same_evaluations and not found.different else 1


if __name__ == "__main__":
    sys.exit(main())
