"""DeepSpeed's compiled ops that a run needs: `python -m mka_megatron.training.ops` builds them ahead of time.

DeepSpeed compiles an op when it is first used, a minute or more each, and a build that is killed leaves a
lock at which every later start waits for ever.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import EngineConfig
from mka_megatron.memory.tiers.builds import stale_lock


def names(engine: EngineConfig, on_cuda: bool, pages_on_ssd: bool = False) -> tuple[str, ...]:
    """Ops that this configuration uses; async_io loads pin_memory before itself."""
    swaps = _swaps(engine) or pages_on_ssd
    fused = on_cuda and engine.offload_optimizer == "none"
    return ("pin_memory", "async_io") * swaps + ("fused_adam",) * fused


def check(engine: EngineConfig, on_cuda: bool, pages_on_ssd: bool = False) -> None:
    """Refuse what would hang or fail later.

    Args:
        pages_on_ssd: L3's pages may go to an SSD, for which plain reads and writes serve where libaio is missing.

    Raises:
        ConfigError: NVMe offload without libaio, or a lock that a killed build left behind.
    """
    for name in names(engine, on_cuda, pages_on_ssd):
        if name == "async_io" and _swaps(engine) and not _builder(name).is_compatible(verbose=False):
            raise ConfigError(
                "engine.offload_optimizer or engine.offload_param is nvme, but libaio's header is missing: install "
                "libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora), or offload to cpu."
            )
        lock = stale_lock(name)
        if lock is not None:
            raise ConfigError(f"a build of DeepSpeed's {name} was killed and left {lock}: remove that file.")


def _swaps(engine: EngineConfig) -> bool:
    return "nvme" in (engine.offload_optimizer, engine.offload_param)


def build(name: str) -> str:
    """Build one op; returns `built`, or why it cannot be."""
    lock = stale_lock(name)
    if lock is not None:
        lock.unlink()
    builder = _builder(name)
    if not builder.is_compatible(verbose=False):
        return "not available here (a header or compiler is missing)"
    builder.load(verbose=False)
    return "built"


def _builder(name: str) -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder, FusedAdamBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    builders = {"async_io": AsyncIOBuilder, "fused_adam": FusedAdamBuilder, "pin_memory": PinMemoryBuilder}
    return builders[name]()


if __name__ == "__main__":
    for each in ("pin_memory", "async_io") + ("fused_adam",) * torch.cuda.is_available():
        print(f"{each}: {build(each)}", flush=True)
    sys.exit(0)
