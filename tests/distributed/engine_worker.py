"""Worker: trains every case; rank 0 writes what the steps returned, and what a plain PyTorch loop gets.

python -m torch.distributed.run --nproc_per_node=2 engine_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from megatron.core import parallel_state

from mka_megatron.config.schema import Config
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import NonFiniteError
from tests.helpers.engine_runs import (
    config_of,
    engine_of,
    global_batch,
    micro_batches,
    model_of,
    stack,
    train,
)

HALF_STEPS = 6
VARIANT_STEPS = 3
OVERFLOW_STEPS = 10
ZERO = {f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)}
CPU = "engine.offload_optimizer=cpu"
OFFLOAD = {
    "zero1 cpu": [*ZERO["zero1"], CPU],
    "zero2 cpu": [*ZERO["zero2"], CPU],
    "zero3 cpu": [*ZERO["zero3"], CPU],
    "zero3 cpu, parameters cpu": [*ZERO["zero3"], CPU, "engine.offload_param=cpu"],
    "zero3 parameters cpu": [*ZERO["zero3"], "engine.offload_param=cpu"],
}
NVME = {
    "zero3 nvme": [*ZERO["zero3"], "engine.offload_optimizer=nvme"],
    "zero3 nvme, parameters nvme": [*ZERO["zero3"], "engine.offload_optimizer=nvme", "engine.offload_param=nvme"],
    "zero3 cpu, parameters nvme": [*ZERO["zero3"], CPU, "engine.offload_param=nvme"],
}
# What ZeRO-3's module hooks meet: every kind of module, tied and untied heads, both recomputations.
VARIANTS = {
    "gqa, q/k-norm, untied": ["attention.variant=gqa", "model.qk_norm=true", "model.tie_embeddings=false"],
    "mla": ["attention.variant=mla", "attention.mla.q_lora_rank=24"],
    "mka output": ["attention.variant=mka", "attention.mixture=output"],
    "mka score, group": ["attention.variant=mka", "attention.mixture=score", "routing.scope=group"],
    "fastmka, gate on x": ["routing.gate_input=x", "memory_hierarchy.l2.decay=head"],
    "fastmka, selective recomputation": ["training.recompute=selective"],
    "fastmka, full recomputation": ["training.recompute=full"],
}
SHARDED = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]


def reference(config: Config, topology: Topology, dtype: torch.dtype, steps: int, loss_scale: float = 1.0) -> dict:
    """The same model, batches and schedule in a plain loop on one rank: fp32 masters, whole batch, torch's AdamW."""
    model = model_of(config, topology).to(dtype)
    training = config.training
    masters = [parameter.detach().float().clone() for parameter in model.parameters()]
    matrices = [i for i, (name, p) in enumerate(model.named_parameters())
                if p.dim() > 1 and "bias" not in name and "decay" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": [masters[i] for i in matrices], "weight_decay": training.weight_decay},
         {"params": [m for i, m in enumerate(masters) if i not in matrices], "weight_decay": 0.0}],
        betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps, foreach=False,
    )
    losses, norms = [], []
    for step in range(steps):
        done = step + 1
        if done <= training.warmup_steps:
            rate = training.learning_rate * done / training.warmup_steps
        else:
            progress = (done - training.warmup_steps) / (training.steps - training.warmup_steps)
            span = training.learning_rate - training.min_learning_rate
            rate = training.min_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
        batch = stack(global_batch(step))
        labels = int((batch.labels >= 0).sum())
        loss = model(batch.tokens, batch.documents, batch.labels).sum() / labels
        (loss * loss_scale).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float() / loss_scale
            parameter.grad = None
        norms.append(math.sqrt(sum(float(master.grad.double().square().sum()) for master in masters)))
        for master in masters:
            master.grad *= min(1.0, training.clip_grad / norms[-1])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master)
        losses.append(float(loss))
    with torch.no_grad():
        batches = [stack(global_batch(step)) for step in (100, 101)]
        total = sum(float(model(b.tokens, b.documents, b.labels).sum()) for b in batches)
        held_out = total / sum(int((b.labels >= 0).sum()) for b in batches)
    return {"loss": losses, "grad_norm": norms, "evaluation": held_out}


def curve(case: list[str], topology: Topology, steps: int | None = None) -> dict:
    """Steps of the engine, then an evaluation."""
    config = config_of(case)
    engine = engine_of(config, topology)
    done = train(engine, 0, steps or config.training.steps)
    held_out = [batch for step in (100, 101) for batch in micro_batches(step, config, topology)]
    evaluation = engine.evaluate(held_out)
    engine.close()
    return {key: [step[key] for step in done] for key in done[0]} | {"evaluation": evaluation.loss}


