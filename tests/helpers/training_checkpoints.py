"""Training checkpoints without a training: DeepSpeed's and training/swapped.py's files around given parameters."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.model.hf_table import hf_table
from mka_megatron.training import manifest

SHAPE = ["model.vocab_size=40", "model.vocab_multiple=32", "model.num_layers=2", "model.hidden_size=24", "model.head_dim=6",
         "model.ffn_hidden_size=28", "model.num_attention_heads=4", "model.num_kv_heads=2", "routing.gate_hidden_size=5"]


def config_of(*overrides: str) -> Config:
    # not the cache of whoever runs the tests, which may hold tokenizers
    return load_config([], [*SHAPE, "data.cache_dir=no-cache", *overrides])


def parameters(config: Config, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random fp32 parameters of each tensor-parallel rank, those that are not split equal on all."""
    generator, ranks = torch.Generator().manual_seed(seed), config.parallel.tensor_parallel
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, entry in hf_table(config, config.model.vocab_size or 40).items():
        for rank in range(ranks):
            if name.endswith("planes"):
                found[rank][name] = torch.randint(0, 2, entry.shape, generator=torch.Generator().manual_seed(1)).mul(2).sub(1).char()
            elif rank and not entry.split:
                found[rank][name] = found[0][name]
            else:
                found[rank][name] = torch.randn(entry.shard(ranks), generator=generator)
    return found


def write(folder: Path, config: Config, shards: Sequence[dict[str, Tensor]], partitions: int = 1, *, subgroup: int = 10**9,
          layout: dict[str, Any] | None = None) -> Path:
    """A checkpoint of `config.engine.zero_stage` whose replicas are `partitions`; sub-groups hold about `subgroup` elements."""
    (folder / "deepspeed").mkdir(parents=True)
    stage, swapped = config.engine.zero_stage, config.engine.offload_optimizer == "nvme"
    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.training.precision]
    prefix = "bf16_" if config.training.precision == "bf16" else ""
    for rank, shard in enumerate(shards):
        trained = {name: tensor for name, tensor in shard.items() if tensor.is_floating_point()}
        groups = [[name for name in trained if matrix(name, trained[name]) == wanted] for wanted in (True, False)]
        module: dict[str, Any] = OrderedDict((name, tensor if half is None or name not in trained else tensor.to(half))
                                             for name, tensor in shard.items())
        module["output_layer._extra_state"] = None
        if stage == 3:
            module |= {name: torch.empty(0) for name in trained}
        model = {"module": module, "param_shapes": None, "optimizer": None, "ds_version": "0.19.8"}
        if stage:
            model["param_shapes"] = [OrderedDict((name, trained[name].shape) for name in group) for group in groups]
        elif half is not None:
            model["optimizer"] = {"fp32_groups": [[trained[name] for name in group] for group in groups]}
        for part in range(partitions):
            if swapped:
                shapes = [{name: list(trained[name].shape) for name in group} for group in groups]
                torch.save({"param_shapes": shapes},
                           folder / f"deepspeed/swapped-{rank + len(shards) * part:05d}.pt")
                for index, flat in enumerate(each_cut(groups, trained, part, partitions, subgroup)):
                    torch.save({"master": flat, "step": torch.tensor(1.0)},
                               folder / f"deepspeed/swapped-{rank + len(shards) * part:05d}-{index:05d}.pt")
                continue
            state: dict[str, Any]
            if stage == 3:
                state = {"fp32_flat_groups": each_cut(groups, trained, part, partitions, subgroup)}
                torch.save(model, folder / f"deepspeed/zero_pp_rank_{part}_mp_rank_{rank:02d}_model_states.pt")
            else:
                flats = [torch.cat([trained[name].flatten() for name in group]) for group in groups]
                state = {"single_partition_of_fp32_groups": [interval(flat, part, partitions) for flat in flats]}
            if stage:
                torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"},
                           folder / f"deepspeed/{prefix}zero_pp_rank_{part}_mp_rank_{rank:02d}_optim_states.pt")
        if stage < 3:
            torch.save(model, folder / f"deepspeed/mp_rank_{rank:02d}_model_states.pt")
    publish(folder, config, {
        "parallel.tensor_parallel": len(shards), "parallel.context_parallel": 1, "parallel.data_parallel": partitions,
        "engine.zero_stage": stage, "engine.offload_optimizer": config.engine.offload_optimizer,
        "engine.offload_param": config.engine.offload_param, "training.precision": config.training.precision,
    } | (layout or {}))
    return folder


def publish(folder: Path, config: Config, layout: dict[str, Any] | None = None, state: dict[str, Any] | None = None) -> None:
    """(Re)write the manifest for whatever lies in `folder`."""
    if layout is None:
        layout = manifest.read(folder)["layout"]
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in sorted(folder.rglob("*.pt"))}
    manifest.write(folder, {"step": 7, "state": state or {}, "engine": {}, "layout": layout, "config": dataclasses.asdict(config),
                            "files": files})


def matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() > 1 and not name.rpartition(".")[2].startswith(("bias", "decay", "beta"))


def interval(flat: Tensor, part: int, partitions: int) -> Tensor:
    """What DeepSpeed keeps of one partition: padding is dropped from the last."""
    size = -(-len(flat) // (2 * partitions)) * 2
    return flat[part * size : (part + 1) * size].clone()


def each_cut(groups: list[list[str]], trained: dict[str, Tensor], part: int, partitions: int, subgroup: int) -> list[Tensor]:
    """One rank's sub-groups under ZeRO 3."""
    found: list[Tensor] = []
    for group in groups:
        pieces: list[Tensor] = []
        for name in group:
            flat = trained[name].flatten()
            size = -(-len(flat) // partitions)
            padded = torch.cat([flat, torch.full((size * partitions - len(flat),), float("nan"))])
            pieces.append(padded[part * size : (part + 1) * size])
            if sum(map(len, pieces)) >= subgroup or name == group[-1]:
                found.append(torch.cat(pieces))
                pieces = []
    return found
