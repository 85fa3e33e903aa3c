"""The host: processor cores per rank, memory in use, and the versions that a run depends on."""

from __future__ import annotations

import os
import platform
import resource
import warnings
from importlib import metadata
from pathlib import Path

import torch

_GIB = float(1 << 30)
_PACKAGES = ("mka-megatron", "torch", "megatron-core", "deepspeed", "transformers", "numpy")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def quiet() -> None:
    """Hide what Megatron and PyTorch warn of that nobody here can change; call it before Megatron is imported."""
    for message in (
        ".*[Aa]pex.*", ".*Transformer Engine.*", "full scope is deprecated.*", "When using async grad allreduce.*",
        "`torch.distributed.all_gather_into_tensor` is deprecated.*",
        "`torch.distributed.reduce_scatter_tensor` is deprecated.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)


def use_cores(local_world_size: int) -> int:
    """Give this rank its share of the cores, unless OMP_NUM_THREADS says otherwise; returns the thread count.

    Left alone, torchrun gives every rank one thread (by setting OMP_NUM_THREADS to 1), and PyTorch a single
    process in a container one per core of the whole machine.
    """
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is None or (local_world_size > 1 and wanted == "1"):
        torch.set_num_threads(max(1, available_cores() // local_world_size))
    return torch.get_num_threads()


def available_cores() -> int:
    """Cores this process may use, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, int(quota) // int(period)))


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB by torchtitan's names (CUDA), or `max_resident` on a CPU."""
    if device.type == "cuda":
        return {
            "max_active": torch.cuda.memory_stats(device)["active_bytes.all.peak"] / _GIB,
            "max_reserved": torch.cuda.max_memory_reserved(device) / _GIB,
        }
    return {"max_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
