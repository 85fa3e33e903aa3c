"""Hugging Face weights -> any tensor-parallel size and ZeRO stage, each rank reading only its slices.

One table serves Qwen2/2.5, Qwen3 and Llama: their tensors have the same names, and which of the
optional ones exist (QKV bias, q/k-norm, untied head) the model itself says. A row names a Megatron
parameter, its Hugging Face sources, and how the rows or columns of the sources are laid out in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.parallel.groups import Topology

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Run:
    """`length` consecutive rows (or columns) of the Hugging Face tensor `source`, from `start`."""

    source: str
    start: int
    length: int


Layout = Callable[[Config], list[Run]]
"""The whole parameter along its partitioned dimension, as runs of its sources in order."""


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made: `layout` of the unsharded tensor along `dim`; no layout: copied whole."""

    layout: Layout | None
    source: str = ""
    dim: int = 0


def _qkv(suffix: str) -> Layout:
    def layout(config: Config) -> list[Run]:
        model, runs = config.model, []
        queries = model.num_attention_heads // model.num_kv_heads * model.head_dim
        for group in range(model.num_kv_heads):
            runs.append(Run(f"self_attn.q_proj.{suffix}", group * queries, queries))
            runs.append(Run(f"self_attn.k_proj.{suffix}", group * model.head_dim, model.head_dim))
            runs.append(Run(f"self_attn.v_proj.{suffix}", group * model.head_dim, model.head_dim))
        return runs

    return layout


