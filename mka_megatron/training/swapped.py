"""Checkpoint state of a ZeRO-3 run whose optimizer or parameters live on NVMe.

DeepSpeed 0.19 resumes such runs wrongly without a word: it copies its swap files, but restores neither
Adam's step counts nor the sub-groups that are too small to swap, which it overwrites with the fresh
model's. So these runs write their state themselves: one file per sub-group (the unit that fits in
memory), holding the fp32 parameters and both moments, and one for the order of the parameters, which the
sub-groups hold one behind the other. The 16-bit parameters follow from the fp32 ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import CheckpointError
from mka_megatron.training.masters import masters, set_state, settle


def applies(engine: Engine) -> bool:
    """Whether this module, not DeepSpeed, writes and reads the engine's state."""
    return "nvme" in (engine.config.engine.offload_optimizer, engine.config.engine.offload_param)


def save(engine: Engine, folder: Path, write: Callable[[Any, Path], None]) -> None:
    """Hand this rank's files to `write(object, path)`, one sub-group in memory at a time."""
    optimizer = engine.deepspeed.optimizer
    for index in range(len(optimizer.fp16_groups)):
        swappable = optimizer._swappable_optimizer_subgroup(index)
        if swappable:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        master = optimizer.fp32_partitioned_groups_flat[index]
        write({"master": master.detach(), **optimizer.optimizer.state[master]}, folder / _group_name(index))
        if swappable:
            optimizer._release_swap_buffers(index)
    write({"param_shapes": _shapes(engine)}, folder / _common_name())


def load(engine: Engine, folder: Path) -> None:
    """Put the saved state into a fresh engine, and on NVMe where it belongs there.

    Raises CheckpointError where the parameters have another order or other shapes.
    """
    common = torch.load(folder / _common_name(), weights_only=True)
    if [list(group.items()) for group in common["param_shapes"]] != [list(group.items()) for group in _shapes(engine)]:
        raise CheckpointError(
            f"checkpoint {folder} has the parameters in another order than this version; resume with the version "
            "that wrote it, or export it and start from that."
        )
    for index, (master, _) in enumerate(masters(engine.deepspeed)):
        saved = torch.load(folder / _group_name(index), map_location="cpu", weights_only=True)
        master.data.copy_(saved.pop("master"))
        if saved:
            steps = float(saved.pop("step"))
            set_state(engine.deepspeed, master, {key: value.to(master.device) for key, value in saved.items()}, steps)
    settle(engine.deepspeed)


def _group_name(index: int) -> str:
    return f"deepspeed/swapped-{dist.get_rank():05d}-{index:05d}.pt"


def _common_name() -> str:
    return f"deepspeed/swapped-{dist.get_rank():05d}.pt"


def _shapes(engine: Engine) -> list[dict[str, list[int]]]:
    """Of the whole parameters, in the order of each group of the optimizer."""
    groups = engine.deepspeed._get_zero_param_shapes()
    return [{name: list(shape) for name, shape in group.items()} for group in groups]
