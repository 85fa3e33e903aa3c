"""Time and memory of the attention cores by length: dense SDPA against the block core, from q, k and v on.

    python tools/bench_attention.py --device cpu --variants gqa,blockmka --seq 4096,8192,16384,32768 --json out.json
    python tools/bench_attention.py --forward-only --variants blockmka --seq 16384,32768,65536,131072,262144

`gqa` is dense causal SDPA, S²/2 scores per head. `blockmka` is the whole core, chunk summaries and the hashed
selection of recalled chunks included: S (window + recalled * chunk) + S²/2C scores. Every point runs in a process of
its own; times are medians; memory is what the peak lies above the process with its inputs, so it holds
the outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.attention.grouped import causal_attention
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Alone
from mka_megatron.ops.block_attention import block_attention, choose
from mka_megatron.training.host import use_cores

MIB = float(1 << 20)
# what the first point of a process would otherwise pay: libraries, thread pools
WARM_LENGTH = 512


@dataclass(frozen=True)
class Setting:
    """What all points share."""

    device: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    window: int
    recalled: int
    hash_bits: int
    backend: str
    forward_only: bool
    repeats: int


def main() -> int:
    setting, variants, lengths, arguments = parse()
    points: list[dict[str, Any]] = []
    print(head(setting, arguments.threads), flush=True)
    for length in lengths:
        for variant in variants:
            points.append(in_a_process(variant, length, setting, arguments.threads))
            relate(points)
            print(line(points[-1]), flush=True)
    figures = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "torch": torch.__version__,
        }
        | ({"device": torch.cuda.get_device_name()} if setting.device == "cuda" else {}),
        "setting": asdict(setting),
        "points": points,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(points, arguments.plot)
    return 0


def parse() -> tuple[Setting, list[str], list[int], argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--variants", default="gqa,blockmka", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seq", default="4096,8192,16384,32768", help="lengths, rising")
    parser.add_argument("--forward-only", action="store_true", help="without the backward")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk")
    parser.add_argument(
        "--window", type=int, default=512, help="tokens of the window, a multiple of the chunk"
    )
    parser.add_argument(
        "--recalled", type=int, default=4, help="chunks recalled; 0: window and summaries alone"
    )
    parser.add_argument("--hash-bits", type=int, default=64, help="a multiple of 64")
    parser.add_argument("--backend", default="auto", help="of the block core: auto, reference or flex")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs, after one that is not")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here; needs matplotlib")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants has {unknown[0]!r}: choose of {', '.join(VARIANTS)}")
    if not all(part.isdigit() and int(part) for part in arguments.seq.split(",")):
        parser.error(f"--seq is {arguments.seq!r}: give lengths separated by commas, such as 4096,8192")
    if arguments.chunk < 1 or arguments.window < arguments.chunk or arguments.window % arguments.chunk:
        parser.error(f"--window is {arguments.window}: give a multiple of --chunk, {arguments.chunk}")
    if arguments.heads < 1 or arguments.kv_heads < 1 or arguments.heads % arguments.kv_heads:
        parser.error(f"--heads is {arguments.heads}: give a multiple of --kv-heads, {arguments.kv_heads}")
    if arguments.recalled < 0 or arguments.hash_bits < 1 or arguments.hash_bits % 64:
        parser.error("--recalled must not be negative, --hash-bits a positive multiple of 64")
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}: measure at least once")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda: there is none here, take cpu")
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: install it, or leave --plot out")
    try:
        backend = choose(arguments.backend, arguments.device)
    except ValueError as error:
        parser.error(f"--backend: {error}")
    arguments.threads = use_cores(1)
    setting = Setting(
        arguments.device, arguments.dtype, arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.chunk,
        arguments.window, arguments.recalled, arguments.hash_bits, backend, arguments.forward_only, arguments.repeats,
    )  # fmt: skip
    return setting, variants, sorted({int(part) for part in arguments.seq.split(",")}), arguments


def gqa(setting: Setting, length: int) -> Callable[..., Tensor]:
    """Dense causal attention, as the variants' dense core runs it."""
    documents = Documents.unpacked(1, length)
    return lambda q, k, v, bias: causal_attention(q, k, v, documents, setting.head_dim**-0.5)


def blockmka(setting: Setting, length: int) -> Callable[..., Tensor]:
    """The block core: pool, hash, select, attend. As if q and k were both rotated and not: one stands for both."""
    documents = Documents.unpacked(1, length).to(setting.device)
    chunks = Chunks.of(documents, setting.chunk)
    planes = hashing.planes(0, 1, setting.hash_bits, setting.head_dim).to(setting.device)
    selector = hashing.Selector("hash", setting.recalled, planes)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        summaries = hashing.chunk_means(k, chunks), hashing.chunk_means(v, chunks)
        pages = None
        if setting.recalled:
            queries = hashing.recent(selector.queries(q, k.shape[2]), None, documents, chunks)
            recalled = selector.select(
                queries, selector.signature(k, chunks), chunks, setting.window // setting.chunk
            )
            pages = Alone().pages(recalled, 0, k, v)
        return block_attention(
            q, k, v, summaries, pages, bias, chunks=chunks, window=setting.window, scale=setting.head_dim**-0.5,
            backend=setting.backend,
        )  # fmt: skip

    return run


VARIANTS = {"gqa": gqa, "blockmka": blockmka}