class Sabotage:
    """Makes one rank's loss or gradient non-finite in chosen forward passes."""

    def __init__(self, engine, rank: int) -> None:
        self.mode, self.mine = "none", engine.topology.rank == rank
        engine.model.register_forward_hook(self._hook)

    def _hook(self, module, inputs, nll):
        if not self.mine or self.mode == "none" or not torch.is_grad_enabled():
            return nll
        if self.mode == "gradient":
            nll.register_hook(lambda grad: grad * math.nan)
            return nll
        return nll * math.nan if self.mode == "nan" else nll + math.inf  # the latter's gradient is finite


def guard(case: list[str], topology: Topology) -> dict:
    """Bad steps between good ones, against the good ones alone (the rate is constant)."""
    config = config_of([*case, "training.schedule=constant", "training.warmup_steps=0"])
    clean, dirty = [], []
    engine = engine_of(config, topology)
    for step in range(4):
        clean.append(engine.train_step(micro_batches(step, config, topology)).loss)
    engine.close()
    engine = engine_of(config, topology)
    sabotage = Sabotage(engine, rank=1)
    skipped = []
    for step, mode in ((0, "none"), (9, "nan"), (1, "none"), (9, "gradient"), (9, "infinite"), (2, "none"), (3, "none")):
        sabotage.mode = mode
        result = engine.train_step(micro_batches(step, config, topology))
        skipped.append(result.skipped)
        if mode == "none":
            dirty.append(result.loss)
    message = ""
    sabotage.mode = "nan"
    try:
        for _ in range(5):
            engine.train_step(micro_batches(9, config, topology))
    except NonFiniteError as error:
        message = str(error)
    steps = engine.step
    engine.close()
    return {"clean": clean, "dirty": dirty, "skipped": skipped, "message": message, "steps": steps}


def swap_files(directory: Path) -> dict[str, int]:
    """Non-empty swap files by kind."""
    sizes = {path: path.stat().st_size for path in directory.rglob("*.swp")}
    return {
        "optimizer": sum(size > 0 and "optimizer" in path.parts for path, size in sizes.items()),
        "param": sum(size > 0 and "optimizer" not in path.parts for path, size in sizes.items()),
    }


def main(directory: Path, with_nvme: bool) -> None:
    get_accelerator().is_fp16_supported = lambda: True  # slow without fp16 instructions, but the same arithmetic
    topology = groups.initialize(config_of([]).parallel)
    out: dict = {}
    began = time.monotonic()

    def record(name: str, value: dict) -> None:
        every: list = [None] * topology.world_size
        dist.all_gather_object(every, value)
        # Every rank must have seen the same figures.
        out[name] = every[0] | {"ranks_agree": all(repr(each) == repr(every[0]) for each in every)}
        if topology.rank == 0:
            print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
            (directory / "results.json").write_text(json.dumps(out))

    record("reference fp32", reference(config_of([]), topology, torch.float32, 20))
    record("reference bf16", reference(config_of([]), topology, torch.bfloat16, HALF_STEPS))
    record("reference fp16", reference(config_of([]), topology, torch.float16, HALF_STEPS, loss_scale=65536.0))
    for name, case in (ZERO | OFFLOAD).items():
        record(name, curve(case, topology))
    if with_nvme:
        for name, case in NVME.items():
            path = directory / name.replace(" ", "-")
            record(name, curve([*case, f"engine.nvme_path={path}"], topology))
            out[name]["swap_files"] = swap_files(path)
    for name, case in ZERO.items():
        for precision in ("bf16", "fp16"):
            record(f"{name} {precision}", curve([*case, f"training.precision={precision}"], topology, HALF_STEPS))
    for name, case in (ZERO | {"zero3 cpu": OFFLOAD["zero3 cpu"]}).items():
        record(f"guard {name}", guard(case, topology))
    for name in ("zero0", "zero1"):
        record(f"guard {name} bf16", guard([*ZERO[name], "training.precision=bf16"], topology))
    for name in ("zero0", "zero2"):
        overflow = ["training.precision=fp16", "engine.initial_loss_scale_power=22", "training.max_bad_steps=2"]
        record(f"overflow {name}", curve([*ZERO[name], *overflow], topology, OVERFLOW_STEPS))
    for name, case in VARIANTS.items():
        both = {zero: curve([*ZERO[zero], *case], topology, VARIANT_STEPS) for zero in ("zero0", "zero3")}
        record(f"variant {name}", both)
    deterministic = [*ZERO["zero1"], "training.deterministic=true"]
    record("deterministic", {"runs": [curve(deterministic, topology, 5)["loss"] for _ in range(2)]})
    torch.use_deterministic_algorithms(False)
    parallel_state.destroy_model_parallel()
    topology = groups.initialize(config_of(SHARDED).parallel)
    for name, case in ZERO.items():
        record(f"tp2 {name}", curve([*case, *SHARDED], topology))
    groups.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), with_nvme=sys.argv[2] == "nvme")
