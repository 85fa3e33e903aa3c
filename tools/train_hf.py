"""Fine-tune a Qwen or Llama model of Hugging Face with memory levels, on transformers' own model code.

    python tools/train_hf.py CONFIG.yaml [key=value ...] [--eval-ppl]
    bash launch/launch_dp_torchrun.sh CONFIG.yaml NPROC [key=value ...] [--eval-ppl]

Progress goes to stderr; the result, as JSON, to stdout and to output_dir/metrics.json. SIGTERM, SIGINT and SIGUSR1 finish
the step, save and exit with 0; the same command goes on. Exit codes: 0 finished, or interrupted and saved; 1 failed;
2 wrong configuration, data or checkpoint, which one sentence on stderr says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings

import yaml

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.fine_tune import FineTuneConfig, load_fine_tune
from mka_megatron.config.reference import fine_tune_help

OPTIONS = """
options:
  --eval-ppl        held-out perplexity before and after (eval_ppl=true)
  --help, -h        this text
  --print-config    print the merged configuration as YAML and exit
"""
WAIT_FOR_RANK_0 = 10.0


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    if {"--help", "-h"} & set(arguments):
        if rank == 0:
            print(f"{__doc__}\n{fine_tune_help()}{OPTIONS}")
        return 0
    try:
        if "--print-config" in arguments:
            config = parse(arguments, offline=True)
            if rank == 0:
                print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
            return 0
        return run(parse(arguments))
    except ConfigError as error:  # of data too
        return refused(error, rank, 2)


def parse(arguments: list[str], offline: bool = False) -> FineTuneConfig:
    """The configuration that the arguments describe, without looking at a hub if `offline`. Raises ConfigError."""
    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument == "--eval-ppl":
            overrides.append("eval_ppl=true")
        elif argument != "--print-config":
            if argument.startswith("-"):
                raise ConfigError(f"{argument} is not an option; write key=value, or see --help.")
            (overrides if "=" in argument else paths).append(argument)
    world_size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None if offline else 1
    if offline:
        return load_fine_tune(paths, overrides, world_size)
    load_fine_tune(paths, overrides, world_size)  # refuses what it can before transformers is imported
    from mka_megatron.hf.training_model import locate

    return load_fine_tune(paths, overrides, world_size, locate)


def run(config: FineTuneConfig) -> int:
    """Fine-tune; returns the exit code. Raises ConfigError, DataError."""
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")  # Megatron's data reader, of what it lacks
    from mka_megatron.hf.training import NonFiniteError, fine_tune

    rank = int(os.environ.get("RANK", 0))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries say is not the result
            metrics = fine_tune(config)
    except NonFiniteError as error:
        return refused(error, rank, 1)
    if rank == 0:
        print(json.dumps(metrics, indent=2), flush=True)
    return 0


def refused(error: Exception, rank: int, code: int) -> int:
    """Say it once; returns `code`. torchrun ends all ranks with the first: the others wait for rank 0 to be it."""
    if rank == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(WAIT_FOR_RANK_0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