def scores(variant: str, length: int, setting: Setting) -> int:
    """Query-key pairs per head that causality leaves."""
    if variant == "gqa":
        return length * (length + 1) // 2
    pairs = 0
    for begin in range(0, length, setting.chunk):
        here = min(setting.chunk, length - begin)
        before = begin // setting.chunk
        near = min(before, setting.window // setting.chunk - 1)
        far = before - near
        pairs += here * (here + 1) // 2 + here * (
            near * setting.chunk + far + min(far, setting.recalled) * setting.chunk
        )
    return pairs


def in_a_process(variant: str, length: int, setting: Setting, threads: int) -> dict[str, Any]:
    """:func:`measure` in a fresh process, whose peak of memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(sender, variant, length, setting, threads))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        sys.exit(
            f"{variant} at {length}: the measuring process ended with code {process.exitcode}; too little memory?"
        )
    finally:
        process.join()


def report(sender: Any, variant: str, length: int, setting: Setting, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send(measure(variant, length, setting))


def measure(variant: str, length: int, setting: Setting) -> dict[str, Any]:
    """Seconds of the forward and of forward and backward, and MiB at the peak above the inputs."""
    step(variant, WARM_LENGTH, setting)()
    run = step(variant, length, setting)
    before = resident(setting)
    times = [run() for _ in range(1 + setting.repeats)][1:]
    forward, both = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "variant": variant,
        "length": length,
        "forward_seconds": forward,
        "forward_backward_seconds": None if setting.forward_only else both,
        "all_seconds": times,
        "peak_mib": peak(setting) - before,
        "scores": scores(variant, length, setting),
    }


def step(variant: str, length: int, setting: Setting) -> Callable[[], tuple[float, float]]:
    """A function that runs forward (and backward) once and returns the seconds after each."""
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype = getattr(torch, setting.dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=setting.device, dtype=dtype)
        return x.requires_grad_(not setting.forward_only)

    q = normal(1, length, setting.heads, setting.head_dim)
    k, v = (normal(1, length, setting.kv_heads, setting.head_dim) for _ in range(2))
    bias = normal(1, length, setting.kv_heads, 3, dtype=torch.float32)
    direction = torch.ones_like(q)
    attend = VARIANTS[variant](setting, length)
    leaves = [q, k, v] if variant == "gqa" else [q, k, v, bias]

    def run() -> tuple[float, float]:
        begin = clock(setting)
        out = attend(q, k, v, bias)
        middle = clock(setting)
        if not setting.forward_only:
            torch.autograd.grad(out, leaves, direction)
        return middle - begin, clock(setting) - begin

    return run


def clock(setting: Setting) -> float:
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(setting: Setting) -> float:
    """MiB in use now."""
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def peak(setting: Setting) -> float:
    """MiB in use at most."""
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def seconds(point: dict[str, Any]) -> float:
    both = point["forward_backward_seconds"]
    return point["forward_seconds"] if both is None else both


def relate(points: list[dict[str, Any]]) -> None:
    """Adds to the last point its growth per doubling since the variant's last length and its speed against gqa."""
    point = points[-1]
    earlier = [p for p in points[:-1] if p["variant"] == point["variant"]]
    for name, value in (
        ("time", seconds),
        ("scores", lambda p: p["scores"]),
        ("memory", lambda p: max(p["peak_mib"], 1e-3)),
    ):
        point[f"{name}_per_doubling"] = None
        if earlier:
            doublings = math.log2(point["length"] / earlier[-1]["length"])
            point[f"{name}_per_doubling"] = (value(point) / value(earlier[-1])) ** (1 / doublings)
    dense = [p for p in points if p["variant"] == "gqa" and p["length"] == point["length"]]
    point["times_faster_than_gqa"] = seconds(dense[0]) / seconds(point) if dense else None


def head(setting: Setting, threads: int) -> str:
    where = torch.cuda.get_device_name() if setting.device == "cuda" else f"CPU, {threads} threads"
    return (
        f"{where}, {setting.dtype}, {setting.heads}/{setting.kv_heads} heads of {setting.head_dim}, chunk {setting.chunk}, "
        f"window {setting.window}, recalled {setting.recalled}, {setting.backend}; medians of {setting.repeats}\n"
        f"{'':38}|{'growth per doubling':^27}|\n"
        f"{'variant':10}{'length':>8}{'fwd s':>10}{'fwd+bwd s':>10}|{'time':>8}{'scores':>8}{'memory':>8}   |"
        f"{'peak MiB':>9}{'x faster than gqa':>19}"
    )


def line(point: dict[str, Any]) -> str:
    def cell(key: str, width: int, digits: int) -> str:
        value = point[key]
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    return (
        f"{point['variant']:10}{point['length']:>8}{cell('forward_seconds', 10, 4)}{cell('forward_backward_seconds', 10, 4)}|"
        f"{cell('time_per_doubling', 8, 2)}{cell('scores_per_doubling', 8, 2)}{cell('memory_per_doubling', 8, 2)}   |"
        f"{cell('peak_mib', 9, 1)}{cell('times_faster_than_gqa', 19, 2)}"
    )


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over length, both logarithmic."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, label, value in ((axes[0], "seconds", seconds), (axes[1], "peak MiB", lambda p: p["peak_mib"])):
        for variant in dict.fromkeys(p["variant"] for p in points):
            own = [p for p in points if p["variant"] == variant]
            axis.loglog(
                [p["length"] for p in own], [value(p) for p in own], marker="o", label=variant, base=2
            )
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
