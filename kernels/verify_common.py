"""What the sections of verify.py share: a check, a timing, a clock.

A section is a module verify_<op>.py beside this one (verify_common*.py are none) with

    checks(device, lengths) -> Iterator[Check]         the op against its reference, S in `lengths`
    launches(device) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]
                                                       small calls of every kernel: run twice, and under the sanitizer
    benchmarks(clock, lengths) -> Iterator[Timing]     S in `lengths`

Uninitialised tensors are NaN (or the largest integer) while checks run, so what a kernel does not write is seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LONG_MS = 2000.0
"""What the calls of one measurement may take together."""


@dataclass(frozen=True)
class Check:
    """One comparison with the reference."""

    case: str
    error: float
    bound: float
    """The largest error that passes; 0 where every bit is asked for."""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


@dataclass(frozen=True)
class Timing:
    """One measurement; times are medians."""

    case: str
    slots: int
    """S."""
    ms: float
    bytes_moved: int = 0
    """What the op must read and write; 0: not its bound."""
    peers: dict[str, float] = field(default_factory=dict)
    """ms of other implementations of the same op."""
    copy_share: float | None = None
    """Its bandwidth over that of a copy in the same run."""
    goal: str = ""
    """What is aimed at, and whether it is met."""
    flops: int = 0
    """Multiplications and additions that the op must do in matrix products; 0: not its bound."""


class Clock:
    """Times calls on a device, with a cold L2 cache."""

    def __init__(self, device: torch.device, repetitions: int = 20) -> None:
        self.device = device
        self._repetitions = repetitions
        self._flushed = torch.empty(
            1 << (26 if device.type == "cuda" else 10), dtype=torch.float32, device=device
        )
        self.copy_gbps = self._copy_gbps()

    def ms(self, function: Callable[[], object]) -> float:
        """Median time of a call, after some that are not counted; of fewer calls where one takes long."""
        self._host_ms(function)
        longest = self._host_ms(function)
        repetitions = max(3, min(self._repetitions, int(LONG_MS / max(longest, 1e-3))))
        if repetitions == self._repetitions:
            function()
        if self.device.type != "cuda":
            return statistics.median(self._host_ms(function) for _ in range(repetitions))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for begin, end in events:
            self._flushed.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def share(self, ms: float, bytes_moved: int) -> float:
        """The bandwidth of moving this much in this time, over that of a copy."""
        return bytes_moved / (ms * 1e6) / self.copy_gbps

    def _host_ms(self, function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * (time.perf_counter() - begin)

    def _copy_gbps(self) -> float:
        source = torch.zeros(1 << (28 if self.device.type == "cuda" else 12), device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (self.ms(lambda: target.copy_(source)) * 1e6)


def differing(found: Tensor, expected: Tensor) -> float:
    """Elements whose bits differ; infinite for another shape or dtype."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    one, other = (x.detach().contiguous().view(integer) for x in (found, expected))
    return float((one != other).sum())


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from fp64 values; infinite where `found` is not finite."""
    if found.shape != exact.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.detach().double() - exact.detach().double()).abs().max()) if exact.numel() else 0.0


def as_accurate(case: str, found: Tensor, peer: Tensor, exact: Tensor) -> Check:
    """`found` is as near to the fp64 `exact` as twice the error of `peer`, PyTorch's own in the same precision."""
    roundoff = torch.finfo(found.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    return Check(case, largest_error(found, exact), 2 * largest_error(peer, exact) + roundoff)


def same_bits(case: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Check:
    """Every bit of every tensor is equal."""
    return Check(case, sum(differing(one, other) for one, other in zip(found, expected, strict=True)), 0.0)
