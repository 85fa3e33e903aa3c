"""`python -m mka_megatron.training [CONFIG.yaml ...] [section.key=value ...]`, also under torchrun.

Exit codes: 0 the run finished, or was interrupted and saved; 1 it failed; 2 the configuration, data or
checkpoint is wrong, which one sentence on stderr says.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time

import yaml

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.reference import help_text
from mka_megatron.config.schema import Config
from mka_megatron.training.interrupt import hold

_OPTIONS = """
options:
  --help, -h        this text
  --print-config    print the merged configuration as YAML and exit
  --no-plan         start even a run that by plan does not fit into this host's memory and disk

Exit codes: 0 finished, or interrupted and saved; 1 failed; 2 wrong configuration, data or checkpoint.
SIGTERM, SIGINT and SIGUSR1 finish the step, save a checkpoint and exit with 0; the same command goes on.
"""
_WAIT_FOR_RANK_0 = 10.0


def main(arguments: list[str]) -> int:
    """Run the command line `arguments`; returns the exit code."""
    signal.signal(signal.SIGUSR1, hold)  # a job's warning that its time is almost up waits for the first step
    rank = int(os.environ.get("RANK", 0))
    if {"--help", "-h"} & set(arguments):
        if rank == 0:
            print(help_text() + _OPTIONS)
        return 0
    try:
        config = parse(arguments)
    except ConfigError as error:
        return refused(error, rank, 2)
    if "--print-config" in arguments:
        if rank == 0:
            print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")
        return 0
    if "--no-plan" not in arguments:
        from mka_megatron.training.capacity import check_capacity

        try:
            check_capacity(config)
        except ConfigError as error:
            code = refused(error, rank, 2)
            if rank:  # rank 0, whose host has more, did not end this one
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            return code
    return run(config, rank)


def parse(arguments: list[str]) -> Config:
    """The configuration that the arguments describe; raises ConfigError."""
    paths: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument in ("--print-config", "--no-plan"):
            continue
        if argument.startswith("-"):
            raise ConfigError(f"{argument} is not an option; write section.key=value, or see --help.")
        (overrides if "=" in argument else paths).append(argument)
    return load_config(paths, overrides, world_size=int(os.environ.get("WORLD_SIZE", 1)))


def run(config: Config, rank: int) -> int:
    """Train; returns the exit code."""
    from mka_megatron.training.host import quiet, use_cores

    quiet()
    from mka_megatron.data.batch import DataError
    from mka_megatron.memory.tiers.pages import TierError
    from mka_megatron.training.checkpoint import CheckpointError
    from mka_megatron.training.engine import NonFiniteError
    from mka_megatron.training.loop import RankLostError, train
    from mka_megatron.training.start import PeerFailedError

    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        train(config)
    except (ConfigError, NonFiniteError) as error:  # the same on every rank
        return refused(error, rank, 2 if isinstance(error, ConfigError) else 1)
    except (DataError, CheckpointError) as error:
        print(f"rank {rank}: {error}" if rank else error, file=sys.stderr, flush=True)
        return 2
    except (TierError, RankLostError) as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1
    except PeerFailedError:
        time.sleep(_WAIT_FOR_RANK_0)
        return 2
    return 0


def refused(error: Exception, rank: int, code: int) -> int:
    """Say, once, what is wrong on every rank; returns `code`.

    torchrun ends all ranks with the first: the others wait for rank 0 to be that one.
    """
    if rank == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(_WAIT_FOR_RANK_0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
