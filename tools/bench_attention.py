"""Time, memory and TFLOP/s of attention cores by length, and of whole attention layers, forward and backward.

    python tools/bench_attention.py --device cpu --variants gqa,blockmka --seq 4096,8192,16384,32768 --json out.json
    python tools/bench_attention.py --forward-only --variants blockmka --seq 16384,32768,65536,131072,262144
    python tools/bench_attention.py --device cuda --dtype bfloat16 --heads 28 --kv-heads 4 --head-dim 128 --window 2048 \\
        --recalled 16 --seq 4096,16384,65536,131072,262144 --json cores.json --plot cores.png \\
        --variants cudnn,flash,mla,mla-cudnn,flex,mma,wgmma,blockmka,nsa@64/4,wgmma@64/4
    python tools/bench_attention.py --layer --variants gqa,cudnn,mla,mla-cudnn,fastmka --device cuda ...

Cores start from rotated q, k and v. `gqa` is dense causal SDPA, S²/2 scores per head; `cudnn` and `flash` are the same with
PyTorch's kernel pinned; `mla` (and `mla-cudnn`) the same over DeepSeek-V3's heads for this hidden size (queries and keys of
192 channels, values of 128). `blockmka` is the whole block core by --backend, chunk summaries and the hashed selection of recalled chunks
included: S (window + recalled * chunk) + S²/2C scores. `mma`, `wgmma` (our kernels), `flex` and `reference` are its attention
alone, over the same lists. `nsa` is flash-linear-attention's, over as many selected tokens. A variant may have heads of its
own: `nsa@64/4`. With --layer the dense ones, `blockmka` and `fastmka` (fusion over the block core) are whole layers, from the
input of the QKV projection to the output of the output projection, with RoPE and gates.

Every point runs in a process of its own; times are medians; memory is what the peak lies above the process with its inputs,
so it holds the outputs and gradients. TFLOP/s count the products of the pairs that see each other, 2 of the forward and 5 of
the backward. What cannot run is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka_megatron.ops import library
from mka_megatron.ops.block_attention import choose, cuda
from mka_megatron.training.host import use_cores
from tools.attention_cores import CORES, Core, Setting
from tools.attention_figures import head, line, plot, relate
from tools.attention_layers import LAYERS

MIB = float(1 << 20)
# what the first point of a process would otherwise pay: libraries, thread pools
WARM_LENGTH = 512
PRODUCTS = {"forward": 2, "backward": 5}
"""Matrix products per pair; what the backward computes again does not count."""


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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layer", action="store_true", help="whole layers instead of cores")
    parser.add_argument(
        "--variants",
        default="gqa,blockmka",
        help=f"cores: {', '.join(CORES)}; layers: {', '.join(LAYERS)}; with own heads: NAME@HEADS/KV-HEADS",
    )
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
    parser.add_argument("--backend", default="auto", help="of the block core: auto, reference, flex or cuda")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs, after one that is not")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here; needs matplotlib")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    known = LAYERS if arguments.layer else CORES
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
        capability = library.capability(arguments.device)
        lacks = cuda.lacks(arguments.head_dim, arguments.chunk, getattr(torch, arguments.dtype), capability)
        backend = choose(arguments.backend, arguments.device, lacks)
    except ValueError as error:
        parser.error(f"--backend: {error}")
    arguments.threads = use_cores(1)
    setting = Setting(
        arguments.device, arguments.dtype, arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.chunk,
        arguments.window, arguments.recalled, arguments.hash_bits, backend, arguments.forward_only, arguments.repeats,
        arguments.layer,
    )  # fmt: skip
    for variant in variants:
        if variant.partition("@")[0] not in known:
            parser.error(f"--variants has {variant!r}: choose of {', '.join(known)}")
        try:
            contender(variant, setting)
        except ValueError:
            parser.error(f"--variants has {variant!r}: give heads as in nsa@64/4, a multiple of the KV heads")
    return setting, variants, sorted({int(part) for part in arguments.seq.split(",")}), arguments


def contender(variant: str, setting: Setting) -> tuple[Core, Setting]:
    """The variant, and the setting with its own heads; ValueError where these are none."""
    name, _, own = variant.partition("@")
    if own:
        heads, kv_heads = (int(number) for number in own.split("/"))
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(own)
        setting = replace(setting, heads=heads, kv_heads=kv_heads)
    return (LAYERS if setting.layer else CORES)[name], setting


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
    try:
        sender.send(measure(variant, length, setting))
    except RuntimeError as error:  # of which out of memory is one
        told = " ".join(str(error).split())[:200]
        sender.send({"variant": variant, "length": length, "missing": f"{type(error).__name__}: {told}"})


def measure(variant: str, length: int, setting: Setting) -> dict[str, Any]:
    """Seconds of the forward and of forward and backward, and MiB at the peak above the inputs; or what is missing."""
    core, own = contender(variant, setting)
    point: dict[str, Any] = {"variant": variant, "length": length}
    if lacks := core.lacks(own):
        return point | {"missing": lacks}
    if not core.compiled:
        step(core, WARM_LENGTH, own)()
    run = step(core, length, own)
    before = resident(setting)
    times = [run() for _ in range(1 + setting.repeats)][1:]
    forward, both = (statistics.median(column) for column in zip(*times, strict=True))
    point |= {
        "forward_seconds": forward,
        "forward_backward_seconds": None if setting.forward_only else both,
        "all_seconds": times,
        "peak_mib": peak(setting) - before,
        "scores": core.pairs(length, own),
    }
    if not setting.layer:
        product = core.pairs(length, own) * core.cost(own) / 2
        rates = {"forward": forward} | ({} if setting.forward_only else {"backward": both - forward})
        point["tflops"] = {phase: PRODUCTS[phase] * product / time / 1e12 for phase, time in rates.items()}
    return point


def step(core: Core, length: int, setting: Setting) -> Callable[[], tuple[float, float]]:
    """A function that runs forward (and backward) once and returns the seconds after each."""
    work = core.make(setting, length)
    direction = setting.normal(*work.shape, seed=99).detach()

    def run() -> tuple[float, float]:
        begin = clock(setting)
        out = work.forward()
        middle = clock(setting)
        if not setting.forward_only:
            torch.autograd.grad(out, work.leaves, direction)
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


if __name__ == "__main__":
    sys.exit(main())
