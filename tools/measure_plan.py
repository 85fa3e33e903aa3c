"""Peak memory of training steps, measured on every rank, next to what the planner predicts.

    torchrun --nproc_per_node=2 tools/measure_plan.py [CONFIG.yaml ...] [key=value ...] [--case "key=value ..."]...

Every rank builds the real model and engine, feeds them random tokens and takes optimizer steps; no corpus is needed.
`--case` adds overrides for one measurement; on CPUs give it several times to measure several in one launch (each in a
process of its own, forked once the imports are done). The world is what torchrun starts.

On a CPU the figure is the peak resident set (VmHWM, reset through /proc/self/clear_refs) of the steps, net of the same
process with its imports done and its process groups up, before the model exists, and net of the pages of libraries'
files that the first step reads in (RssFile). malloc keeps its default mmap threshold of 128 KiB and one arena, so that a
tensor's memory goes back to the system when the tensor does: without that glibc raises the threshold up to 32 MiB and
keeps freed blocks, and the peak would depend on the order of allocations. On CUDA it is
torch.cuda.max_memory_allocated, net of what was allocated before the model.

Exit code 1 where a rank's prediction is further than --bound from its measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.planning.memory import Part, node_memory, rank_memory
from mka_megatron.planning.steps import Layout
from mka_megatron.training.engine import Engine, construction_context

_MIB = 1 << 20
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
_SMALLEST_MAPPED = 1 << 17


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="overrides of one measurement")
    parser.add_argument("--vocab", type=int, default=16000, help="entries of the tokenizer")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--bound", type=float, default=0.1, help="largest difference, as a share of the measurement")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("config", nargs="*", help="configuration and overrides")
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cases, found = arguments.case or [""], []
    on_cuda = torch.cuda.is_available()
    if on_cuda and len(cases) > 1:
        parser.error("CUDA cannot be used behind a fork: give one --case a launch")
    plain_malloc()
    for number, case in enumerate(cases):
        ranks = measure(arguments, case.split(), world) if on_cuda else forked(arguments, case.split(), number, world)
        if rank == 0:
            found.append({"case": case, "ranks": ranks})
            print(table(case, ranks), flush=True)
    if rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    errors = [abs(each["predicted"] / each["measured"] - 1) for case in found for each in case["ranks"]]
    return int(any(error > arguments.bound for error in errors))


def plain_malloc() -> None:
    """Memory that is freed leaves the resident set."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_MAPPED)
    libc.mallopt(_M_TRIM_THRESHOLD, _SMALLEST_MAPPED)
    libc.mallopt(_M_ARENA_MAX, 1)


def forked(arguments: argparse.Namespace, case: list[str], number: int, world: int) -> list[dict]:
    """Measure a case in a child of this process; returns what every rank found, on rank 0."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        with os.fdopen(sender, "w") as out:
            if world > 1:
                os.environ |= {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1 + number),
                               "TORCHELASTIC_USE_AGENT_STORE": "False"}
            try:
                json.dump(measure(arguments, case, world), out)
                out.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"the case {' '.join(case)!r} failed; see above")
    return json.loads(text)


def measure(arguments: argparse.Namespace, case: list[str], world: int) -> list[dict]:
    """What every rank found, on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"training.output_dir={folder}", *arguments.config, *case]
        paths = [each for each in overrides if "=" not in each]
        config = load_config(paths, [each for each in overrides if "=" in each], world_size=world)
        topology = groups.initialize(config.parallel, config.engine.timeout_seconds, config.training.seed)
        try:
            mine = peaks(config, topology, arguments.vocab, arguments.steps)
            everyone: list = [None] * topology.world_size
            dist.all_gather_object(everyone, mine)
        finally:
            groups.destroy()
    return everyone


def peaks(config: Config, topology: Topology, vocab: int, steps: int) -> dict:
    """Bytes of this rank: `built` and `measured` peaks net of the start, `predicted` and its parts."""
    device = topology.device
    start = reset(device)
    model = build_model(config, topology, vocab, construction_context(config, topology))
    engine = Engine(config, model, topology)
    if engine.segments is not None:
        engine.segments.open()
    built = peak(device) - start
    reset(device)
    generator = torch.Generator().manual_seed(topology.dp_rank)
    per_sample = 1 if engine.segments is None else engine.segments.count // engine.segments.per_step
    for _ in range(steps):
        batches = [batch(config, vocab, generator) for _ in range(engine.accumulation)]
        for _ in range(per_sample):
            engine.train_step(batches)
    measured = peak(device) - start
    engine.close()
    layout = Layout(topology.tp_size, topology.cp_size, topology.dp_size)
    parts = predicted(config, layout, vocab, "cuda" if device.type == "cuda" else "cpu")
    return {
        "rank": topology.rank, "start": start, "built": built, "measured": measured,
        "predicted": sum(part.bytes for part in parts), "parts": [asdict(part) for part in parts],
    }


def predicted(config: Config, layout: Layout, vocab: int, device: str) -> tuple[Part, ...]:
    """The planner's parts of one rank; on a CPU with what offloading keeps in the same memory."""
    if device == "cuda":
        return rank_memory(config, layout, vocab, "cuda")
    dram, _ = node_memory(config, layout, vocab, 1, "cpu")
    return rank_memory(config, layout, vocab, "cpu") + tuple(part for part in dram if part.name.startswith("offloaded"))


def batch(config: Config, vocab: int, generator: torch.Generator) -> Batch:
    """Random tokens, one document per row."""
    shape = (config.training.micro_batch_size, config.data.sequence_length)
    tokens = torch.randint(vocab, (shape[0], shape[1] + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), Documents.unpacked(*shape))


def reset(device: torch.device) -> int:
    """Start a new peak; returns the bytes in use now, files' pages aside."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") - _status("RssFile")


def peak(device: torch.device) -> int:
    """Most bytes in use since :func:`reset`, files' pages aside (they only grow)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - _status("RssFile")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def table(case: str, ranks: list[dict]) -> str:
    """One case for people, in MiB."""
    lines = [f"{case or 'as configured'}"]
    for each in ranks:
        parts = ", ".join(f"{part['name']} {part['bytes'] / _MIB:,.0f}" for part in each["parts"] if part["bytes"])
        lines.append(
            f"  rank {each['rank']}: measured {each['measured'] / _MIB:,.0f}, predicted {each['predicted'] / _MIB:,.0f} MiB, "
            f"{each['predicted'] / each['measured']:.3f} of it (building {each['built'] / _MIB:,.0f}; {parts})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
