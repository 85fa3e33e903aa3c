"""Before anything is started: does the planned run fit into this host?

Refuses only what cannot work: no reserve is taken off, and a figure that is not known is not checked. Starts no process
group and touches no device memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.planning.cluster import CPU, GIB, Cluster, Gpu, gpu_by_name
from mka_megatron.planning.plan import Plan, make_plan, vocabulary
from mka_megatron.planning.report import refusal

SWAPPED, SPILLED = "run-*", "mka-pages-*"
"""What runs leave under engine.nvme_path (training/deepspeed_config.py) and ssd_spill_path (memory/tiers/ownership.py)."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LEAST_VOCABULARY = 256
"""Of a tokenizer that has not been read yet: one of bytes."""


def check_capacity(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a run that cannot fit into this host.

    Args:
        config: validated for WORLD_SIZE ranks.
        environment: WORLD_SIZE, LOCAL_WORLD_SIZE (1 where they are not there) and RANK, as torchrun sets them. Nodes
            that differ in their number of ranks are not checked.

    Raises:
        ConfigError: one sentence with the memory that is too small, its largest part, need, have, and the fix.
    """
    world, local = (int(environment.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world % local:
        return
    plan = host_plan(config, local, world // local)
    if plan.shortages:
        # rank 0 looks for the fix; another is heard only where rank 0 has nothing to say
        fix = "this node has less than that of rank 0" if int(environment.get("RANK", 0)) else None
        raise ConfigError(refusal(plan, fix).removesuffix(".") + " (--no-plan starts it all the same).")


def host_plan(config: Config, per_node: int, nodes: int) -> Plan:
    """The plan on `nodes` like this one, of `per_node` ranks each."""
    engine, memory = config.engine, config.memory_hierarchy
    folders: list[tuple[Path, str]] = []
    if engine.nvme_path is not None and "nvme" in (engine.offload_optimizer, engine.offload_param):
        folders.append((Path(engine.nvme_path), SWAPPED))
    if memory.ssd_spill_path is not None and memory.l3.placement == "ssd":
        folders.append((Path(memory.ssd_spill_path), SPILLED))
    cluster = Cluster(_device(), per_node, nodes, memory_bytes(), disk_bytes(folders) if folders else None, reserves=False)
    vocab_size, assumed = vocabulary(config)
    if assumed and config.data.tokenizer is not None:
        vocab_size = _LEAST_VOCABULARY
    return make_plan(config, cluster, vocab_size)


def _device() -> Gpu:
    """This host's first GPU, with the memory that it reports; CPU where there is none."""
    if not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(0)
    known = gpu_by_name(properties.name) or Gpu(properties.name, properties.name, 100.0, 0.0, 1000, 32, 12.5)
    return replace(known, memory_gib=properties.total_memory / GIB)


def memory_bytes() -> int | None:
    """Of this host, or of the container where that has less; None where the host does not say."""
    found = []
    with suppress(OSError, ValueError):  # a name that this system has not
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # no container, or "max"
        found.append(int(_CGROUP_LIMIT.read_text()))
    return min((size for size in found if size > 0), default=None)


def disk_bytes(folders: Sequence[tuple[Path, str]]) -> int | None:
    """Free for a run that writes to `folders`; None where it may not look.

    Each comes with the pattern of what runs write there: what a run before has left is free too, for it is written over or
    removed.
    """
    try:
        left = sum(_size(file) for folder, pattern in folders for run in folder.glob(pattern) for file in run.rglob("*"))
        places = {place.stat().st_dev: place for place in (_existing(folder) for folder, _ in folders)}
        return left + sum(shutil.disk_usage(place).free for place in places.values())
    except OSError:
        return None


def _size(file: Path) -> int:
    """0 where another rank has just removed it."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
