"""Checkpoints of a fine-tuning run: Hugging Face directories with what a resume needs beside the model.

output_dir/checkpoint-<step>/ holds the model (safetensors), config.json and the tokenizer, loadable as they are;
optimizer-<rank>.pt of every rank that has states of its own; and trainer_state.json, written last, with the sizes of
all files. A directory appears by one rename, when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.from_hf import read_sections
from mka_megatron.config.hf_sections import SECTIONS, to_json
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import gated
from mka_megatron.hf.ranks import Ranks

STATE = "trainer_state.json"
_PREFIX = "checkpoint-"


def newest(output_dir: Path) -> Path | None:
    """The checkpoint of the most steps; None where there is none."""
    steps = [path.name.removeprefix(_PREFIX) for path in output_dir.glob(f"{_PREFIX}*") if (path / STATE).is_file()]
    found = [int(step) for step in steps if step.isdigit()]
    return output_dir / f"{_PREFIX}{max(found)}" if found else None


def read(folder: Path, architecture: Config, fixed: dict[str, Any]) -> dict[str, Any]:
    """What `save` was given as `state`.

    Args:
        folder: a checkpoint.
        architecture: whose attention, routing and memory_hierarchy the checkpoint must have.
        fixed: by key, what must be as state["fixed"] has it.

    Raises:
        ConfigError: a file that is not as it was written, or a checkpoint of another run.
    """
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files, state = content["files"], content["state"]
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(folder, STATE) from None
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise _damaged(folder, name)
    sections = read_sections(str(folder))
    if (sections is not None) != gated(architecture):
        raise _other(folder, "attention.variant")
    if sections is not None:
        attention, routing, memory = sections
        there = to_json(Config(attention=attention, routing=routing, memory_hierarchy=memory))
        here = to_json(architecture)
        for name in SECTIONS:
            if there[name] != here[name]:
                raise _other(folder, name)
    for key, value in fixed.items():
        if state["fixed"].get(key) != value:
            raise _other(folder, f"{key} {show(state['fixed'].get(key))}")
    return state


def save(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ranks: Ranks, output_dir: Path, tokenizer: str | None,
    state: dict[str, Any], keep_last: int,
) -> Path:  # fmt: skip
    """Write the checkpoint of `state["step"]`; a collective call, the path is the same on every rank.

    Args:
        tokenizer: directory whose tokenizer files go along; None: there is none.
        state: plain JSON values, among them "step".
        keep_last: checkpoints kept, this one included.

    Raises:
        OSError: the disk refuses.
    """
    final = output_dir / f"{_PREFIX}{state['step']}"
    temporary = output_dir / f".{final.name}.writing"
    if ranks.rank == 0:
        for leftover in output_dir.glob(f".{_PREFIX}*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    ranks.barrier()
    if ranks.tp_size > 1 or ranks.rank == 0:  # sharded weights are gathered from every rank
        model.save_pretrained(temporary, is_main_process=ranks.rank == 0, state_dict=_untied(model))
    if ranks.tp_size > 1 or ranks.rank == 0:
        content = {"optimizer": _local(optimizer.state_dict()), "rng": _rng()}
        torch.save(content, temporary / _optimizer_name(ranks))
    ranks.barrier()
    if ranks.rank == 0:
        if tokenizer is not None:
            _copy_tokenizer(Path(tokenizer), temporary)
        _publish(temporary, final, state)
        _prune(output_dir, keep_last)
    ranks.barrier()
    return final


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Bring the optimizer of a model loaded from `folder`, and the random generators, to where `save` found them.

    Raises:
        ConfigError: written by other ranks or of another model.
    """
    path = folder / _optimizer_name(ranks)
    if not path.is_file():
        raise ConfigError(f"The checkpoint {folder} has no {path.name}: it was written with another tp_size or number of "
                          "processes; resume with those, or choose another output_dir.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(_spread(content["optimizer"], optimizer))
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"The checkpoint {folder} is not usable: {path.name} does not fit this run "
                          f"({str(error).splitlines()[0]}); choose another output_dir.") from None
    torch.set_rng_state(content["rng"]["cpu"])
    if ranks.device.type == "cuda" and content["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(content["rng"]["cuda"])


def _untied(model: nn.Module) -> dict[str, Any]:
    """The model's state with every tied weight once: gathered from ranks, its names would be tensors of their own."""
    once = {name for name, _ in model.named_parameters()}
    repeated = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in model.state_dict().items() if name not in repeated}


def _damaged(folder: Path, name: str) -> ConfigError:
    return ConfigError(f"The checkpoint {folder} is not intact: {name} is missing or damaged; remove that directory, or "
                       "choose another output_dir.")


def _other(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"The checkpoint {folder} was written with another configuration ({what}): set it back, or choose "
                       "another output_dir.")


def _optimizer_name(ranks: Ranks) -> str:
    """One file per rank where weights are spread; replicas hold the same, in one."""
    return f"optimizer-{ranks.rank if ranks.tp_size > 1 else 0:05d}-of-{ranks.size if ranks.tp_size > 1 else 1:05d}.pt"


def _rng() -> dict[str, Tensor | None]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _local(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with this rank's part of every spread tensor."""
    own = {index: {name: value.to_local() if isinstance(value, DTensor) else value for name, value in each.items()}
           for index, each in state["state"].items()}  # fmt: skip
    return {"state": own, "param_groups": [{"params": group["params"]} for group in state["param_groups"]]}


def _spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse of `_local`, with the hyperparameters that `optimizer` has."""
    present = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in present] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("it is of another model")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {}
    for index, each in state["state"].items():
        parameter = parameters[index]
        own[index] = {name: _as(value, parameter) if value.dim() else value for name, value in each.items()}
    return {"state": own, "param_groups": present}


def _as(value: Tensor, parameter: Tensor) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if value.shape != local.shape:
        raise ValueError(f"a state of shape {list(value.shape)} for a parameter of shape {list(local.shape)}")
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value.to(local.device), parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja"):
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _publish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    sizes = {}
    for path in sorted(temporary.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    with open(temporary / STATE, "w", encoding="utf-8") as file:
        json.dump({"state": state, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # not intact, or it would have been gone on from
        shutil.rmtree(final)
    temporary.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(output_dir: Path, keep_last: int) -> None:
    present = sorted(int(path.name.removeprefix(_PREFIX)) for path in output_dir.glob(f"{_PREFIX}[0-9]*"))
    for step in present[:-keep_last]:
        shutil.rmtree(output_dir / f"{_PREFIX}{step}")
