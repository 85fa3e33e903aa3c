"""Traces of chosen steps: torch.profiler Chrome traces and CUDA memory snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mka_megatron.config.errors import refuse

_MAX_MEMORY_EVENTS = 100_000


def check(memory_snapshot_steps: tuple[int, ...], device: torch.device) -> None:
    """Raise ConfigError when memory snapshots are asked for on a device that has none."""
    if memory_snapshot_steps and device.type != "cuda":
        raise refuse(
            "logging.memory_snapshot_steps",
            list(memory_snapshot_steps),
            f"memory snapshots need a CUDA device and this run is on {device.type}; leave the key empty",
        )


@contextmanager
def step_profile(
    step: int,
    profile_steps: tuple[int, ...],
    memory_snapshot_steps: tuple[int, ...],
    directory: Path,
    rank: int,
) -> Iterator[None]:
    """Trace the body when `step` (counted from 1) is a chosen one; nothing happens otherwise.

    Writes `directory`/step_<step>_rank<rank>.json (open it in Perfetto or chrome://tracing) and
    .pickle (drop it on pytorch.org/memory_viz): every rank its own.
    """
    traced, snapshot = step in profile_steps, step in memory_snapshot_steps
    if not traced and not snapshot:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"step_{step:07d}_rank{rank}"
    if snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
    try:
        if traced:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities, record_shapes=True) as trace:
                yield
            trace.export_chrome_trace(f"{stem}.json")
        else:
            yield
    finally:
        if snapshot:
            torch.cuda.memory._dump_snapshot(f"{stem}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
