"""Parameters and Adam's moments in a training checkpoint, wherever its ranks have them, read through memory maps a piece
at a time.

What DeepSpeed 0.19 writes, per tensor-parallel rank: whole parameters in the training's precision (ZeRO 0 to 2), fp32
masters beside them (ZeRO 0 in half precision), masters flattened and cut at equal intervals (ZeRO 1, 2), or each master
cut on its own (ZeRO 3; with states on NVMe in files of training/swapped.py). Parameters of an optimizer group follow each
other there in the model's order, and the moments lie as the masters do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mka_megatron.config.errors import show
from mka_megatron.model.hf_table import Entry
from mka_megatron.training.manifest import Checkpoint
from mka_megatron.training.optimizer import parameter_groups
from mka_megatron.training.shard_files import ShardFiles

Table = dict[str, Entry]
Value = Literal["weights", "masters", "exp_avg", "exp_avg_sq"]
"""Weights are in the training's precision, the others in fp32."""


class _Piece(NamedTuple):
    """`length` elements from `start` of the tensor at `path` in `file`, flattened."""

    file: str
    path: tuple[str | int, ...]
    start: int
    length: int


Pieces = dict[str, list[_Piece]]
"""Parameter -> what it consists of on one tensor-parallel rank, in order."""


class Shards:
    """Every tensor-parallel rank's parameters and moments.

    Args:
        checkpoint: verified.
        table: of the checkpoint's own model and tensor-parallel size.

    Its methods raise ConfigError where a file is missing or is not what a training writes, or the parameters are not
    those of `table`.
    """

    def __init__(self, checkpoint: Checkpoint, table: Table) -> None:
        self._files = ShardFiles(checkpoint)
        self._reader = _Reader(self._files, table, checkpoint)
        self.ranks = self._reader.ranks
        self._found: dict[tuple[int, Value], Pieces] = {}

    def fragments(self, value: Value, name: str, rank: int, start: int, length: int) -> Iterator[Tensor]:
        """[start, start + length) of the flattened `value` of the parameter `name` of a rank, as consecutive flat views.

        Nothing where a parameter has no moments: it never had a gradient.
        """
        position = 0
        for piece in self._pieces(rank, value)[name]:
            low, high = max(start, position), min(start + length, position + piece.length)
            if low < high:
                flat = self._files.tensor(piece.file, piece.path).flatten()
                offset = piece.start + low - position
                self._files.account((high - low) * flat.element_size())
                yield flat[offset : offset + high - low]
            position += piece.length

    def adam_steps(self) -> float | None:
        """Updates that the moments have seen, for the bias correction; None before the first."""
        return self._reader.adam_steps()

    def check(self, value: Value) -> None:
        """Find every rank's `value` now."""
        for rank in range(self.ranks):
            self._pieces(rank, value)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces(0, "weights")

    def _pieces(self, rank: int, value: Value) -> Pieces:
        if (rank, value) not in self._found:
            self._found[rank, value] = self._reader.pieces(rank, value)
        return self._found[rank, value]


