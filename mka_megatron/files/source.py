"""A Hugging Face directory of untrusted origin: which files it has, and that they are what they say."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.files import manifest as manifests
from mka_megatron.files.header import Header, Stored, read_header
from mka_megatron.files.jsonfile import read_object
from mka_megatron.files.manifest import Digest, Manifest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
LARGEST_CONFIG = 1 << 20
LARGEST_INDEX = 8 << 20
TEMPLATES = "additional_chat_templates"
"""The one subdirectory that transformers reads beside the weights."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".npz", ".tflite", ".ot")
_CODE = (".py", ".pyc", ".so", ".sh")


@dataclass(frozen=True)
class Source:
    """A checked directory: weights whose headers agree with the index, a readable config.json, and other files."""

    path: Path
    config: dict[str, Any]
    """config.json."""
    weights: dict[str, Header]
    """The safetensors files by name."""
    index: dict[str, Any] | None
    """model.safetensors.index.json; None where model.safetensors is the only file."""
    others: tuple[str, ...]
    """Further files that belong to the model, relative to `path`: tokenizer, templates, licence."""
    left_out: tuple[str, ...]
    """Files that do not: weights in other formats, code, subdirectories."""
    manifest: Manifest | None

    @property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by name."""
        return {name: tensor for header in self.weights.values() for name, tensor in header.tensors.items()}

    def digest(self, name: str) -> Digest | None:
        """What the manifest says of the file `name`."""
        return None if self.manifest is None else self.manifest.files.get(name)


def open_source(path: Path) -> Source:
    """Look at everything in `path` but the tensors' bytes.

    Raises:
        ConfigError: there is no such directory, only pickles, a file outside it or of another kind, a damaged header or
            JSON file, or weights that are not the ones the index or the manifest lists.
    """
    if not path.is_dir():
        raise ConfigError(f"{show(str(path))} is not a directory; give the directory of a Hugging Face model.")
    names = sorted(entry.name for entry in os.scandir(path))
    _refuse_without_safetensors(path, names)
    for name in (CONFIG, INDEX, manifests.NAME):
        if name in names:
            regular(path, name)
    if CONFIG not in names:
        raise ConfigError(f"{path} has no config.json; give the directory of a Hugging Face model.")
    config = read_object(path / CONFIG, LARGEST_CONFIG)
    index = read_object(path / INDEX, LARGEST_INDEX) if INDEX in names else None
    weights = _weights(path, names, index)
    others, left_out = _others(path, names)
    manifest = manifests.read(path)
    if manifest is not None:
        manifests.check_sizes(path, manifest)
        for name in (*weights, *others, CONFIG, *([INDEX] if index is not None else [])):
            if name not in manifest.files and (name in weights or name in (CONFIG, INDEX)):
                raise ConfigError(f"{path / name} is not among the files of {manifests.NAME}; copy the model again.")
    return Source(path, config, weights, index, others, left_out, manifest)


def regular(directory: Path, name: str) -> Path:
    """`directory`/`name`, an ordinary file of it, or a link within it or within the hub's cache that it lies in.

    Raises:
        ConfigError: it is missing, something else, or leads out of the directory.
    """
    path = directory / name
    try:
        real = path.resolve(strict=True)
        kind = real.stat().st_mode
    except (OSError, RuntimeError, ValueError):
        raise ConfigError(f"{show(str(path))} is missing or leads nowhere; copy the model again.") from None
    roots = [directory.resolve()]
    cache = roots[0].parent.parent
    if roots[0].parent.name == "snapshots" and cache.name.startswith("models--"):
        roots.append(cache / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ConfigError(f"{show(str(path))} leads to {show(str(real))}, outside its directory; copy the file itself there.")
    if not stat.S_ISREG(kind):
        raise ConfigError(f"{show(str(path))} is not an ordinary file; remove it.")
    return path


def _refuse_without_safetensors(path: Path, names: list[str]) -> None:
    if SINGLE in names and INDEX in names:
        raise ConfigError(f"{path} has both {SINGLE} and {INDEX}, and only one can be meant; remove the other.")
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith(_PICKLES) or name == "pytorch_model.bin.index.json"]
    if pickles:
        raise ConfigError(f"{path} has its weights in pickle files only ({pickles[0]}), which can run code when loaded; "
                          "save the model with save_pretrained as safetensors.")
    raise ConfigError(f"{path} has no {SINGLE} and no {INDEX}; give the directory of a Hugging Face model.")


def _weights(path: Path, names: list[str], index: dict[str, Any] | None) -> dict[str, Header]:
    file_of = {} if index is None else _weight_map(path, index)
    files = sorted(set(file_of.values())) if index is not None else [SINGLE]
    stray = [name for name in names if name.endswith(".safetensors") and name not in files]
    if stray:
        raise ConfigError(f"{path / stray[0]} is not among the files of the model; remove it.")
    headers = {name: read_header(regular(path, name)) for name in files}
    if index is None:
        return headers
    for file, header in headers.items():
        for name in header.tensors:
            if file_of.get(name) != file:
                raise ConfigError(f"{path / file} has the tensor {show(name)} and {INDEX} says "
                                  f"{show(file_of.get(name, 'nothing of it'))}; copy the model again.")
    for name, file in file_of.items():
        if name not in headers[file].tensors:
            raise ConfigError(f"{path / file} lacks the tensor {show(name)} that {INDEX} names; copy the model again.")
    return headers


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ConfigError(f"weight_map is {show(mapping)} in {path / INDEX}: it must name each tensor's file; copy the "
                          "model again.")
    for file in set(map(str, mapping.values())):
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise ConfigError(f"weight_map names the file {show(file)} in {path / INDEX}: it must be a .safetensors file "
                              "of that directory; copy the model again.")
    return mapping


def _others(path: Path, names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    others, left_out = [], []
    for name in names:
        if name in (CONFIG, INDEX, manifests.NAME) or name.endswith(".safetensors") or name.startswith("."):
            continue
        if name == TEMPLATES and (path / name).is_dir():
            others += [f"{name}/{entry.name}" for entry in os.scandir(path / name) if entry.name.endswith(".jinja")]
        elif (path / name).is_dir() or name.endswith((*_PICKLES, *_OTHER_WEIGHTS, *_CODE)) or "pytorch_model" in name:
            left_out.append(name)
        else:
            others.append(name)
    for name in others:
        regular(path, name)
    return tuple(sorted(others)), tuple(left_out)
