"""Speed and memory of generation at one batch size and prompt length.

Shapes: B rows, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.schema import Config
from mka_megatron.inference.footprint import footprint, read_per_token
from mka_megatron.inference.generate import PREFILL_SLOTS, remember
from mka_megatron.inference.profiling import NOTHING, Profile, profiled
from mka_megatron.memory.generation import Generation, open_pages
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel.groups import Topology

PROFILED = 4
"""Passes over a prompt, evenly spread, and tokens that are profiled."""


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    warmup: int
    """Tokens of each row that are not timed."""
    iterations: int
    """Tokens of each row that are."""
    prefill_seconds: float
    """The prompt is given again as long as this is not used up, once at least and at most `iterations` times."""
    prefill_slots: int = PREFILL_SLOTS
    """Slots of each row in a pass over the prompt."""

    @property
    def new_tokens(self) -> int:
        """That a row comes to have behind its prompt."""
        return self.warmup + self.iterations + PROFILED


def measure(
    model: GPT,
    config: Config,
    topology: Topology,
    batch: int,
    prompt: int,
    plan: Plan,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Any]:
    """Give `batch` rows random prompts, then choose greedily token by token; each timed on its own.

    The prompt is given once before it is timed (and profiled then), into a memory of its own. A new token's time
    includes choosing it on the host. Timed is the whole model; nothing is timed while it is profiled.

    Args:
        model: in eval mode, on one rank. config: what it was built from; it has positions for the prompt and
            `plan.new_tokens`.
        progress: called with tokens of a row that are done, of 2 * prompt + plan.new_tokens (repeated prompts not
            counted).

    Returns:
        prefill_seconds (median), prefill_all_seconds, prefill_tok_s; ms_per_token (median, of one token of every
        row), ms_per_token_mean, decode_tok_s (all rows); prefill_peak_bytes and decode_peak_bytes above the model;
        kv_cache_bytes by tier, kv_device_bytes by part and kv_allocated_bytes after the prompt; cache;
        kv_bytes_read_per_token of a row; for both phases attention_share and core_share of the time; and
        kernel_launches_per_token, on a CPU operator_calls_per_token, of one token of every row.

    Raises:
        ConfigError, TierError: the page store cannot be opened or is full.
    """
    generator = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(0, model.real_vocab_size, (batch, prompt), generator=generator).to(topology.device)
    parts = tokens.split(plan.prefill_slots, dim=1)

    def begun() -> _Rows:
        return _Rows(model, config, topology, batch)

    first = _profile_prompt(begun(), parts, progress)
    peak = PeakMemory(topology.device)
    seconds: list[float] = []
    while True:
        with begun() as rows:
            peak.restart()
            begin = now(rows.device)
            for part in parts:
                rows.give(part)
                if not seconds:
                    progress(part.shape[1])
            rows.memory.close_chunks()
            seconds.append(now(rows.device) - begin)
            if len(seconds) < plan.iterations and sum(seconds) + min(seconds) <= plan.prefill_seconds:
                continue
            middle, kept = statistics.median(seconds), footprint(rows.memory, rows.store)
            return {
                "prefill_seconds": middle,
                "prefill_all_seconds": seconds,
                "prefill_tok_s": batch * prompt / middle,
                "prefill_peak_bytes": peak.above(),
                "prefill_attention_share": first.attention / first.seconds,
                "prefill_core_share": first.core / first.seconds,
                "cache": "contiguous" if rows.store is None else "paged",
                "kv_cache_bytes": kept.tiers,
                "kv_device_bytes": kept.device,
                "kv_allocated_bytes": kept.allocated,
            } | _decode(rows, config, prompt, plan, peak, progress)


def _profile_prompt(rows: _Rows, parts: Sequence[Tensor], progress: Callable[[int], object]) -> Profile:
    """A prompt that is not timed, and some of its passes."""
    # in the middles of equal parts, for the time of a pass grows evenly
    chosen = {(2 * part + 1) * len(parts) // (2 * PROFILED) for part in range(PROFILED)}
    found = NOTHING
    with rows:
        for number, part in enumerate(parts):
            give = partial(rows.give, part)
            if number in chosen:
                found += profiled(rows.model, rows.memory, give)
            else:
                give()
            progress(part.shape[1])
        rows.memory.close_chunks()
        rows.next()
    return found


def _decode(
    rows: _Rows, config: Config, prompt: int, plan: Plan, peak: PeakMemory, progress: Callable[[int], object]
) -> dict[str, Any]:
    for _ in range(plan.warmup):
        rows.next()
        progress(1)
    peak.restart()
    times = [now(rows.device)]
    with _named("decode", rows.device):
        for _ in range(plan.iterations):
            rows.next()
            times.append(now(rows.device))
            progress(1)
    highest = peak.above()
    found = NOTHING
    for _ in range(PROFILED):
        found += profiled(rows.model, rows.memory, rows.next)
        progress(1)
    seconds = [end - begin for begin, end in pairwise(times)]
    calls = "kernel_launches_per_token" if rows.device.type == "cuda" else "operator_calls_per_token"
    new = range(plan.warmup, plan.warmup + plan.iterations)
    return {
        "ms_per_token": 1000 * statistics.median(seconds),
        "ms_per_token_mean": 1000 * statistics.mean(seconds),
        "decode_tok_s": rows.batch * len(seconds) / sum(seconds),
        "decode_peak_bytes": highest,
        "kv_bytes_read_per_token": read_per_token(config, prompt, new, rows.dtype.itemsize),
        "decode_attention_share": found.attention / found.seconds,
        "decode_core_share": found.core / found.seconds,
        calls: found.calls / PROFILED,
    }


class _Rows:
    """Rows that a model generates greedily, and their pages, until the end of the `with`."""

    def __init__(self, model: GPT, config: Config, topology: Topology, batch: int) -> None:
        self.model, self.batch, self.device = model, batch, topology.device
        self.dtype = next(model.parameters()).dtype
        self.store: TierStore | None = open_pages(config, self.dtype, self.device, run="bench_inference")
        self.memory: Generation = remember(model, config, topology, batch, self.store)
        self._logits: Tensor | None = None

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        if self.store is not None:
            self.store.close()

    def give(self, tokens: Tensor) -> None:
        """[B, T] tokens to every row."""
        self._logits = self.model.extend(tokens, self.memory, last=True)[:, 0]

    def next(self) -> None:
        """Another token to every row: the likeliest one, which the host looks at as generate() does."""
        assert self._logits is not None
        tokens = self._logits.argmax(dim=-1)
        tokens.tolist()
        self.give(tokens[:, None])


class PeakMemory:
    """The most memory in use since :meth:`restart`, above what was in use when this was made.

    CUDA: PyTorch's tensors. CPU: resident memory of the process, by Linux's high-water mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            self._before = _status("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def above(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status("VmHWM") - self._before)

    def reserved(self) -> int:
        """Bytes that PyTorch held of a GPU, used or not; on a CPU, that the process did."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}.")


@contextmanager
def _named(name: str, device: torch.device) -> Iterator[None]:
    """The body is a range called `name` for NVIDIA's profilers."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.nvtx.range(name):
        yield


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
