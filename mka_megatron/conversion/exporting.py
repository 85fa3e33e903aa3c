"""A training checkpoint of any ZeRO stage and layout -> a Hugging Face directory of ours.

Needs no process group, no GPU and never the model: one tensor is put together at a time from memory-mapped shards, so
memory stays within the largest tensor and some hundred MiB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mka_megatron.config import hf_sections
from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.from_hf import read_config_json, read_model
from mka_megatron.config.schema import Config
from mka_megatron.config.to_hf import plain_config
from mka_megatron.config.typed import typed
from mka_megatron.config.variants import effective_kv_heads
from mka_megatron.conversion.publish import check_output, published
from mka_megatron.conversion.stream import DTYPES, Mover, Progress, quiet, write_tensors
from mka_megatron.conversion.tokenizing import Tokenizer, find_tokenizer
from mka_megatron.files import manifest
from mka_megatron.files.header import BYTES
from mka_megatron.files.jsonfile import dump
from mka_megatron.files.manifest import Digest
from mka_megatron.files.source import CONFIG, INDEX, SINGLE
from mka_megatron.memory import hashing
from mka_megatron.model.hf_table import HFTensor, hf_table, hf_tensors
from mka_megatron.training.manifest import Checkpoint, CheckpointError, verify
from mka_megatron.training.shards import Shards, Value

Precision = Literal["fp32", "bf16", "fp16"]
SHARD_BYTES = 5_000_000_000
_TORCH: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_BLOCK = 16 << 20  # bytes of columns put together at a time
_ROOM = 64 << 20  # bytes kept free for small files


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    step: int
    """Optimizer steps that the weights have seen."""
    dtype: Precision
    tensors: int
    bytes: int
    """Of all tensors."""
    tokenizer: Path | None
    """Where the tokenizer's files were copied from; None: it was not found."""


def export(checkpoint: Path, output: Path, *, dtype: Precision | None = None, shard_bytes: int = SHARD_BYTES,
           tokenizer: Path | None = None, remote_code: Callable[[Path], None] | None = None, progress: Progress = quiet
           ) -> Exported:
    """Write the model of a training checkpoint.

    Args:
        checkpoint: directory `step-...` that a training published.
        output: directory that does not exist yet or is empty.
        dtype: None: that of the training (training.precision). fp32 takes the optimizer's masters.
        shard_bytes: a file holds at most this many bytes of tensors, or one tensor.
        tokenizer: directory of the tokenizer; None: where the checkpoint says, if it is there.
        remote_code: writes the model's own code into a directory.
        progress: shows the bytes that are written.

    Raises:
        ConfigError: the checkpoint is not intact, is incomplete or has no Hugging Face form, or the output cannot be used;
            nothing is left of the output.
    """
    check_output(output)
    verified = _verified(checkpoint)
    saved = verified.body["config"]
    config = typed(saved, {(section,): str(checkpoint / "manifest.json") for section in saved})
    found = find_tokenizer(config, verified, tokenizer)
    vocab_size = _vocab_size(config, found)
    table = hf_table(config, vocab_size)
    precision: Precision = dtype or config.training.precision
    shards = Shards(verified, table)
    value: Value = "weights" if precision == config.training.precision else "masters"
    shards.check(value)
    tensors = hf_tensors(table)
    kinds = {name: (_kind(name, precision), tensor.shape) for name, tensor in tensors.items()}
    files = _files(kinds, shard_bytes)
    total = sum(map(_bytes, kinds.values()))
    digests: dict[str, Digest] = {}
    with published(output, total + _ROOM) as temporary, progress(total) as report:
        for file, names in files.items():
            made = ((name, _made(tensors[name], shards, value, config, _TORCH[precision])) for name in names)
            digests[file] = write_tensors(temporary / file, {name: kinds[name] for name in names}, made, {"format": "pt"}, report)
        if list(files) != [SINGLE]:
            file_of = {name: file for file, names in files.items() for name in names}
            (temporary / INDEX).write_bytes(dump({"metadata": {"total_size": total}, "weight_map": file_of}))
        special = found.special() if found is not None else {}
        (temporary / CONFIG).write_bytes(dump(_config_json(config, vocab_size, precision, special)))
        if found is not None:
            with Mover(lambda moved: None) as mover:
                for name in found.files:
                    digests[name] = mover.copy(found.path / name, temporary / name)
        if remote_code is not None:
            remote_code(temporary)
        manifest.write(temporary, digests)
    return Exported(verified.step, precision, len(kinds), total, None if found is None else found.path)


