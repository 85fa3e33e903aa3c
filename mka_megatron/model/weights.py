"""Hugging Face weights -> any tensor-parallel size and ZeRO stage, each rank reading only its slices of `hf_table`."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.from_hf import read_sections
from mka_megatron.config.schema import Config
from mka_megatron.files import manifest
from mka_megatron.files.source import Source, open_source
from mka_megatron.model.hf_table import Entry, hf_table, hf_tensors
from mka_megatron.parallel.groups import Topology

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def load_hf_weights(model: nn.Module, config: Config, topology: Topology) -> None:
    """Fill `model` from `config.model.init_from`, one parameter at a time; a collective call.

    A plain directory leaves the routes as they were initialised; one of ours fills everything, the hash planes too.
    Where the directory has a manifest the ranks share the reading that verifies it.

    Raises:
        ConfigError: on every rank; a file is damaged, or a tensor is missing, unknown, or has another shape than the
            configuration says.
    """
    source = open_source(Path(config.model.init_from or ""))
    whole = read_sections(str(source.path)) is not None
    table = hf_table(config, config.model.vocab_size or 0)
    entries = [entry for entry in table.values() if whole or not entry.added or entry.runs[0].source in source.tensors]
    _check_tensors(source, {entry.name: entry for entry in entries}, config.model.tie_embeddings)
    _verify(source, topology)
    held = dict(chain(model.named_parameters(), model.named_buffers()))
    with _Slices(source) as slices:
        for entry in entries:
            values = _read(entry, slices, topology)
            with _writable(held[entry.name]), torch.no_grad():
                held[entry.name].copy_(values)


def _check_tensors(source: Source, table: dict[str, Entry], tied: bool) -> None:
    """The directory holds the tensors of `table`, and no others."""
    found, wanted = source.tensors, hf_tensors(table)
    for name, tensor in wanted.items():
        if name not in found:
            raise ConfigError(f"model.init_from: {source.path} has no tensor {name}; the checkpoint is incomplete.")
        if found[name].shape != tensor.shape:
            raise ConfigError(f"model.init_from: tensor {name} in {source.path} has shape {found[name].shape}, but the "
                              f"configuration needs {tensor.shape}; check it against config.json.")
    unknown = sorted(name for name in found if name not in wanted and not _IGNORED.search(name)
                     and not (tied and name == "lm_head.weight"))
    if unknown:
        raise ConfigError(f"model.init_from: {source.path} holds tensors this model has no place for ({', '.join(unknown[:3])}"
                          f"{', ...' if len(unknown) > 3 else ''}); check model and attention against its config.json.")


def _verify(source: Source, topology: Topology) -> None:
    """Compare every file with the manifest, each on one rank; all raise where one differs."""
    if source.manifest is None:
        return
    problems: list[str | None] = [None] * topology.world_size
    mine = sorted(source.manifest.files)[topology.rank :: topology.world_size]
    dist.all_gather_object(problems, _first_problem(source, mine))
    found = next((problem for problem in problems if problem is not None), None)
    if found is not None:
        raise ConfigError(found)


def _first_problem(source: Source, names: list[str]) -> str | None:
    try:
        for name in names:
            manifest.check(source.path / name, manifest.digest_of(source.path / name), source.digest(name))
    except ConfigError as error:
        return str(error)
    return None


class _Slices:
    """The directory's tensors, opened lazily and read by slices; a context manager."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file_of = {name: file for file, header in source.weights.items() for name in header.tensors}
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """[start, start + length) of the tensor `name` along `dim`, 0 or 1."""
        file = self._file_of[name]
        try:
            if file not in self._files:
                path = str(self._source.path / file)
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            view = self._files[file].get_slice(name)
            return view[start : start + length] if dim == 0 else view[:, start : start + length]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model.init_from: tensor {name} in {self._source.path / file} cannot be read ({error}); copy "
                              "the model again.") from error

    def __enter__(self) -> _Slices:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _read(entry: Entry, slices: _Slices, topology: Topology) -> Tensor:
    """This rank's part of a parameter."""
    shape, dim = entry.shard(topology.tp_size), entry.dim
    runs = entry.cut(topology.tp_rank * shape[dim] if entry.split else 0, shape[dim])
    pieces = [slices.read(run.source, dim, run.start, run.length) for run in runs]
    missing = shape[dim] - sum(piece.shape[dim] for piece in pieces)
    if missing:  # vocabulary padding
        pieces.append(torch.zeros(*shape[:dim], missing, *shape[dim + 1 :]))
    return torch.cat(pieces, dim)


def _writable(parameter: Tensor) -> AbstractContextManager:
    """Gather a ZeRO-3 parameter for writing; the first rank of the replica group is the one that is kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    # DeepSpeed counts within the group that shares the parameter
    return GatheredParameters([parameter], modifier_rank=0)
