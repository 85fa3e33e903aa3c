"""Vary one thing of MKA at a time: tiers, routing, summaries, decays, fusion, hashing, recall, window, chunks.

    python tools/ablate.py --study tiers,routing --seeds 0,1,2
    python tools/ablate.py --list

Each choice is the benchmark's small GPT, trained on the same rows as the study's other choices and evaluated on the
validation half of the held-out documents (tools/benchmark.py reports the other half). Losses are compared with the first
choice's, seed by seed. Decoding is timed after a prompt of 256 tokens. Under torchrun the ranks share each batch.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mka_megatron.config.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--study", default="all", help="all, or some of --list, with commas")
    made.add_argument("--seeds", default="0,1", help="of weights and data order (default 0,1)")
    made.add_argument("--tokens", type=int, default=204_800, help="slots of the training rows (default %(default)s)")
    made.add_argument("--epochs", type=int, default=1, help="passes over them")
    made.add_argument("--learning_rate", type=float, help="its peak (default 4e-3)")
    made.add_argument("--no-decode", action="store_true", help="do not time generation")
    made.add_argument("--output", type=Path, default=Path("runs/ablations"), help="a directory for each study (%(default)s)")
    made.add_argument("--list", action="store_true", help="the studies and their choices")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="over everything else")
    arguments = made.parse_args(argv)
    seeds = tuple(int(part) for part in arguments.seeds.split(",") if part.isdigit())
    if not seeds or len(seeds) != len(arguments.seeds.split(",")):
        made.error(f"--seeds is {arguments.seeds!r}: give numbers separated by commas")
    try:
        return run(arguments, seeds)
    except ConfigError as error:
        from mka_megatron.training.__main__ import refused  # a launcher ends all ranks with the first to end

        return refused(error, int(os.environ.get("RANK", 0)), 2)


def run(arguments: argparse.Namespace, seeds: tuple[int, ...]) -> int:
    """All studies asked for. Raises ConfigError."""
    from mka_megatron.benchmark.ablation import STUDIES, cells, decode
    from mka_megatron.benchmark.cells import Budget, run_cells
    from mka_megatron.benchmark.world import local_ranks, world, world_size
    from mka_megatron.training.host import use_cores

    if arguments.list:
        for name, study in STUDIES.items():
            print(f"{name} ({study.attention_type}): {'; '.join(study.rows)}")
        return 0
    names = list(STUDIES) if arguments.study == "all" else arguments.study.split(",")
    planned = {name: cells(name, seeds, arguments.overrides, world_size()) for name in names}
    use_cores(local_ranks())
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a line for every profile of a token
    topology = world(planned[names[0]][0].config.parallel)
    budget = Budget(arguments.tokens, arguments.epochs, arguments.learning_rate, "valid")
    for name in names:
        if topology.rank == 0:
            print(f"### {name} ({STUDIES[name].attention_type})\n", flush=True)
        run_cells(
            planned[name], budget, topology, baseline=planned[name][0].name, output=arguments.output / name,
            extra=None if arguments.no_decode else decode,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