def _gate_and_up(config: Config) -> list[Run]:
    # a rank holds its rows of the gate, then its rows of the up-projection
    ffn, tp = config.model.ffn_hidden_size, config.parallel.tensor_parallel
    runs = []
    for rank in range(tp):
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            runs.append(Run(name, rank * (ffn // tp), ffn // tp))
    return runs


def _one(source: str, size: Callable[[Config], int]) -> Layout:
    return lambda config: [Run(source, 0, size(config))]


LAYER_RULES: dict[str, Rule] = {
    "input_layernorm.weight": Rule(None, "input_layernorm.weight"),
    "self_attention.linear_qkv.weight": Rule(_qkv("weight")),
    "self_attention.linear_qkv.bias": Rule(_qkv("bias")),
    "self_attention.q_layernorm.weight": Rule(None, "self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": Rule(None, "self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": Rule(
        _one("self_attn.o_proj.weight", lambda c: c.model.num_attention_heads * c.model.head_dim), dim=1
    ),
    "pre_mlp_layernorm.weight": Rule(None, "post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": Rule(_gate_and_up),
    "mlp.linear_fc2.weight": Rule(_one("mlp.down_proj.weight", lambda c: c.model.ffn_hidden_size), dim=1),
}
MODEL_RULES: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Rule(_one("model.embed_tokens.weight", lambda c: c.model.vocab_size or 0)),
    "decoder.final_layernorm.weight": Rule(None, "model.norm.weight"),
    "output_layer.weight": Rule(_one("lm_head.weight", lambda c: c.model.vocab_size or 0)),
}
ROUTE = "self_attention.core_attention.route."
"""MKA parameters: `model.layers.N.self_attn.route.*` in the Hugging Face directory, kept as initialised where absent."""


class HFDirectory:
    """The safetensors of a Hugging Face directory, opened lazily and read by slices."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        index = path / "model.safetensors.index.json"
        if index.is_file():
            self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (path / "model.safetensors").is_file():
            self.file_of = {}
            self.file_of = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"model.init_from: {path} has no model.safetensors or model.safetensors.index.json; "
                "save the model with save_pretrained(..., safe_serialization=True)."
            )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(str(self.path / file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"model.init_from: {self.path / file} cannot be read ({error}); copy it again.") from error
        return self._files[file]

    def slice(self, name: str) -> Any:
        """A lazily read view of the tensor `name`; raises ConfigError where the directory lacks it."""
        if name not in self.file_of:
            raise ConfigError(f"model.init_from: {self.path} has no tensor {name}; the checkpoint is incomplete.")
        try:
            return self._open(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(f"model.init_from: tensor {name} in {self.path} cannot be read ({error}); copy it again.") from error

    def __enter__(self) -> HFDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def load_hf_weights(model: nn.Module, config: Config, topology: Topology) -> None:
    """Fill `model` from `config.model.init_from`, one parameter at a time.

    Raises:
        ConfigError: a tensor is missing, unknown, damaged, or has another shape than the configuration says.
    """
    used: set[str] = set()
    with HFDirectory(Path(config.model.init_from or "")) as directory:
        for name, parameter in model.named_parameters():
            values = _read(name, parameter, directory, config, topology, used)
            if values is None:
                continue
            with _writable(parameter, topology.dp_cp_group), torch.no_grad():
                parameter.copy_(values)
        tied = {"lm_head.weight"} if config.model.tie_embeddings else set()
        unknown = sorted(n for n in directory.file_of if n not in used | tied and not _IGNORED.search(n))
        if unknown:
            raise ConfigError(
                f"model.init_from: {directory.path} holds tensors this model has no place for "
                f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); check model and attention against its config.json."
            )


def _read(name: str, parameter: nn.Parameter, directory: HFDirectory, config: Config, topology: Topology,
          used: set[str]) -> Tensor | None:
    layer = _LAYER.match(name)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    inner = layer[2] if layer else name
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if inner.startswith(ROUTE):
        source = f"{prefix}self_attn.route.{inner.removeprefix(ROUTE)}"
        if source not in directory.file_of:
            return None
        used.add(source)
        full = directory.slice(source)[:]
        dim = getattr(parameter, "partition_dim", -1)
        if getattr(parameter, "tensor_model_parallel", False):
            full = full.chunk(topology.tp_size, dim)[topology.tp_rank]
        return _checked(full, shape, source, directory)
    rule = (LAYER_RULES if layer else MODEL_RULES).get(inner)
    if rule is None:
        raise ConfigError(f"model.init_from: parameter {name} has no Hugging Face counterpart; use attention.variant "
                          "gqa, mka or fastmka, or drop model.init_from.")
    if rule.layout is None:
        used.add(prefix + rule.source)
        return _checked(directory.slice(prefix + rule.source)[:], shape, prefix + rule.source, directory)
    runs = [Run(prefix + run.source, run.start, run.length) for run in rule.layout(config)]
    used.update(run.source for run in runs)
    _check_extents(runs, rule.dim, directory)
    size = shape[rule.dim]
    pieces = [
        _narrow(directory.slice(run.source), rule.dim, run.start, run.length)
        for run in _cut(runs, topology.tp_rank * size, size)
    ]
    values = torch.cat(pieces, rule.dim) if pieces else torch.empty(0, *shape[1:])
    if inner in MODEL_RULES and values.shape[0] < size:  # vocabulary padding
        values = torch.cat([values, values.new_zeros(size - values.shape[0], *shape[1:])])
    return _checked(values, shape, runs[0].source, directory)


def _cut(runs: list[Run], start: int, length: int) -> Iterator[Run]:
    """The part [start, start + length) of the concatenated runs."""
    position = 0
    for run in runs:
        low, high = max(start, position), min(start + length, position + run.length)
        if low < high:
            yield Run(run.source, run.start + low - position, high - low)
        position += run.length


def _narrow(view: Any, dim: int, start: int, length: int) -> Tensor:
    return view[start : start + length] if dim == 0 else view[:, start : start + length]


def _check_extents(runs: list[Run], dim: int, directory: HFDirectory) -> None:
    extents: dict[str, int] = {}
    for run in runs:
        extents[run.source] = max(extents.get(run.source, 0), run.start + run.length)
    for source, extent in extents.items():
        found = directory.slice(source).get_shape()
        if found[dim] != extent:
            raise ConfigError(f"model.init_from: tensor {source} in {directory.path} has shape {tuple(found)}, but the "
                              f"configuration needs {extent} along dimension {dim}; check it against config.json.")


def _checked(values: Tensor, shape: tuple[int, ...], source: str, directory: HFDirectory) -> Tensor:
    if tuple(values.shape) != shape:
        raise ConfigError(f"model.init_from: tensor {source} in {directory.path} gives shape {tuple(values.shape)}, but "
                          f"the model needs {shape}; check the model section against config.json.")
    return values


def _writable(parameter: nn.Parameter, replicas: dist.ProcessGroup) -> AbstractContextManager:
    """Gather a ZeRO-3 parameter for writing; the first rank of the replica group is the one that is kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=dist.get_process_group_ranks(replicas)[0])
