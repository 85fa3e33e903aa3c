"""One step of chosen ranks of a large world on this machine, and checks of the whole world; no GPU, no data, no weights.

    python tools/dry_run.py configs/run/qwen2.5-7b_256k.yaml training.global_batch_size=64 --ranks 512
    python tools/dry_run.py configs/run/qwen2.5-7b_256k.yaml parallel.context_parallel=8 --ranks 512 --all-corners

Every chosen rank is a process with PyTorch's fake process group, in which a collective returns at once: the project's own
groups, model and engine, built and stepped with tensors that have shapes but no data. docs/dry_run.md says what is
checked, and what a dry run cannot show. Exit codes: 0 all is well; 1 something is wrong, named on stderr; 2 the
configuration is.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import sys
import time
import warnings
from pathlib import Path

from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.load import load_config
from mka_megatron.training.host import available_cores, quiet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files, and overrides a.b=value")
    parser.add_argument("--ranks", type=int, required=True, help="of the world")
    parser.add_argument("--rank", type=int, action="append", help="to run, may be repeated (default: the corners)")
    parser.add_argument("--all-corners", action="store_true", help="every place of the first and of the last replica")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=available_cores(), help="ranks at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the findings here too")
    options = parser.parse_intermixed_args(argv)
    quiet()
    try:
        return run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    for name in ("ranks", "ranks_per_node", "jobs"):
        if getattr(options, name) < 1:
            raise refuse(f"--{name.replace('_', '-')}", getattr(options, name), "it must be at least 1")
    if options.json and not options.json.absolute().parent.is_dir():
        raise refuse("--json", str(options.json), "its directory does not exist; make it, or give another path")
    paths = [each for each in options.config if "=" not in each]
    overrides = [each for each in options.config if "=" in each]
    config = load_config(paths, overrides, world_size=options.ranks)

    from mka_megatron.dry_run import checks, rank, report

    config = rank.prepared(config)
    chosen = sorted(set(options.rank or checks.ranks_to_run(config, options.ranks, options.all_corners)))
    outside = [each for each in chosen if not 0 <= each < options.ranks]
    if outside:
        raise ConfigError(f"--rank is {outside[0]}: the world's ranks are 0 to {options.ranks - 1}.")
    tasks = [(config, each, options.ranks, options.ranks_per_node) for each in chosen]
    # a process for each: what Megatron and DeepSpeed keep globally belongs to one rank
    with multiprocessing.get_context("fork").Pool(options.jobs, _silence, maxtasksperchild=1) as pool:
        whole = pool.apply(rank.whole_model, (config, options.ranks_per_node))
        runs, failed = [], []
        for task, answer in [(task, pool.apply_async(rank.run_rank, task)) for task in tasks]:
            try:
                runs.append(answer.get())
            except Exception as error:
                failed.append(f"rank {task[1]} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                print(f"rank {task[1]}: {len(runs[-1].step)} collectives, {runs[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    found = failed or checks.problems(config, runs, whole, options.ranks, options.ranks_per_node)
    parameters = sum(report.elements(each.shape) for each in whole if each.trained)
    if runs:
        print(report.header(config, runs, parameters, options.ranks))
        print(report.table(runs))
    print(f"{len(runs)} ranks run, {len(found)} problems, {time.perf_counter() - began:.0f} s")
    for each in found:
        print(each, file=sys.stderr)
    if options.json and runs:
        data = report.as_data(runs, parameters, time.perf_counter() - began) | {"problems": found}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 1 if found else 0


def _silence() -> None:
    """The libraries' advice is for ranks that exist; DeepSpeed's collections of garbage pass over what was there before."""
    gc.freeze()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