def _verified(path: Path) -> Checkpoint:
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} is a training's output_dir; give one of {path / 'checkpoints' / 'step-*'}.")
    try:
        return verify(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None


def _vocab_size(config: Config, tokenizer: Tokenizer | None) -> int:
    """Rows of the embedding without padding."""
    size = config.model.vocab_size or (None if tokenizer is None else tokenizer.vocab_size)
    if size is None:
        raise refuse("model.vocab_size", None, "in this checkpoint it was the tokenizer's, which is not where the run had it; give "
                     "the directory of its tokenizer.json (--tokenizer)")
    return size


def _config_json(config: Config, vocab_size: int, precision: Precision, special: dict[str, int]) -> dict[str, Any]:
    """That of model.init_from where it still describes the model, which keeps what only it says; else one made anew."""
    plain = plain_config(config.model, effective_kv_heads(config.attention.variant, config.model), vocab_size) | special
    if config.model.init_from is not None:
        try:
            raw, _ = read_config_json(config.model.init_from)
            if dataclasses.replace(config.model, **read_model(config.model.init_from)) == config.model:
                plain = hf_sections.remove(raw) if "mka" in raw else raw
        except (ConfigError, OSError):  # it was there when the run began
            pass
    kept = {key: value for key, value in plain.items() if key != "torch_dtype"}
    return hf_sections.add(kept | {"dtype": _NAMES[precision]}, config)


def _made(tensor: HFTensor, shards: Shards, value: Value, config: Config, dtype: torch.dtype) -> Tensor:
    """One Hugging Face tensor from the shards of its parameter; planes that the checkpoint does not hold are drawn."""
    if tensor.name.endswith(".planes"):
        l3 = config.memory_hierarchy.l3
        if tensor.entry.name not in shards:
            return hashing.planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, config.model.head_dim)
        dtype = torch.int8
    return assemble(tensor, shards, value, dtype)


def assemble(tensor: HFTensor, shards: Shards, value: Value, dtype: torch.dtype) -> Tensor:
    """The whole tensor in `dtype`, on the CPU."""
    out = torch.empty(tensor.shape, dtype=dtype)
    entry, done = tensor.entry, 0
    shape = entry.shard(shards.ranks)
    row = math.prod(shape[1:])  # elements
    for rank, start, length in tensor.on_ranks(shards.ranks):
        if entry.dim == 0:
            _fill(out[done : done + length].view(-1), shards.fragments(value, entry.name, rank, start * row, length * row))
        else:
            step = max(1, _BLOCK // (row * 4))
            for first in range(0, shape[0], step):
                block = torch.empty(min(step, shape[0] - first), *shape[1:], dtype=dtype)
                _fill(block.view(-1), shards.fragments(value, entry.name, rank, first * row, block.numel()))
                out[first : first + len(block), done : done + length].copy_(block[:, start : start + length])
        done += length
    return out


def _fill(out: Tensor, fragments: Iterator[Tensor]) -> None:
    position = 0
    for fragment in fragments:
        out[position : position + len(fragment)].copy_(fragment)
        position += len(fragment)


def _files(kinds: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> dict[str, list[str]]:
    """File -> its tensors, in order, each file as full as `limit` allows."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, kind in kinds.items():
        if groups[-1] and size + _bytes(kind) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(kind)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": names for index, names in enumerate(groups, 1)}


def _kind(name: str, precision: Precision) -> str:
    return DTYPES[torch.int8 if name.endswith(".planes") else _TORCH[precision]]


def _bytes(kind: tuple[str, tuple[int, ...]]) -> int:
    return BYTES[kind[0]] * math.prod(kind[1])
