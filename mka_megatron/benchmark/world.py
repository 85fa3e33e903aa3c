"""The ranks of a benchmark: made once for all of its contenders."""

from __future__ import annotations

import atexit
import os
import warnings

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import ParallelConfig
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology

_held: list[tuple[ParallelConfig, Topology]] = []


def world_size() -> int:
    """Ranks that the launcher (torchrun, deepspeed) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_ranks() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, deepspeed's


def world(parallel: ParallelConfig, timeout_seconds: int = 1800) -> Topology:
    """The process groups of this process, made at the first call and torn down when the process ends.

    Raises ConfigError where an earlier contender had another layout.
    """
    if not _held:
        for message in (".*[Aa]pex.*", ".*Transformer Engine.*"):  # Megatron, of what it does not find or need
            warnings.filterwarnings("ignore", message=message)
        _held.append((parallel, groups.initialize(parallel, timeout_seconds)))
        atexit.register(leave)
    known, topology = _held[0]
    if known != parallel:
        raise ConfigError(f"parallel is {parallel}: the ranks of this process are laid out as {known}; start another process.")
    return topology


def leave() -> None:
    """Tear the groups down."""
    if _held:
        _held.clear()
        groups.destroy()
