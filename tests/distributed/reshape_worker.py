"""Worker: writes checkpoints in one layout and goes on from them in others; what each run did is added to results.

python -m torch.distributed.run --nproc_per_node=N reshape_worker.py PHASE DIRECTORY nvme|no-nvme

first (1 rank): uninterrupted runs, saved in the middle.  second (2 ranks): goes on from those, and saves again what it has
just loaded; trains and saves in its own layouts and goes on in others.  third (1 rank): goes back to one rank.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state
from torch import Tensor

from mka_megatron.data.batch import Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.parallel import groups
from mka_megatron.training import checkpoint
from mka_megatron.training.checkpoint import CheckpointError
from mka_megatron.training.engine import Engine
from mka_megatron.training.start import resume
from tests.helpers.engine_runs import GLOBAL, SEQUENCE, config_of, engine_of, train

# Everything that is cut in its own way: grouped heads, q/k-norm and biases, both heads, a padded vocabulary (5,000 rows),
# a gate that is split by its input, a decay per channel.
MODEL = ["model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4", "model.num_kv_heads=2",
         "model.head_dim=16", "model.qk_norm=true", "model.tie_embeddings=false", "model.vocab_multiple=1000",
         "memory_hierarchy.l2.decay=channel", "routing.gate_hidden_size=6", "training.micro_batch_size=4"]
BLOCK = ["model.tie_embeddings=true", "attention.core=block", "memory_hierarchy.l1.chunk_size=4", "memory_hierarchy.l1.window=8", "routing.scope=group",
         "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2", "data.pad_documents_to_chunks=true"]
SEGMENTS = [*BLOCK, "training.steps=20", "data.reset_at_documents=false", "training.segment_length=16", "training.segments_per_step=1"]
STAGES = {f"zero{stage}": [*MODEL, f"engine.zero_stage={stage}"] for stage in range(4)}
HALVES = {f"{zero} {half}": [*STAGES[zero], f"training.precision={half}"]
          for zero, half in (("zero0", "bf16"), ("zero1", "bf16"), ("zero2", "fp16"))}
NVME = ["engine.zero_stage=3"]  # the helper's model is large enough to be swapped
LAYOUTS = {"dp2": [], "tp2": ["parallel.tensor_parallel=2"], "cp2": ["parallel.context_parallel=2"]}
# trained by two ranks in the first layout, gone on with in the second
TURNS = {
    "tp2 zero3 to dp2 zero1 cpu": ([*STAGES["zero3"], *LAYOUTS["tp2"]], [*STAGES["zero1"], "engine.offload_optimizer=cpu"]),
    "cp2 zero0 to tp2 zero3": ([*STAGES["zero0"], *LAYOUTS["cp2"]], [*STAGES["zero3"], *LAYOUTS["tp2"]]),
    "tp2 block zero2 to dp2 zero2": ([*STAGES["zero2"], *BLOCK, *LAYOUTS["tp2"]], [*STAGES["zero2"], *BLOCK]),
}
# the same with keys of zero_optimization in a DeepSpeed JSON
TUNED = {
    "zero2 to round robin": ("zero2", {}, {"round_robin_gradients": True}),
    "zero1 from round robin": ("zero1", {"round_robin_gradients": True}, {}),
    "zero3 to other sub-groups": ("zero3", {"sub_group_size": 60000}, {"sub_group_size": 40000}),
}
BEFORE, AFTER = 3, 3  # steps
LOSS_SCALE = {"fp16": {"loss_scale_window": 2, "hysteresis": 2, "initial_scale_power": 18}}


def started(case: list[str], folder: Path) -> Engine:
    """A fresh engine in the case's topology."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    config = config_of([*case, f"training.output_dir={folder}"])
    return engine_of(config, groups.initialize(config.parallel))


