"""YAML files with `base:` inheritance and `a.b=value` overrides, typed into the frozen dataclasses.

Layers are merged in this order: each file's bases (depth first, in the order given), the file itself,
the next file, the overrides. Mappings merge, everything else (lists too) replaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from mka_megatron.config.aliases import normalise
from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.from_hf import at_positions, read_model, read_sections
from mka_megatron.config.hf_sections import PLACEMENT, SECTIONS
from mka_megatron.config.schema import Config
from mka_megatron.config.typed import COMMAND_LINE, Origins, typed
from mka_megatron.config.validate import check_files, validate, validate_architecture
from mka_megatron.config.yaml_text import DEEPEST, LONGEST_TEXT, parse_yaml

__all__ = ["ConfigError", "load_attention", "load_config"]

MOST_FILES = 100
"""Files of a configuration, each counted as often as it is named."""


def load_config(paths: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] = (),
                world_size: int | None = None) -> Config:
    """The checked configuration of a run.

    Args:
        paths: one YAML file or several, later ones over earlier ones; none gives the schema's defaults.
        overrides: `dotted.key=value` strings, the value in YAML; over every file.
        world_size: number of ranks, checked against the parallel section where given.

    Raises:
        ConfigError: one sentence that names the key or file, the value and the fix.
    """
    merged, origins = merge_layers(paths, overrides)
    config = apply_init_from(typed(merged, origins), merged, origins)
    validate(config, world_size)
    check_files(config)
    return config


def load_attention(directory: str | Path, paths: str | Path | Sequence[str | Path] = (),
                   overrides: Sequence[str] = ()) -> Config:
    """The model of a Hugging Face directory with the attention that files and overrides describe.

    Of the other sections (a whole run's file may be given) only the types are checked: nothing runs them here.

    Args:
        directory: the model; model.init_from of the result.
        paths, overrides: as for :func:`load_config`.

    Raises:
        ConfigError: one sentence that names the key or file, the value and the fix.
    """
    merged, origins = merge_layers(paths, overrides)
    model = merged.setdefault("model", {})
    if isinstance(model, dict):
        model["init_from"] = str(directory)
    config = apply_init_from(typed(merged, origins), merged, origins)
    validate_architecture(config)
    return config


def merge_layers(paths: str | Path | Sequence[str | Path], overrides: Sequence[str],
                 root: type = Config) -> tuple[dict[str, Any], Origins]:
    """The layers of a `root` as one mapping of plain values, and who set each key last. Raises ConfigError."""
    merged: dict[str, Any] = {}
    origins: Origins = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for origin, layer in _file_layers(Path(path), (), count(1)):
            _merge(merged, normalise(layer, origin, root), origin, origins)
    for override in overrides:
        _merge(merged, normalise(_parse_override(override), COMMAND_LINE, root), COMMAND_LINE, origins)
    return merged, origins


def _file_layers(path: Path, parents: tuple[Path, ...], files: Iterator[int]) -> list[tuple[str, dict[str, Any]]]:
    """The file's bases, then the file, each with its name; `parents` are the files that led here, `files` counts all."""
    name = _name(path)
    wanted_by = f", named by base in {_name(parents[-1])}" if parents else ""
    text = _text(path, f"Configuration file {name}{wanted_by}")
    if path.resolve() in (parent.resolve() for parent in parents):
        raise ConfigError(f"base in {_name(parents[-1])} makes a circle back to {name}; remove one of the base entries between.")
    if next(files) > MOST_FILES:
        raise ConfigError(f"Configuration file {name}{wanted_by} is one of more than {MOST_FILES} that base entries lead to; "
                          "write fewer.")
    layer = parse_yaml(text, name)
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        raise ConfigError(f"Configuration file {name} holds {show(layer)}, not sections such as `model:`; "
                          "write it as a mapping.")
    bases = layer.pop("base", None)
    bases = [] if bases is None else [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base in {name} is {show(bases)}: it must be a file name or a list of file names.")
    layers: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        layers += _file_layers(path.parent / base, (*parents, path), files)
    return [*layers, (name, layer)]


def _text(path: Path, what: str) -> str:
    """The UTF-8 text of a file of ordinary size; ConfigError begins with `what`."""
    fix = "give the path of a YAML file"
    try:
        if not path.is_file():
            raise ConfigError(f"{what} {'is a directory' if path.is_dir() else 'does not exist'}; {fix}.")
        if path.stat().st_size > 4 * LONGEST_TEXT:
            raise ConfigError(f"{what} has {path.stat().st_size} bytes, too many for a configuration; {fix}.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}; {fix}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} cannot be read: it is not UTF-8 text; {fix}.") from None


def _name(path: Path) -> str:
    """The path for a message: printable, its end where it is long."""
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= 120 else f"...{text[-117:]}"


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or len(names) > DEEPEST:
        raise ConfigError(f"Argument {show(override)} is not an override: write section.key=value, "
                          "for example training.steps=100.")
    value = parse_yaml(text, f"The value of {show(key)}")
    for name in reversed(names):
        value = {name: value}
    return value


def _merge(into: dict[str, Any], layer: dict[str, Any], origin: str, origins: Origins,
           prefix: tuple[str, ...] = ()) -> None:
    """Merge `layer` into `into` in place; `origins` records who set each key last."""
    for key, value in layer.items():
        path = (*prefix, str(key))
        origins[path] = origin
        if isinstance(value, dict) and isinstance(into.get(str(key)), dict):
            _merge(into[str(key)], value, origin, origins, path)
        elif isinstance(value, dict):
            into[str(key)] = {}
            _merge(into[str(key)], value, origin, origins, path)
        else:
            into[str(key)] = value


def apply_init_from(config: Config, merged: dict[str, Any], origins: Origins) -> Config:
    """`config` with the sections that the directory of `model.init_from` fixes.

    Raises ConfigError for a value of `merged` that contradicts it.
    """
    if config.model.init_from is None:
        return config
    file = f"{config.model.init_from}/config.json"

    def contradiction(explicit: dict[str, Any], typed: object, wanted: object, path: tuple[str, ...], fix: str) -> None:
        for name in explicit:
            here = (*path, name)
            if isinstance(explicit[name], dict):
                contradiction(explicit[name], getattr(typed, name), getattr(wanted, name), here, fix)
            elif here == ("model", "vocab_size") and explicit[name] is None:
                continue  # "take it from elsewhere"
            elif getattr(typed, name) != getattr(wanted, name):
                raise ConfigError(f"{'.'.join(here)} is {show(getattr(typed, name))} in {origins[here]} but "
                                  f"{show(getattr(wanted, name))} in {file}: remove it, or {fix}.")

    model = dataclasses.replace(config.model, **read_model(config.model.init_from))
    model = at_positions(model, config.model, merged["model"])
    contradiction(merged["model"], config.model, model, ("model",),
                  "start from a configuration without a model section such as configs/run/from_hf.yaml")
    fixed = dataclasses.replace(config, model=model)
    if ("data", "sequence_length") not in origins and fixed.data.sequence_length > model.max_position_embeddings:
        # a default must not be what refuses a small model
        fixed = dataclasses.replace(fixed, data=dataclasses.replace(fixed.data, sequence_length=model.max_position_embeddings))
    for name, section in zip(SECTIONS, read_sections(config.model.init_from) or (), strict=False):
        section = _placed(section, getattr(config, name), (name,))
        contradiction(merged.get(name, {}), getattr(config, name), section, (name,),
                      "convert the original model again with it (tools/convert_hf.py import)")
        fixed = dataclasses.replace(fixed, **{name: section})
    return fixed


def _placed(section: Any, run: Any, path: tuple[str, ...]) -> Any:
    """`section` with the keys of PLACEMENT as the run has them."""
    changes = {}
    for field in dataclasses.fields(section):
        key, own = (*path, field.name), getattr(section, field.name)
        if dataclasses.is_dataclass(own):
            changes[field.name] = _placed(own, getattr(run, field.name), key)
        elif ".".join(key) in PLACEMENT:
            changes[field.name] = getattr(run, field.name)
    return dataclasses.replace(section, **changes)
