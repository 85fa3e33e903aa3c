"""A plain Hugging Face directory -> the same model with MKA: its files as they are, and the route's tensors beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config import hf_sections
from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.load import load_attention
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import gated
from mka_megatron.conversion import families
from mka_megatron.conversion.publish import check_output, published
from mka_megatron.conversion.route import route_tensors
from mka_megatron.conversion.stream import DTYPES, Mover, Progress, quiet, write_tensors
from mka_megatron.files import manifest
from mka_megatron.files.header import BYTES
from mka_megatron.files.jsonfile import dump, read_bytes
from mka_megatron.files.manifest import Digest
from mka_megatron.files.source import (
    CONFIG,
    INDEX,
    LARGEST_CONFIG,
    LARGEST_INDEX,
    SINGLE,
    Source,
    open_source,
)

ADDED = "model-mka.safetensors"
"""The file that an import adds."""
BASE = "model-base.safetensors"
"""What a model's only file is called beside it: transformers would read a model.safetensors and look no further."""
_ROOM = 16 << 20  # bytes kept free for small files


def import_model(directory: Path, output: Path, paths: Sequence[str | Path] = (), overrides: Sequence[str] = (), *,
                 seed: int = 0, remote_code: Callable[[Path], None] | None = None, progress: Progress = quiet) -> Source:
    """Write the model in `directory` with the tensors that its attention needs.

    Args:
        directory: a plain Qwen2, Qwen3 or Llama model.
        output: directory that does not exist yet or is empty.
        paths, overrides: attention, routing and memory_hierarchy (`config.load.load_attention`).
        seed: of the gates' first weights.
        remote_code: writes the model's own code into a directory.
        progress: shows the bytes that are moved.

    Returns:
        What was found in `directory`.

    Raises:
        ConfigError: the model, the configuration or the output cannot be used; nothing is left of the output.
    """
    check_output(output)
    source = open_source(directory)
    _check_plain(source)
    config = load_attention(directory, paths, overrides)
    if not gated(config):
        raise refuse("attention.variant", config.attention.variant, "it adds nothing to the model; use mka, fastmka or blockmka")
    shapes = added_shapes(config, families.check_tensors(source, config.model))
    weights = sum(header.size for header in source.weights.values()) + sum(map(_bytes, shapes.values()))
    renamed = {SINGLE: BASE} if shapes else {}
    with published(output, weights + _ROOM) as temporary, progress(weights) as report, Mover(report) as mover:
        digests: dict[str, Digest] = {}
        for name, header in source.weights.items():
            target = renamed.get(name, name)
            digests[target] = mover.weights(header, temporary / target)
            manifest.check(header.path, digests[target], source.digest(name))
        if shapes:
            tensors = _tensors(config, seed, shapes)
            digests[ADDED] = write_tensors(temporary / ADDED, shapes, tensors, {"format": "pt"}, report)
            (temporary / INDEX).write_bytes(dump(_index(source, renamed, shapes)))
        copy_others(source, temporary, mover, digests)
        (temporary / CONFIG).write_bytes(dump(hf_sections.add(source.config, config)))
        if remote_code is not None:
            remote_code(temporary)
        manifest.write(temporary, digests, _base(source))
    return source


def _check_plain(source: Source) -> None:
    origin = str(source.path / CONFIG)
    if "mka" in source.config:
        raise ConfigError(f'{origin} has a block "mka": the model has been converted already; give the original.')
    families.check_config(source.config, origin)
    for name in (ADDED, BASE):
        if name in source.weights:
            raise ConfigError(f"{source.path / name} has a name that the output needs; rename it.")
    added = [name for name in source.tensors if families.is_added(name)]
    if added:
        raise ConfigError(f"{source.path} has the tensor {added[0]}, as a converted model does; give the original.")


def added_shapes(config: Config, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> safetensors' dtype and shape of every tensor that is added, in the order of their layers."""
    one = route_tensors(config, 0, torch.Generator())
    kinds = {name.removeprefix("model.layers.0."): (_kind(tensor, dtype), tuple(tensor.shape)) for name, tensor in one.items()}
    return {f"model.layers.{layer}.{name}": kind for layer in range(config.model.num_layers) for name, kind in kinds.items()}


def copy_others(source: Source, directory: Path, mover: Mover, digests: dict[str, Digest]) -> None:
    """Copy everything of `source` that is neither weights nor config.json, and note its digests."""
    for name in source.others:
        (directory / name).parent.mkdir(exist_ok=True)
        digests[name] = mover.copy(source.path / name, directory / name)
        manifest.check(source.path / name, digests[name], source.digest(name))


def _base(source: Source) -> dict[str, str]:
    """The JSON files that are rewritten, letter for letter."""
    texts = {CONFIG: read_bytes(source.path / CONFIG, LARGEST_CONFIG)}
    if source.index is not None:
        texts[INDEX] = read_bytes(source.path / INDEX, LARGEST_INDEX)
    return {name: text.decode() for name, text in texts.items()}


def _tensors(config: Config, seed: int, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    torch_of = {name: dtype for dtype, name in DTYPES.items()}
    for layer in range(config.model.num_layers):
        for name, tensor in route_tensors(config, layer, generator).items():
            yield name, tensor.to(torch_of[shapes[name][0]])


def _index(source: Source, renamed: dict[str, str], shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """model.safetensors.index.json of the output."""
    file_of = {name: renamed.get(file, file) for file, header in source.weights.items() for name in header.tensors}
    file_of |= dict.fromkeys(shapes, ADDED)
    stored = sum(tensor.end - tensor.begin for tensor in source.tensors.values())
    return {"metadata": {"total_size": stored + sum(map(_bytes, shapes.values()))}, "weight_map": file_of}


def _kind(tensor: Tensor, dtype: str) -> str:
    return dtype if tensor.is_floating_point() else DTYPES[tensor.dtype]


def _bytes(kind: tuple[str, tuple[int, ...]]) -> int:
    size = BYTES[kind[0]]
    for extent in kind[1]:
        size *= extent
    return size
