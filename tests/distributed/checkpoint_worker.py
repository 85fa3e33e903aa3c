"""Worker: saves, resumes, damages and refuses checkpoints on two ranks; writes what happened.

python -m torch.distributed.run --nproc_per_node=2 checkpoint_worker.py DIRECTORY nvme|no-nvme SMALL_DISK|-
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training import checkpoint, manifest, saving, writer
from mka_megatron.training.checkpoint import CheckpointError
from tests.distributed.engine_worker import NVME, OFFLOAD, SHARDED, ZERO
from tests.helpers.engine_runs import config_of, engine_of, micro_batches, train

SHARED = ["parallel.context_parallel=2"]
RESUMED = {
    **ZERO,
    **OFFLOAD,
    **{f"{zero} {half}": [*case, f"training.precision={half}"] for zero, case in ZERO.items() for half in ("bf16", "fp16")},
    "tp2 zero1": [*ZERO["zero1"], *SHARDED],
    "tp2 zero3": [*ZERO["zero3"], *SHARDED],
    "cp2 zero1": [*ZERO["zero1"], *SHARED],
    "cp2 zero3": [*ZERO["zero3"], *SHARED],
}
# A scale that overflows at once, and doubles after every second good step: a state worth resuming.
LOSS_SCALE = {"fp16": {"loss_scale_window": 2, "hysteresis": 2, "initial_scale_power": 18}}


def regroup(case: list[str]) -> Topology:
    """Another layout of the same ranks."""
    parallel_state.destroy_model_parallel()
    return groups.initialize(config_of(case).parallel)


def draws() -> list[float]:
    """One number of each generator."""
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]  # noqa: S311


def resume(case: list[str], topology: Topology, folder: Path) -> dict:
    """Eight steps saved after four, against a fresh engine of another seed that loads and takes the last four."""
    if "training.precision=fp16" in case:
        path = folder.with_suffix(".json")
        on_rank_0(lambda: path.write_text(json.dumps(LOSS_SCALE)))
        case = [*case, "engine.initial_loss_scale_power=18", f"engine.deepspeed_config={path}"]
    config = config_of([*case, f"training.output_dir={folder}"])
    engine = engine_of(config, topology)
    first = train(engine, 0, 4)
    checkpoint.save(engine, folder, 4, {"consumed_samples": 32, "note": "é"}, keep_last=2)
    drawn = draws()
    straight = train(engine, 4, 8)
    evaluation = engine.evaluate(micro_batches(100, config, topology)).loss
    engine.close()
    engine = engine_of(config_of([*case, f"training.output_dir={folder}", "training.seed=99"]), topology)
    unlike = engine.evaluate(micro_batches(100, config, topology)).loss
    state = checkpoint.load(engine, checkpoint.newest_intact(folder))
    step, drawn_again = engine.step, draws()
    resumed = train(engine, 4, 8)
    evaluation_again = engine.evaluate(micro_batches(100, config, topology)).loss
    engine.close()
    return {
        "straight": [*straight, evaluation], "resumed": [*resumed, evaluation_again], "draws": [drawn, drawn_again],
        "state": state, "step": step, "scales": [result["loss_scale"] for result in first + straight],
        "unlike": unlike != evaluation,
    }


def attempt(action: Callable[[], object]) -> str:
    """The CheckpointError's sentence, or `no error`."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


