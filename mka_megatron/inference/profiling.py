"""Where the time of a forward pass goes, and how many operations it takes, by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from mka_megatron.memory.generation import Generation
from mka_megatron.model.gpt import GPT

_PASS, _ATTENTION, _CORE = "mka: pass", "mka: attention", "mka: core"
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")


@dataclass(frozen=True)
class Profile:
    """Of one or more passes; of the device's time where that is a GPU, of the host's otherwise."""

    seconds: float
    attention: float
    """Of these in the attention layers, projections included."""
    core: float
    """Of these between the projections and gates and the output projection: recall, fusion, attention, memory."""
    calls: int
    """Kernel launches on a GPU, else operators called (those called by operators not counted)."""

    def __add__(self, other: Profile) -> Profile:
        return Profile(
            self.seconds + other.seconds, self.attention + other.attention, self.core + other.core,
            self.calls + other.calls,
        )  # fmt: skip


NOTHING = Profile(0.0, 0.0, 0.0, 0)


def profiled(model: GPT, memory: Generation, call: Callable[[], object]) -> Profile:
    """Profile `call`, which gives `model` tokens with `memory`."""
    on_cuda = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with _marked(model, memory), profile(activities=activities) as trace, record_function(_PASS):
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CPU]

    def seconds(name: str) -> float:
        times = (e.device_time_total if on_cuda else e.cpu_time_total for e in events if e.name == name)
        return sum(times) / 1e6

    calls = sum(e.name.startswith(_LAUNCHES) if on_cuda else _called(e) for e in events)
    return Profile(seconds(_PASS), seconds(_ATTENTION), seconds(_CORE), calls)


def _called(event: Any) -> bool:
    """An operator that no other one called."""
    return "::" in event.name and (event.cpu_parent is None or "::" not in event.cpu_parent.name)


@contextmanager
def _marked(model: GPT, memory: Generation) -> Iterator[None]:
    """Attention layers, and what the memory does in them, are ranges of the trace."""
    open_ranges: list[record_function] = []

    def begin(*_: object) -> None:
        open_ranges.append(record_function(_ATTENTION))
        open_ranges[-1].__enter__()

    def end(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    plain = memory.attend

    def attend(*arguments: Any) -> Tensor:
        with record_function(_CORE):
            return plain(*arguments)

    hooks = []
    for layer in model.decoder.layers:
        hooks += [
            layer.self_attention.register_forward_pre_hook(begin),
            layer.self_attention.register_forward_hook(end),
        ]
    memory.attend = attend  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del memory.attend  # the class's own shows again
        for hook in hooks:
            hook.remove()
