"""Train the same small GPT with every attention type, on the same rows, and compare.

    python tools/benchmark.py                                              # all types, one seed
    python tools/benchmark.py --seeds 0,1,2 --output runs/benchmark        # mean and standard deviation
    python tools/benchmark.py --attention_type fastmka --num_groups 2 --epochs 2 --learning_rate 2e-3
    python tools/benchmark.py --seq_length 1024,2048,4096                  # tokens/s by type and length
    python tools/benchmark.py --attention_type fastmka,blockmka --routing --routing_text prose=wiki.txt
    torchrun --nproc_per_node=2 tools/benchmark.py
    deepspeed --num_gpus=2 tools/benchmark.py --deepspeed --deepspeed_config zero2.json

The model is Megatron's and the engine DeepSpeed's, as in training. All types get the same seed, rows, number of tokens and,
within 1%, of parameters (the MLP takes what the attention leaves). Held-out documents are divided: choices are made on
one half (tools/ablate.py), this table is of the other. The data are tokenised once, by one rank, and cached.

The loss of training is the mean of its last 10 steps. Memory: on a GPU PyTorch's peak of allocated and of reserved bytes;
on a CPU the growth of resident memory in this run, and its peak, which what earlier runs left counts into.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError

ALL = ("mha", "mqa", "gqa", "mla", "mka", "fastmka", "blockmka")


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    rank = int(os.environ.get("RANK", 0))
    try:
        options = options_of(arguments)
        if not arguments.dry_run:
            return run(arguments, options)
        for length in arguments.seq_length or (None,):
            for seed in arguments.seeds:
                for name in types_of(arguments):
                    print(name, f"seed {seed}", "default length" if length is None else f"length {length}", sep="\t")
    except ConfigError as error:
        return refused(error, rank)
    return 0


def refused(error: ConfigError, rank: int) -> int:
    """Say it once, from rank 0: a launcher ends all ranks with the first, so the others wait for it."""
    from mka_megatron.training.__main__ import refused as refuse

    return refuse(error, rank, 2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--attention_type", default="all", help=f"all, or some of {', '.join(ALL)} (fmka: fastmka), with commas")
    made.add_argument("--num_groups", type=int, help="key/value heads of the types that have groups")
    made.add_argument("--batch_size", type=int, help="rows of an optimizer step, over all ranks (default 2)")
    made.add_argument("--gradient_accumulation_steps", type=int, default=1, help="passes that a rank's rows are cut into")
    made.add_argument("--epochs", type=int, default=1, help="passes over the training rows")
    made.add_argument("--tokens", type=int, default=409_600, help="slots of the training rows (default %(default)s)")
    made.add_argument("--learning_rate", type=float, help="its peak (default 4e-3)")
    made.add_argument("--seq_length", type=lengths, default=(), help="of a row (default 512); several: speed alone, by length")
    made.add_argument("--seeds", type=lengths, default=(0,), help="of weights and data order, one run each (default 0)")
    made.add_argument("--match", default="gqa", help="the type whose number of parameters all get; none: as configured")
    half = made.add_mutually_exclusive_group()
    half.add_argument("--fp16", action="store_true", help="half precision")
    half.add_argument("--bf16", action="store_true", help="bfloat16")
    made.add_argument("--deepspeed", action="store_true", help="shard optimizer states (ZeRO 1, or the file's stage)")
    made.add_argument("--deepspeed_config", type=Path, help="DeepSpeed JSON, merged over ours")
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher; the environment says it too
    made.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="results.json, table.md, plots (%(default)s)")
    made.add_argument("--routing", action="store_true", help="see where the gates send their queries: heat maps, histograms")
    made.add_argument("--routing_text", type=named, action="append", default=[], metavar="NAME=FILE", help="--routing: on this text too")
    made.add_argument("--config", type=Path, action="append", default=[], help="configuration instead of the small GPT's")
    made.add_argument("--dry-run", action="store_true", help="list the runs")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="over everything else")
    return made


def lengths(text: str) -> tuple[int, ...]:
    """`4096,8192` as numbers."""
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas")
    return tuple(int(part) for part in parts)


def named(text: str) -> tuple[str, Path]:
    """`name=file`."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}: give a name and a file, such as prose=book.txt")
    return name, Path(path)


def types_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The attention types asked for. Raises ConfigError for one that does not exist."""
    from mka_megatron.benchmark.settings import attention_type

    return ALL if arguments.attention_type == "all" else tuple(map(attention_type, arguments.attention_type.split(",")))


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `settings.contender`. Raises ConfigError."""
    return {
        "files": [str(path) for path in arguments.config],
        "overrides": arguments.overrides,
        "num_groups": arguments.num_groups,
        "batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "precision": "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else None,
        "zero_stage": zero_stage(arguments),
        "deepspeed_config": None if arguments.deepspeed_config is None else str(arguments.deepspeed_config),
    }


def zero_stage(arguments: argparse.Namespace) -> int | None:
    """None: as configured."""
    if arguments.deepspeed_config is not None:
        from mka_megatron.training.deepspeed_config import requested_stage

        return requested_stage(str(arguments.deepspeed_config)) or (1 if arguments.deepspeed else None)
    return 1 if arguments.deepspeed else None


def run(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    """Train, evaluate, tabulate."""
    from mka_megatron import run_benchmark
    from mka_megatron.benchmark.world import local_ranks
    from mka_megatron.training.host import use_cores

    use_cores(local_ranks())
    run_benchmark(
        types_of(arguments),
        seeds=arguments.seeds,
        sequence_lengths=arguments.seq_length,
        tokens=arguments.tokens,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        match=None if arguments.match == "none" else arguments.match,
        output=arguments.output,
        extra=see_routes(arguments) if arguments.routing else None,
        **options,
    )
    return 0


def see_routes(arguments: argparse.Namespace) -> Callable[[Any, str], dict[str, Any]]:
    """Writes OUTPUT/routing/<type>-seed<n> for each model with a gate."""
    from mka_megatron.benchmark import routing

    def see(model: Any, name: str) -> dict[str, Any]:
        if not model.module.route_statistics():
            return {}
        found = routing.analyse(model, routing.tasks_of(model, dict(arguments.routing_text)))
        if model.topology.rank == 0:
            routing.write(found, model.config, arguments.output / "routing" / f"{name}-seed{model.config.training.seed}")
        return {}

    return see


if __name__ == "__main__":
    sys.exit(main())
