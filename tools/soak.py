"""Train a tiny model for minutes under random events, and say whether anything grew that should not.

    python tools/soak.py --minutes 10 --seed 0 --directory /tmp/soak [section.key=value ...]

Two gloo ranks under torchrun's elastic agent. Every 15 to 50 s one of: nothing; SIGUSR1, on which the run saves and ends,
and is started again with other logging keys; kill -9 of a rank; a rank stopped for three seconds; a checkpoint that
cannot be written because a file may not grow. Every half second the memory, open files and threads of each rank are
read; a process is judged by the least it held in the first and in the second half of its life. At the end the newest
checkpoint must be intact and losses.jsonl without a gap. Exit codes: 0 nothing grew; 1 something did, or the run failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mka_megatron.drills.kills import DrillError
from mka_megatron.drills.soak import soak
from mka_megatron.drills.tiny import losses, overrides
from mka_megatron.training import manifest

STEPS, SAVE_INTERVAL = 1_000_000, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True, help="an empty one, for the run and its log")
    parser.add_argument("overrides", nargs="*", help="configuration keys of the run")
    options = parser.parse_args()
    folder: Path = options.directory.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def arguments(keys: Sequence[str]) -> list[str]:
        return [*overrides(folder, "soak", STEPS, SAVE_INTERVAL), *keys, *options.overrides]

    try:
        found = soak(folder, arguments, 60 * options.minutes, options.seed, lambda text: print(text, flush=True))
    except DrillError as error:
        print(error, file=sys.stderr)
        return 1
    problems = found.problems()
    newest = max((folder / "soak" / "checkpoints").glob("step-*"))
    if manifest.verify(newest).step != found.steps:
        problems.append(f"the newest checkpoint is {newest.name}, but {found.steps} steps were taken")
    if [step for step, _, _ in losses(folder / "soak")] != list(range(1, found.steps + 1)):
        problems.append("losses.jsonl has a gap")
    print(f"events: {', '.join(f'{count} {event}' for event, count in found.events.most_common())}")
    print(f"{found.steps} steps, {len(found.samples)} processes, {len(found.growth())} of them judged; "
          f"disk {found.disk[0]:,} bytes at the first event, {found.disk[-1]:,} at the last")  # fmt: skip
    for before, after in found.growth():
        print(f"  memory {before.rss / 2**20:.1f} -> {after.rss / 2**20:.1f} MiB, open files {before.files} -> {after.files}, "
              f"threads {before.threads} -> {after.threads}")  # fmt: skip
    print("nothing grew" if not problems else "; ".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
