"""Speed and memory of generation by attention variant, prompt length and batch, with random weights of one shape.

    python tools/bench_inference.py --variants gqa,fastmka,blockmka --seq 1024,4096 --batch 1 --json out.json
    python tools/bench_inference.py --variants mha,mqa,gqa,mla,mka,fastmka,blockmka --seq 32768 --chunk 128 --window 2048 \\
        --recalled 16 configs/model/qwen2.5-7b.yaml training.precision=bf16 attention.mla.kv_lora_rank=512
    python tools/bench_inference.py --protocol paper --json out.json --plots plots configs/model/qwen2.5-7b.yaml \\
        training.precision=bf16

A variant is a file of configs/attention. Each has a process of its own, each cell (prompt length, batch) a memory of its
own; a finished cell is printed and written at once, one that fails (no memory, a full page store) is recorded as such and
the others go on. On a GPU where there is one, else on the CPU.

A cell gives the prompt once without timing it, then as often as fits into --prefill-seconds (at least once, at most
--tokens times; prefill_seconds is the median), then --warmup tokens that are not timed and --tokens that are
(ms_per_token is the median of a step, which makes one token of every row; decode_tok_s counts all rows).

--protocol paper: 100 + 1000 tokens, prompts of 4K to 256K, batches of 1, 4, 8 and 16, chunks of 128, a window of 2048, 8
recalled chunks. The paper pages the cache above 32K. Here the layout is the variant's: that of the dense core is contiguous
at every length, that of the block core paged at every length; "cache" says which.

Memory: peaks are bytes above the model's, allocated tensors on a GPU, resident memory on a CPU. kv_cache_bytes is what the
memory holds after the prompt, by tier; on a CPU "device" is host memory too. kv_bytes_read_per_token is computed from the
layout. Shares (attention: with its projections; core: without) and launches are torch.profiler's, of 4 passes over the
prompt and of 4 tokens; on a CPU calls of operators take the launches' place.

Bandwidth of the decode on an NVIDIA GPU, by Nsight Compute (the timed tokens are its range "decode"):

    ncu --target-processes all --nvtx --nvtx-include "decode/" --csv --log-file decode.csv --metrics \\
        gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,\\
sm__throughput.avg.pct_of_peak_sustained_elapsed \\
        python tools/bench_inference.py --variants fastmka --seq 32768 --warmup 2 --tokens 2 --prefill-seconds 0 \\
        configs/model/qwen2.5-7b.yaml training.precision=bf16

Bytes read and written over the kernels' time are the bandwidth, the two percentages its share of the device's peak and the
arithmetic's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, needs_chunks, recalls

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS: dict[str, Any] = {
    "variants": "gqa,fastmka,blockmka", "seq": "1024,4096", "batch": "1", "warmup": 3, "tokens": 20,
    "prefill_seconds": 5.0,
}  # fmt: skip
PAPER: dict[str, Any] = {
    "variants": "mha,mqa,gqa,mla,mka,fastmka,blockmka", "seq": ",".join(str(1024 << n) for n in range(2, 9)),
    "batch": "1,4,8,16", "warmup": 100, "tokens": 1000, "prefill_seconds": 60.0, "chunk": 128, "window": 2048,
    "recalled": 8,
}  # fmt: skip
Cell = tuple[int, int]
"""Batch, prompt tokens."""


def main(argv: list[str] | None = None) -> int:
    arguments, configs = parse(argv)
    cells = [(batch, length) for length in arguments.seq for batch in arguments.batch]
    if arguments.dry_run:
        for variant in configs:
            for batch, length in cells:
                print(f"{variant} batch {batch} prompt {length} tokens {arguments.warmup}+{arguments.tokens}")
        return 0
    figures: dict[str, Any] = {"protocol": arguments.protocol, "cells": []}
    print(HEAD, flush=True)
    for variant, config in configs.items():
        for found in in_a_process(config, cells, arguments):
            if "machine" in found:
                figures |= found
                continue
            figures["cells"].append({"variant": variant, **found})
            print(line(figures["cells"][-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if arguments.plots:
        plot(figures["cells"], arguments.plots)
    return 0


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Config]]:
    """The arguments, and the configuration of each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=("paper",), help="the paper's measurements, where other options do not say otherwise")
    parser.add_argument("--variants", help=f"files of configs/attention (default {DEFAULTS['variants']})")
    parser.add_argument("--seq", help=f"tokens of a prompt (default {DEFAULTS['seq']})")
    parser.add_argument("--batch", help=f"rows (default {DEFAULTS['batch']})")
    parser.add_argument("--warmup", type=int, help=f"tokens before the timed ones (default {DEFAULTS['warmup']})")
    parser.add_argument("--tokens", type=int, help=f"timed tokens (default {DEFAULTS['tokens']})")
    parser.add_argument("--prefill-seconds", type=float, help=f"for the prompt (default {DEFAULTS['prefill_seconds']:g})")
    parser.add_argument("--prefill-slots", type=int, default=1024, help="tokens of a row in a pass over the prompt")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk, where there are chunks (default: the file's)")
    parser.add_argument("--window", type=int, help="block core: tokens of the window (default: the file's)")
    parser.add_argument("--recalled", type=int, help="L3: recalled chunks (default: the file's)")
    parser.add_argument("--hbm-gib", type=float, default=0.0, help="L3 on a GPU: budget of pages kept there")
    parser.add_argument("--dram-gib", type=float, help="L3: budget of pages in host memory (default: none)")
    parser.add_argument("--ssd", type=Path, metavar="DIR", help="L3: pages beyond --dram-gib go there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw a PNG per batch there; needs matplotlib")
    parser.add_argument("--dry-run", action="store_true", help="list the cells, measure nothing")
    parser.add_argument("config", nargs="*", help="configuration files and overrides (default configs/model/tiny.yaml)")
    arguments = parser.parse_args(argv)
    for name, value in (PAPER if arguments.protocol else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("seq", "batch"):
        parts = getattr(arguments, name).split(",")
        if not all(part.isdigit() and int(part) for part in parts):
            parser.error(f"--{name} is {getattr(arguments, name)!r}: give numbers separated by commas, such as 1,4")
        setattr(arguments, name, sorted({int(part) for part in parts}))
    for name, least in (("tokens", 1), ("warmup", 0), ("prefill_slots", 1), ("prefill_seconds", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give at least {least}")
    if arguments.ssd and arguments.dram_gib is None:
        parser.error("--ssd without --dram-gib: nothing would reach the disk while host memory is unlimited, give both")
    if arguments.plots and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: install it, or leave --plots out")
    names = arguments.variants.split(",")
    known = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--variants has {unknown[0]!r}: choose of {', '.join(known)}")
    try:
        return arguments, {name: configured(name, arguments) for name in names}
    except ConfigError as error:
        parser.error(str(error))


def configured(variant: str, arguments: argparse.Namespace) -> Config:
    """The configuration of a variant. Raises ConfigError."""
    given = arguments.config or [str(CONFIGS / "model" / "tiny.yaml")]
    files = [CONFIGS / "attention" / f"{variant}.yaml", *(each for each in given if "=" not in each)]
    overrides = [each for each in given if "=" in each]
    config = load_config(files, overrides)
    memory = "memory_hierarchy"
    for key, value, wanted in (
        (f"{memory}.l1.chunk_size", arguments.chunk, needs_chunks(config)),
        (f"{memory}.l1.window", arguments.window, block_core(config)),
        (f"{memory}.l3.recalled_chunks", arguments.recalled, recalls(config)),
    ):
        if wanted and value is not None:
            overrides.append(f"{key}={value}")
    config = load_config(files, overrides, world_size=1)
    if not (block_core(config) and recalls(config)):
        return config
    # training's rules for these keys are about segments
    l3 = dataclasses.replace(
        config.memory_hierarchy.l3, placement="ssd" if arguments.ssd else "dram", hbm_pool_gib=arguments.hbm_gib,
        dram_pool_gib=arguments.dram_gib,
    )  # fmt: skip
    tiers = dataclasses.replace(config.memory_hierarchy, l3=l3, ssd_spill_path=str(arguments.ssd) if arguments.ssd else None)
    return dataclasses.replace(config, memory_hierarchy=tiers)


def in_a_process(config: Config, cells: list[Cell], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The machine, and each cell's figures, from a process that measures nothing else; a new one goes on where one
    dies."""
    # on a CPU the libraries are imported once; a fork that knows of a GPU could not use it
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["mka_megatron.inference.measure", "mka_megatron.model.build"])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a line for every profile
    # Megatron, of what it does not find or need; by the environment, for the processes are forked after its import
    known = ("Transformer Engine and Apex are not", "Apex is not installed", "full scope is deprecated")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{message}" for message in known))
    left = list(cells)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, config, left, arguments))
        process.start()
        sender.close()
        try:
            yield receiver.recv()
            while left:
                yield cell(left[0]) | receiver.recv()
                left.pop(0)
        except EOFError:
            process.join()
            if process.exitcode == 1:  # it said why
                sys.exit(1)
            yield cell(left.pop(0)) | {"error": f"the process ended with code {process.exitcode}; too little memory?"}
        finally:
            process.join()


def work(sender: Any, config: Config, cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Send the machine, then the cells' figures."""
    from mka_megatron.inference.measure import Plan, measure
    from mka_megatron.memory.tiers.pages import TierError
    from mka_megatron.model.build import build_model
    from mka_megatron.parallel import groups
    from mka_megatron.training.host import use_cores

    plan = Plan(arguments.warmup, arguments.tokens, arguments.prefill_seconds, arguments.prefill_slots)
    positions = max(config.model.max_position_embeddings, arguments.seq[-1] + plan.new_tokens)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_position_embeddings=positions))
    topology = groups.initialize(config.parallel)
    model = build_model(config, topology, config.model.vocab_size or config.data.tokenizer_vocab_size).eval()
    threads = use_cores(1)
    on_cuda = topology.device.type == "cuda"
    sender.send({"machine": {
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine(),
        "threads": threads, "torch": torch.__version__, "precision": config.training.precision,
        "model": dataclasses.asdict(config.model),
    }})  # fmt: skip
    for batch, length in cells:
        found: dict[str, Any]
        with tqdm(total=2 * length + plan.new_tokens, unit="tok", leave=False, disable=None) as bar:
            try:
                found = measure(model, config, topology, batch, length, plan, bar.update)
            except (torch.OutOfMemoryError, MemoryError, TierError, ConfigError) as error:
                found = {"error": str(error).partition("\n")[0]}
        sender.send(found)
    groups.destroy()


def cell(which: Cell) -> dict[str, int]:
    return {"batch": which[0], "seq": which[1]}


HEAD = (
    f"{'variant':14}{'batch':>6}{'prompt':>8} |{'prefill s':>10}{'tok/s':>10}{'peak MiB':>9}{'attn':>6} |"
    f"{'ms/token':>9}{'tok/s':>9}{'peak MiB':>9}{'attn':>6}{'calls':>7} |{'device MiB':>11}{'DRAM MiB':>9}{'SSD MiB':>8}{'read MiB':>9}"
)


def line(figures: dict[str, Any]) -> str:
    """A cell as a row under HEAD."""
    start = f"{figures['variant']:14}{figures['batch']:>6}{figures['seq']:>8} |"
    if "error" in figures:
        return f"{start} {figures['error']}"
    mib = {name: figures[name] / 2**20 for name in ("prefill_peak_bytes", "decode_peak_bytes", "kv_bytes_read_per_token")}
    tiers = [figures["kv_cache_bytes"][tier] / 2**20 for tier in ("device", "dram", "ssd")]
    return (
        f"{start}{figures['prefill_seconds']:>10.3f}{figures['prefill_tok_s']:>10.0f}{mib['prefill_peak_bytes']:>9.1f}"
        f"{figures['prefill_attention_share']:>6.0%} |{figures['ms_per_token']:>9.2f}{figures['decode_tok_s']:>9.1f}"
        f"{mib['decode_peak_bytes']:>9.1f}{figures['decode_attention_share']:>6.0%}{calls(figures):>7.0f} |"
        f"{tiers[0]:>11.2f}{tiers[1]:>9.2f}{tiers[2]:>8.2f}{mib['kv_bytes_read_per_token']:>9.2f}"
    )


def calls(figures: dict[str, Any]) -> float:
    """Kernel launches per token, or on a CPU operator calls."""
    return figures.get("kernel_launches_per_token", figures.get("operator_calls_per_token"))


def plot(cells: list[dict[str, Any]], directory: Path) -> None:
    """batch-<n>.png: decode speed, prefill seconds, KV cache and peak memory over the prompt, all logarithmic."""
    from matplotlib import pyplot

    panels = (
        ("decode tokens/s", lambda c: c["decode_tok_s"]),
        ("prefill seconds", lambda c: c["prefill_seconds"]),
        ("KV cache MiB (all tiers)", lambda c: sum(c["kv_cache_bytes"].values()) / 2**20),
        ("peak MiB above the model", lambda c: max(c["prefill_peak_bytes"], c["decode_peak_bytes"]) / 2**20),
    )
    directory.mkdir(parents=True, exist_ok=True)
    measured = [c for c in cells if "error" not in c]
    for batch in sorted({c["batch"] for c in measured}):
        figure, axes = pyplot.subplots(2, 2, figsize=(10, 8))
        for axis, (label, value) in zip(axes.flat, panels, strict=True):
            for variant in dict.fromkeys(c["variant"] for c in measured):
                own = [c for c in measured if (c["variant"], c["batch"]) == (variant, batch)]
                axis.loglog([c["seq"] for c in own], [value(c) for c in own], marker="o", label=variant, base=2)
            axis.set_xlabel("tokens of the prompt")
            axis.set_ylabel(label)
        axes.flat[0].legend()
        figure.tight_layout()
        figure.savefig(directory / f"batch-{batch}.png")
        pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
