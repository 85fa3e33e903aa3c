"""Older and shorter spellings, rewritten to the schema's before layers are merged."""

from __future__ import annotations

import logging
from typing import Any

from mka_megatron.config.errors import ConfigError, refuse, show
from mka_megatron.config.fields import is_section, item_type, type_hints
from mka_megatron.config.schema import Config, MemoryConfig, SourceConfig

logger = logging.getLogger(__name__)


def _set(memory: dict[str, Any], level: str | None, key: str, value: Any, old: str) -> None:
    """Put an old key's value under its new name, refusing two different values in one layer."""
    if level is not None and memory.get(level) is None:
        memory[level] = {}
    target = memory if level is None else memory[level]
    if not isinstance(target, dict):
        return  # the wrong type is reported with the other types
    if key in target and target[key] != value:
        new = ".".join(filter(None, ("memory_hierarchy", level, key)))
        raise ConfigError(f"memory_hierarchy.{old} is {show(value)} and {new} is {show(target[key])}: "
                          f"they are one setting; remove memory_hierarchy.{old}.")
    target[key] = value


def _rename_memory_keys(memory: dict[str, Any], origin: str) -> None:
    """`hbm_enabled`, `dram_staging`, `ssd_tier_path` become L2, the L3 DRAM pool and the spill path."""
    if "hbm_enabled" in memory:
        value = memory.pop("hbm_enabled")
        _deprecated("hbm_enabled", "l2.enabled", origin)
        if not isinstance(value, bool):
            raise refuse("memory_hierarchy.hbm_enabled", value, "it must be true or false; better, set "
                         "memory_hierarchy.l2.enabled")
        _set(memory, "l2", "enabled", value, "hbm_enabled")
    if "dram_staging" in memory:
        value = memory.pop("dram_staging")
        _deprecated("dram_staging", "l3.enabled and l3.dram_pool_gib", origin)
        if not isinstance(value, bool | int | float) or value < 0:
            raise refuse("memory_hierarchy.dram_staging", value, "it must be true, false or a size in GiB; "
                         "better, set memory_hierarchy.l3.enabled and memory_hierarchy.l3.dram_pool_gib")
        _set(memory, "l3", "enabled", value > 0, "dram_staging")
        if not isinstance(value, bool) and value > 0:
            _set(memory, "l3", "dram_pool_gib", value, "dram_staging")
    if "ssd_tier_path" in memory:
        value = memory.pop("ssd_tier_path")
        _deprecated("ssd_tier_path", "ssd_spill_path", origin)
        _set(memory, None, "ssd_spill_path", value, "ssd_tier_path")


def _deprecated(old: str, new: str, origin: str) -> None:
    logger.warning("memory_hierarchy.%s in %s is deprecated: write memory_hierarchy.%s", old, origin, new)


def _sources(value: Any) -> Any:
    """`x`, `{path: x}`, `[x, ...]` as the list of mappings that the schema wants; anything else unchanged."""
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def normalise(layer: dict[str, Any], origin: str, section: type = Config) -> dict[str, Any]:
    """One layer in the schema's own spelling: empty sections are {}, sources are mappings, no old keys.

    `origin` names the layer (a file, or the command line) in messages. Unknown keys and wrong types are
    left for the typed step. Raises ConfigError for an old key that cannot be translated.
    """
    out: dict[str, Any] = {}
    for key, value in layer.items():
        hint: Any = type_hints(section).get(key) if isinstance(key, str) else None
        if is_section(hint) and value is None:
            value = {}
        if hint is MemoryConfig and isinstance(value, dict):
            value = {name: dict(item) if isinstance(item, dict) else item for name, item in value.items()}
            _rename_memory_keys(value, origin)
        if is_section(hint) and isinstance(value, dict):
            value = normalise(value, origin, hint)
        elif item_type(hint) is SourceConfig:
            value = _sources(value)
        out[key] = value
    return out