class Log(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("mka_megatron").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def on_rank_0(action: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def names(folder: Path) -> list[str]:
    """What lies in the run's checkpoint folder, hidden entries too."""
    dist.barrier()
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def flip(path: Path, position: int) -> None:
    """Invert one bit."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


def damage(topology: Topology, folder: Path) -> dict:
    """Four checkpoints, the newer ones damaged one after the other; which is found, and what is said."""
    engine = engine_of(config_of([*ZERO["zero1"]]), topology)
    for step in range(1, 6):
        train(engine, step - 1, step)
        checkpoint.save(engine, folder, step, {"consumed_samples": 8 * step}, keep_last=4)
    kept = names(folder)
    log = Log()
    found, path = [], folder / "checkpoints"

    def newest() -> None:
        newest = checkpoint.newest_intact(folder)
        found.append(newest and newest.step)

    newest()
    tensors = sorted((path / "step-00000005" / "deepspeed").iterdir())[-1]
    on_rank_0(lambda: os.truncate(tensors, tensors.stat().st_size // 2))
    newest()
    on_rank_0(lambda: flip(path / "step-00000004" / "rng-00001.pt", 700))
    newest()
    on_rank_0(lambda: flip(path / "step-00000003" / "manifest.json", 10_000))
    newest()
    # Loading a damaged one by name is refused before anything is read from it.
    refused = attempt(lambda: checkpoint.load(engine, path / "step-00000004"))
    untouched = engine.step
    on_rank_0(lambda: (path / "step-00000002" / "manifest.json").unlink())
    newest()
    # The next save of a damaged step replaces it, and a killed save's leftovers go.
    on_rank_0(lambda: (path / ".tmp-step-00000009").mkdir())
    checkpoint.save(engine, folder, 5, {}, keep_last=1)
    newest()
    left = names(folder)
    dist.barrier()  # rank 0's next save must not be in the other's listing
    # Going back: later steps are another history, which must not be resumed from.
    checkpoint.save(engine, folder, 3, {}, keep_last=2)
    back = names(folder)
    engine.close()
    return {"back": back, "kept": kept, "found": found, "log": log.lines, "refused": refused, "untouched": untouched, "left": left}


def mismatches(topology: Topology, folder: Path) -> dict:
    """Loading into another precision or model; the same model with other hyperparameters is fine."""
    base = [*ZERO["zero1"], f"training.output_dir={folder}"]
    engine = engine_of(config_of(base), topology)
    saved = checkpoint.save(engine, folder, 0, {}, keep_last=1)
    engine.close()
    cases = {"precision": ["training.precision=bf16"], "model": ["routing.gate_hidden_size=8"]}
    said = {}
    for name, case in cases.items():
        engine = engine_of(config_of([*base, *case]), topology)
        said[name] = attempt(lambda engine=engine: checkpoint.load(engine, saved))
        engine.close()
    engine = engine_of(config_of([*base, "training.weight_decay=0.3", "training.adam_beta2=0.9"]), topology)
    checkpoint.load(engine, saved)
    group = engine.deepspeed.optimizer.param_groups[0]
    said["hyperparameters"] = [group["weight_decay"], list(group["betas"])]
    engine.close()
    return said


def full_disk(case: list[str], topology: Topology, folder: Path, fill: Callable[[], object]) -> dict:
    """A good save, then one for which `fill` leaves no room; what stays, and that training and saving go on."""
    engine = engine_of(config_of([*case, f"training.output_dir={folder}"]), topology)
    train(engine, 0, 1)
    checkpoint.save(engine, folder, 1, {"consumed_samples": 8}, keep_last=2)
    undo = fill()
    said = attempt(lambda: checkpoint.save(engine, folder, 2, {}, keep_last=1))
    left = names(folder)
    newest = checkpoint.newest_intact(folder)
    if callable(undo):
        undo()
        dist.barrier()
        train(engine, 1, 2)
        checkpoint.save(engine, folder, 2, {}, keep_last=1)
    again = names(folder)
    engine.close()
    return {"said": said, "left": left, "newest": newest and newest.step, "again": again}


def fill_disk(folder: Path, leave: int) -> Callable[[], Callable[[], None]]:
    """Fill a small file system up to `leave` bytes."""

    def fill() -> Callable[[], None]:
        ballast = folder / "ballast"

        def write() -> None:
            status = os.statvfs(folder)
            ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - leave))

        on_rank_0(write)
        return lambda: ballast.unlink(missing_ok=True) if dist.get_rank() == 0 else None

    return fill


def limit_files(rank: int) -> Callable[[], Callable[[], None]]:
    """One rank's files cannot grow beyond a page: the operating system refuses its writes."""

    def fill() -> Callable[[], None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return fill


def held() -> int:
    """Bytes of checkpoints that lie in host memory."""
    return sum(len(piece) for each in gc.get_objects() if isinstance(each, writer.Copy) for piece in each.pieces)


def background(case: list[str], topology: Topology, folder: Path) -> dict:
    """A save from a thread that is held up while training goes on, against one at the same step that waited; the next save
    waits for it, and then one that meets a full disk."""
    config = config_of([*case, f"training.output_dir={folder}"])
    engine = engine_of(config, topology)
    train(engine, 0, 2)
    waited = manifest.verify(checkpoint.save(engine, folder / "waited", 2, {"consumed_samples": 16}, keep_last=2))
    gate, wait, begin = threading.Event(), writer.BackgroundWriter._write, saving.begin
    published: list[Path] = []
    copies, out = [], folder / "copied"

    def gated(self, path: Path, fill) -> None:
        gate.wait()
        wait(self, path, fill)

    def counted(*args, **kwargs):
        copies.append(held())  # of the save before
        return begin(*args, **kwargs)

    writer.BackgroundWriter._write, saving.begin = gated, counted  # type: ignore[method-assign,assignment]
    group = dist.new_group(backend="gloo")
    saver = saving.Saver(engine, out, 2, group, background=True, published=published.append)
    saver.save(2, {"consumed_samples": 16})
    full = held()
    for step in range(2, 5):
        train(engine, step, step + 1)
        saver.poll()
    before = {"names": names(out), "published": len(published), "copy": full, "still": held()}
    dist.barrier()
    delay = 0.5 * (1 + dist.get_rank())
    threading.Timer(delay, gate.set).start()
    began = time.monotonic()
    saver.save(5, {"consumed_samples": 40})
    took, on_return = time.monotonic() - began, [path.name for path in published]
    saver.finish()
    saver.finish()  # nothing is in flight
    again = manifest.verify(out / "checkpoints" / "step-00000002")
    fresh = engine_of(config_of([*case, "training.seed=7"]), topology)
    checkpoint.load(fresh, checkpoint.newest_intact(out))
    straight, resumed = train(engine, 5, 7), train(fresh, 5, 7)
    fresh.close()
    undo = limit_files(1)()
    saver.save(8, {})
    train(engine, 7, 8)
    said = attempt(lambda: (saver.poll(), time.sleep(1), saver.poll(), saver.finish()))
    undo()
    left = names(out)
    saver.save(8, {})
    saver.finish()
    writer.BackgroundWriter._write, saving.begin = wait, begin  # type: ignore[method-assign]
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint writer"]
    engine.close()
    dist.barrier()
    size = sum(entry["size"] for name, entry in waited.body["files"].items())
    return {
        "before": before, "took": took, "delay": delay, "on_return": on_return, "copies": copies, "after": held(), "size": size,
        "same": again.body["files"] == waited.body["files"], "straight": straight, "resumed": resumed, "said": said,
        "left": left, "newest": names(out), "threads": threads, "state": again.body["state"],
    }


def main(directory: Path, with_nvme: bool, small_disk: Path | None) -> None:
    get_accelerator().is_fp16_supported = lambda: True
    topology = groups.initialize(config_of([]).parallel)
    out: dict = {}
    began = time.monotonic()

    def record(name: str, value: dict) -> None:
        every: list = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        out[name] = every
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
            (directory / "results.json").write_text(json.dumps(out))

    record("damage", damage(topology, directory / "damage"))
    for rank in (0, 1):
        for name in ("zero0", "zero3"):
            folder = directory / f"refused-{name}-{rank}"
            record(f"refused {name} {rank}", full_disk(ZERO[name], topology, folder, limit_files(rank)))
    if small_disk is not None:
        record("full disk", full_disk(ZERO["zero1"], topology, small_disk, fill_disk(small_disk, 3 << 20)))
    record("mismatches", mismatches(topology, directory / "mismatches"))
    topology = regroup([])
    for name in ("zero0", "zero1", "zero3"):
        record(f"background {name}", background(ZERO[name], topology, directory / f"background-{name}"))
    for name, case in RESUMED.items():
        if name.startswith("tp2") and topology.tp_size == 1:
            topology = regroup(SHARDED)
        if name.startswith("cp2") and topology.cp_size == 1:
            topology = regroup(SHARED)
        record(f"resume {name}", resume(case, topology, directory / name.replace(" ", "-")))
    topology = regroup([])
    if with_nvme:
        for name, case in NVME.items():
            folder = directory / name.replace(" ", "-")
            record(f"resume {name}", resume([*case, f"engine.nvme_path={directory / 'nvme'}"], topology, folder))
        case = [*NVME["zero3 nvme"], f"engine.nvme_path={directory / 'nvme'}", "training.precision=fp16"]
        record("resume zero3 nvme fp16", resume(case, topology, directory / "zero3-nvme-fp16"))
    groups.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "nvme", None if sys.argv[3] == "-" else Path(sys.argv[3]))
