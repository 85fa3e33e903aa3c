"""Before anything is started: does the planned run fit into this host?

Refuses only what cannot work: no reserve is taken off, and a figure that is not known is not checked. Starts no process
group and touches no device memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.planning.cluster import CPU, GIB, Cluster, Gpu, gpu_by_name
from mka_megatron.planning.plan import Plan, make_plan, vocabulary
from mka_megatron.planning.report import refusal

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_LEAST_VOCABULARY = 32_000
"""Of a tokenizer that has not been read yet."""


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
    folders = {engine.nvme_path} if "nvme" in (engine.offload_optimizer, engine.offload_param) else set()
    if memory.l3.placement == "ssd":
        folders.add(memory.ssd_spill_path)
    disks = {_existing(Path(folder)).stat().st_dev: Path(folder) for folder in folders if folder is not None}
    cluster = Cluster(
        _device(), per_node, nodes, memory_bytes(),
        sum(map(disk_bytes, disks.values())) if disks else None, reserves=False,
    )
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


def memory_bytes() -> int:
    """Of this host, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def disk_bytes(folder: Path) -> int:
    """Free for a run that writes to `folder`, what a run before has left there included: that is written over."""
    left = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return shutil.disk_usage(_existing(folder)).free + left


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