def losses(engine: Engine, steps: int) -> list[float]:
    """Of the next steps; the block core gets rows of one document, and a segment of them at a time."""
    config, topology, first = engine.config, engine.topology, engine.step
    if config.attention.core == "dense":
        return [step["loss"] for step in train(engine, first, first + steps)]
    found, per_sample = [], 1 if config.training.segment_length is None else 2
    size = config.training.micro_batch_size
    for step in range(first, first + steps):
        tokens = torch.randint(0, 64, (GLOBAL, SEQUENCE + 1), generator=torch.Generator().manual_seed(step // per_sample))
        rows = [Batch(part[:, :-1].clone(), part[:, 1:].clone(), Documents.unpacked(size, SEQUENCE)) for part in tokens.split(size)]
        found.append(engine.train_step(rows[topology.dp_rank :: topology.dp_size]).loss)
    return found


def written(case: list[str], folder: Path) -> dict:
    """Steps, saved after BEFORE of them."""
    engine = started(case, folder)
    losses(engine, BEFORE)
    checkpoint.save(engine, folder, BEFORE, {"consumed_samples": GLOBAL * BEFORE}, keep_last=2)
    scale = engine.loss_scale
    found = {"losses": losses(engine, AFTER), "scale": scale}
    engine.close()
    return found


def resumed(case: list[str], folder: Path, again: Path | None = None) -> dict:
    """What the training loop does with `training.resume: auto`, from another seed; saved again at once under `again`."""
    engine = started([*case, "training.seed=99"], folder)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mka_megatron").addHandler(handler)
    _, state = resume(engine, engine.config.training)
    logging.getLogger("mka_megatron").removeHandler(handler)
    scale = engine.loss_scale
    if again is not None:
        checkpoint.save(engine, again, engine.step, state, keep_last=2)
    found = {"state": state, "step": engine.step, "said": said, "scale": scale, "losses": losses(engine, AFTER)}
    engine.close()
    return found


def tuned(keys: dict, path: Path) -> str:
    """The override for a DeepSpeed JSON with `keys` of zero_optimization, which all ranks write alike."""
    partial = path.with_suffix(f".{dist.get_rank()}")
    partial.write_text(json.dumps({"zero_optimization": keys}))
    partial.replace(path)
    return f"engine.deepspeed_config={path}"


def refused(case: list[str], folder: Path) -> str:
    engine = started(case, folder)
    try:
        resume(engine, engine.config.training)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "no error"


def states(engine: Engine) -> dict[str, Tensor]:
    """Masters, moments and update counts of a single rank, asked of DeepSpeed or PyTorch."""
    optimizer = engine.deepspeed.optimizer
    found = {}
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    copies = {}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        copies = {id(half): full for halves, fulls in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                  for half, full in zip(halves, fulls, strict=True)}
    for name, parameter in engine.model.named_parameters():
        if engine.config.engine.zero_stage:
            found[name] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            master = copies.get(id(parameter), parameter)
            found[name] = master.detach()
            found |= {f"{name} {key}": optimizer.state[master][key] for key in ("exp_avg", "exp_avg_sq")}
    inner = getattr(optimizer, "optimizer", optimizer)
    counts = {float(state["step"]) for state in inner.state.values()}
    return found | {"steps": torch.tensor(sorted(counts))}


def round_trip(case: list[str], folder: Path, again: Path) -> dict:
    """The states of the first checkpoint, loaded by DeepSpeed, against those that went through two ranks."""
    engine = started(case, folder)
    resume(engine, engine.config.training)
    here = {name: value.clone() for name, value in states(engine).items()}
    weights = {name: value.clone() for name, value in engine.model.state_dict().items() if isinstance(value, Tensor)}
    engine.close()
    engine = started([*case, "training.seed=99"], again)
    resume(engine, engine.config.training)
    back, unlike = states(engine), []
    for name, value in here.items():
        if not torch.equal(value, back[name]):
            unlike.append(name)
    for name, value in engine.model.state_dict().items():
        if isinstance(value, Tensor) and not torch.equal(value, weights[name]):
            unlike.append(f"weight {name}")
    live = sum(float(value.abs().sum()) > 0 for name, value in here.items() if "exp_avg" in name)
    found = {"unlike": unlike, "compared": len(here), "moments": live, "losses": losses(engine, AFTER)}
    engine.close()
    return found


def main(phase: str, directory: Path, with_nvme: bool) -> None:
    get_accelerator().is_fp16_supported = lambda: True
    path = directory / "results.json"
    out: dict = json.loads(path.read_text()) if path.exists() else {}
    began = time.monotonic()
    (directory / "scale.json").write_text(json.dumps(LOSS_SCALE))
    cases = {name: [*case, "engine.initial_loss_scale_power=18", f"engine.deepspeed_config={directory / 'scale.json'}"]
             if "fp16" in name else case for name, case in (STAGES | HALVES).items()}

    def record(name: str, value: dict | str) -> None:
        every: list = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        out[name] = every
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
            path.write_text(json.dumps(out))

    if phase == "first":
        for name, case in cases.items():
            record(f"first {name}", written(case, directory / name))
        record("first segments", segments(directory / "segments"))
        record("first mla", written([*STAGES["zero1"], "model.qk_norm=false", "attention.variant=mla"], directory / "mla"))
        if with_nvme:
            record("first nvme", written(NVME, directory / "nvme"))
    if phase == "second":
        for name, case in cases.items():
            for layout, more in LAYOUTS.items() if name in STAGES else [("tp2", LAYOUTS["tp2"])]:
                record(f"second {name} {layout}", resumed([*case, *more], directory / name, directory / f"{name} {layout}"))
        for name, (one, other) in TURNS.items():
            record(f"straight {name}", written(one, directory / name))
            record(f"turned {name}", resumed(other, directory / name))
        for name, (stage, one, other) in TUNED.items():
            record(f"straight {name}", written([*STAGES[stage], tuned(one, directory / f"{name} 1.json")], directory / name))
            record(f"turned {name}", resumed([*STAGES[stage], tuned(other, directory / f"{name} 2.json")], directory / name))
        mla = [*STAGES["zero1"], "model.qk_norm=false", "attention.variant=mla"]
        record("second mla", resumed(mla, directory / "mla"))
        record("refused mla", refused([*mla, *LAYOUTS["tp2"]], directory / "mla"))
        record("refused segments", refused([*STAGES["zero1"], *SEGMENTS], directory / "segments"))
        record("second segments", resumed([*STAGES["zero1"], *SEGMENTS], directory / "segments-whole"))
        if with_nvme:
            swap = ["engine.offload_optimizer=nvme", f"engine.nvme_path={directory / 'swap'}"]
            record("second nvme", resumed([*NVME, *swap], directory / "nvme", directory / "nvme again"))
    if phase == "third":
        for name, case in cases.items():
            for layout in LAYOUTS if name in STAGES else ("tp2",):
                record(f"third {name} {layout}", round_trip(case, directory / name, directory / f"{name} {layout}"))
        if with_nvme:
            record("third nvme", round_trip(NVME, directory / "nvme", directory / "nvme again"))
    groups.destroy()


def segments(folder: Path) -> dict:
    """Two steps a sample: saved after three, in the middle of a sample, and, in another folder, after four."""
    engine = started([*STAGES["zero1"], *SEGMENTS], folder)
    losses(engine, 3)
    checkpoint.save(engine, folder, 3, {"consumed_samples": 8}, keep_last=2)
    losses(engine, 1)
    checkpoint.save(engine, folder.with_name("segments-whole"), 4, {"consumed_samples": 16}, keep_last=2)
    found = {"losses": losses(engine, AFTER)}
    engine.close()
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "nvme")
