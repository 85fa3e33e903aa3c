"""A directory of ours -> the plain Hugging Face model in it; of an import, the files it was made of, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mka_megatron.config import hf_sections
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.from_hf import read_model, read_sections
from mka_megatron.config.schema import ModelConfig
from mka_megatron.conversion import families
from mka_megatron.conversion.importing import BASE, copy_others
from mka_megatron.conversion.publish import check_output, published
from mka_megatron.conversion.stream import Mover, Progress, quiet
from mka_megatron.files import manifest
from mka_megatron.files.jsonfile import dump, parse_object
from mka_megatron.files.source import CONFIG, INDEX, SINGLE, Source, open_source


def strip_model(directory: Path, output: Path, *, progress: Progress = quiet) -> Source:
    """Write the plain model: weights without the tensors of MKA, its config.json, the other files.

    Files that lose nothing are copied byte by byte, others are rewritten tensor by tensor.

    Args:
        directory: what an import or export wrote.
        output: directory that does not exist yet or is empty.
        progress: shows the bytes that are moved.

    Returns:
        What was found in `directory`.

    Raises:
        ConfigError: the model or the output cannot be used; nothing is left of the output.
    """
    check_output(output)
    source = open_source(directory)
    origin = str(directory / CONFIG)
    if "mka" not in source.config:
        raise ConfigError(f'{origin} has no block "mka": there is nothing to strip; give a converted model.')
    read_sections(str(directory))
    config = hf_sections.remove(source.config)
    families.check_config(config, origin)
    families.check_tensors(source, ModelConfig(**read_model(str(directory))))
    kept = {name: header for name, header in source.weights.items() if not all(map(families.is_added, header.tensors))}
    renamed = {BASE: SINGLE} if list(kept) == [BASE] else {}
    base = source.manifest.base if source.manifest is not None else {}
    weights = sum(header.size for header in kept.values())
    with published(output, weights) as temporary, progress(weights) as report, Mover(report) as mover:
        for name, header in kept.items():
            found = mover.weights(header, temporary / renamed.get(name, name), lambda tensor: not families.is_added(tensor))
            manifest.check(header.path, found, source.digest(name))
        copy_others(source, temporary, mover, {})
        (temporary / CONFIG).write_bytes(_as_it_was(base, CONFIG, config))
        if [renamed.get(name, name) for name in kept] != [SINGLE]:
            (temporary / INDEX).write_bytes(_as_it_was(base, INDEX, _index(source)))
    return source


def _index(source: Source) -> dict[str, Any]:
    """model.safetensors.index.json of the plain model."""
    file_of = {name: file for file, header in source.weights.items() for name in header.tensors if not families.is_added(name)}
    size = sum(tensor.end - tensor.begin for name, tensor in source.tensors.items() if name in file_of)
    return {"metadata": {"total_size": size}, "weight_map": file_of}


def _as_it_was(base: Mapping[str, str], name: str, value: dict[str, Any]) -> bytes:
    """The text of the file `name` that the manifest kept, if it says what `value` does, else `value` as JSON."""
    if name in base:
        text = base[name].encode()
        kept = parse_object(text, f"{name} in {manifest.NAME}")
        if kept == value or (name == INDEX and kept.get("weight_map") == value["weight_map"]):
            return text
    return dump(value)