class _Reader:
    """Finds the parameters of one rank in the files that the layout wrote."""

    def __init__(self, files: ShardFiles, table: Table, checkpoint: Checkpoint) -> None:
        self.files = files
        layout = checkpoint.body["layout"]
        try:
            self.ranks = int(layout["parallel.tensor_parallel"])
            self.stage = int(layout["engine.zero_stage"])
            self.precision = str(layout["training.precision"])
            self.swapped = "nvme" in (layout["engine.offload_optimizer"], layout["engine.offload_param"])
            self.partitions = int(layout["parallel.data_parallel"]) * int(layout["parallel.context_parallel"])
        except (KeyError, TypeError, ValueError) as error:
            raise files.unknown("manifest.json", f"its layout lacks {error}") from None
        self.shapes = {name: entry.shard(self.ranks) for name, entry in table.items()}

    def pieces(self, rank: int, value: Value) -> Pieces:
        """Where the `value` of each parameter of `rank` is, and its buffers."""
        if self.swapped:
            groups = self._recorded(f"deepspeed/swapped-{rank:05d}.pt")
            return self._each_cut(groups, [self._swapped(rank, i, value) for i in range(self.partitions)])
        prefix = "zero_pp_rank_0_" if self.stage == 3 else ""
        model = f"deepspeed/{prefix}mp_rank_{rank:02d}_model_states.pt"
        module = self._module(model)
        if self.stage == 3:
            flats = [self._flats(rank, i, value) for i in range(self.partitions)]
            return self._each_cut(self._recorded(model), flats) | module
        if value == "weights" or (value == "masters" and self.precision == "fp32"):
            whole = {name for name in self.shapes if name not in module}
            return {name: [self._all(model, ("module", name))] for name in whole} | module
        if self.stage:
            flats = [self._flats(rank, i, value) for i in range(self.partitions)]
            return self._cut_at_intervals(model, rank, flats) | module
        return self._one_by_one(model, value) | module

    def adam_steps(self) -> float | None:
        """Of :meth:`Shards.adam_steps`; all parameters have the same, or none."""
        file, states, groups = self._adam()
        steps = {float(state["step"]) for state in states if "step" in state}
        if not steps and states:  # some fused Adams count per group
            steps = {float(group["step"]) for group in groups if "step" in group}
        if len(steps) > 1:
            raise self.files.unknown(file, f"its parameters have seen {' and '.join(map(str, sorted(steps)))} updates")
        return steps.pop() if steps else None

    def _adam(self) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
        """A file of the first rank's with a part of the optimizer's state, the parts of that state, and the groups."""
        if self.swapped:
            files = [piece.file for piece in self._swapped(0, 0, "masters")]
            return files[0], [self.files.state(file) for file in files], []
        if self.stage:
            file = self._optimizer(0, 0)
            inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
            state = self.files.state(file).get("optimizer_state_dict", {}).get(inner)
        else:
            file = "deepspeed/mp_rank_00_model_states.pt"
            state = self.files.state(file).get("optimizer")
            if self.precision != "fp32" and isinstance(state, dict):
                state = state.get("optimizer_state_dict")
        if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
            raise self.files.unknown(file, "it has no optimizer's state")
        return file, [part for part in state["state"].values() if part], list(state["param_groups"])

    def _module(self, model: str) -> Pieces:
        """The buffers; raises ConfigError unless the model of the file has the table's parameters and no others."""
        module = self.files.state(model).get("module")
        if not isinstance(module, dict):
            raise self.files.unknown(model, "it has no module")
        names = {name for name, value in module.items() if isinstance(value, Tensor)}
        unlisted = {name for name in names - set(self.shapes) if not name.endswith(".planes")}  # of exact selection
        if unlisted:
            raise self.files.unknown(model, f"the parameter {show(min(unlisted))} is unknown")
        if missing := set(self.shapes) - names:
            raise self.files.unknown(model, f"the parameter {min(missing)} is missing")
        whole = self.stage < 3
        for name, shape in self.shapes.items():
            if (whole or name.endswith(".planes")) and tuple(module[name].shape) != shape:
                raise self.files.unknown(model, f"{name} has the shape {show(list(module[name].shape))}, not {show(list(shape))}")
        return {name: [self._all(model, ("module", name))] for name in self.shapes if name.endswith(".planes")}

    def _all(self, file: str, path: tuple[str | int, ...]) -> _Piece:
        return _Piece(file, path, 0, self.files.tensor(file, path).numel())

    def _one_by_one(self, model: str, value: Value) -> Pieces:
        """ZeRO 0: a tensor per parameter, in the order of the optimizer's groups."""
        found: Pieces = {}
        half = ("optimizer_state_dict",) if self.precision != "fp32" else ()
        held = self.files.state(model).get("optimizer") or {}
        states = (held.get("optimizer_state_dict") or {} if half else held).get("state") or {}
        count = 0
        for group, names in enumerate(self._groups()):
            for index, name in enumerate(names):
                path: tuple[str | int, ...] = ("optimizer", *half, "state", count, value)
                if value == "masters":
                    path = ("optimizer", "fp32_groups", group, index)
                found[name] = [self._all(model, path)] if value == "masters" or states.get(count) else []
                for piece in found[name]:
                    if piece.length != math.prod(self.shapes[name]):
                        raise self.files.unknown(model, f"{value} of {name} has {piece.length} elements")
                count += 1
        return found

    def _cut_at_intervals(self, model: str, rank: int, flats: list[list[_Piece]]) -> Pieces:
        """ZeRO 1 and 2: the groups' parameters one after the other (padded, on request), cut without regard to them."""
        paddings = self.files.state(self._optimizer(rank, 0))["optimizer_state_dict"].get("param_alignment_paddings")
        found: Pieces = {}
        for group, names in enumerate(self._recorded(model)):
            partitions = [of_rank[group] for of_rank in flats]
            position = 0
            for index, name in enumerate(names):
                length = math.prod(self.shapes[name])
                found[name] = list(_cut(partitions, position, length))
                if sum(piece.length for piece in found[name]) != length:
                    raise self.files.unknown(model, f"the masters end before {name} does")
                position += length + (paddings[group][index] if paddings else 0)
        return found

    def _each_cut(self, groups: list[list[str]], flats: list[list[_Piece]]) -> Pieces:
        """ZeRO 3: every parameter in as many equal parts as there are ranks; sub-groups hold whole such parts."""
        found: Pieces = {}
        for index, subgroups in enumerate(flats):
            rest = iter(subgroups)
            here = next(rest)
            for name in (name for group in groups for name in group):
                length = math.prod(self.shapes[name])
                share = -(-length // self.partitions)
                if not here.length:
                    here = next(rest, here)
                if here.length < share:
                    raise self.files.unknown(here.file, f"the masters end before {name} does")
                kept = max(0, min(share, length - index * share))
                found.setdefault(name, []).append(here._replace(length=kept))
                here = here._replace(start=here.start + share, length=here.length - share)
            if here.length or next(rest, None) is not None:
                raise self.files.unknown(here.file, "it holds more masters than the model has parameters")
        return found

    def _optimizer(self, rank: int, partition: int) -> str:
        prefix = "bf16_" if self.precision == "bf16" else ""
        return f"deepspeed/{prefix}zero_pp_rank_{partition}_mp_rank_{rank:02d}_optim_states.pt"

    def _flats(self, rank: int, partition: int, value: Value) -> list[_Piece]:
        """A partition's flat tensors: one per group (ZeRO 1, 2) or sub-group (ZeRO 3)."""
        file = self._optimizer(rank, partition)
        masters = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        state = self.files.state(file).get("optimizer_state_dict")
        flats = state.get(masters) if isinstance(state, dict) else None
        if not isinstance(flats, list) or not flats:
            raise self.files.unknown(file, f"it has no {masters}")
        if value in ("weights", "masters"):
            return [self._all(file, ("optimizer_state_dict", masters, index)) for index in range(len(flats))]
        inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return [self._all(file, ("optimizer_state_dict", inner, "state", index, value)) for index in range(len(flats))]

    def _swapped(self, rank: int, partition: int, value: Value) -> list[_Piece]:
        """tensor-parallel ranks are next to each other, then context-parallel ones, then replicas."""
        prefix = f"deepspeed/swapped-{rank + self.ranks * partition:05d}"
        count = max(1, len(self.files.names(rf"{prefix}-\d+\.pt")))
        files = [f"{prefix}-{index:05d}.pt" for index in range(count)]
        key = "master" if value in ("weights", "masters") else value
        return [self._all(file, (key,)) for file in files]

    def _recorded(self, model: str) -> list[list[str]]:
        """The optimizer's groups as the file has them."""
        groups = self.files.state(model).get("param_shapes")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise self.files.unknown(model, "it has no param_shapes")
        recorded = {name: tuple(shape) for group in groups for name, shape in group.items()}
        expected = {name: shape for name, shape in self.shapes.items() if not name.endswith(".planes")}
        for name in sorted(set(recorded) | set(expected)):
            if recorded.get(name) != expected.get(name):
                raise self.files.unknown(model, f"{name} has the shape {show(recorded.get(name))}, not {show(expected.get(name))}")
        return [list(group) for group in groups]

    def _groups(self) -> list[list[str]]:
        """The optimizer's groups as the training makes them, where the files do not say."""
        named = _Named({name: shape for name, shape in self.shapes.items() if not name.endswith(".planes")})
        names = {id(parameter): name for name, parameter in named.named_parameters()}
        return [[names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(named, 0.0)]


class _Named(nn.Module):
    """Parameters of given names and shapes, without storage."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._named = [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items()]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named)


def _cut(partitions: list[_Piece], start: int, length: int) -> Iterator[_Piece]:
    """[start, start + length) of the partitions one after the other."""
    position = 0
    for piece in partitions:
        low, high = max(start, position), min(start + length, position + piece.length)
        if low < high:
            yield piece._replace(start=piece.start + low - position, length=high - low)
        position += piece.length
