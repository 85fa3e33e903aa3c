"""Other layouts of the same run: the cheapest that fits, and the cheapest single change that makes one fit.

Cheapest: the fewest GPU seconds per token (all GPUs of the cluster times the step's time, over its tokens).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.config.validate import validate
from mka_megatron.planning.cluster import Cluster
from mka_megatron.planning.plan import Plan, make_plan

Overrides = dict[str, Any]
_TILE = 8192
_MOST_CONTEXT = 256


def suggest(config: Config, cluster: Cluster, vocab_size: int, utilisation: float) -> list[tuple[Overrides, Plan]]:
    """Every layout, ZeRO stage, offload and recomputation that validate() allows and that fits, the cheapest first."""
    found = []
    for overrides in _topologies(config, cluster):
        plan = _tried(config, overrides, cluster, vocab_size, utilisation)
        if plan is not None:
            found.append((overrides, plan))
    # equal costs: the plainest, of which the settings come first
    return sorted(found, key=lambda each: (round(each[1].gpu_seconds_per_token, 12), _plainness(each[0])))


def cheapest_change(plan: Plan) -> Overrides | None:
    """The settings, as few as possible and then the cheapest, under which the run fits on the same cluster; None: none."""
    singles = [_fitting(plan, [each]) for each in _changes(plan)]
    found = [each for each in singles if each is not None]
    if not found:
        memory = _memory_savers(plan.config)
        found = [each for count in range(2, len(memory) + 1) if (each := _fitting(plan, memory[:count])) is not None][:1]
    if not found:
        ranked = suggest(plan.config, plan.cluster, plan.vocab_size, plan.utilisation)
        return _differing(plan.config, ranked[0][0]) if ranked else None
    return min(found, key=lambda each: each[1].gpu_seconds_per_token)[0]


def apply(config: Config, overrides: Overrides) -> Config:
    """`config` with `section.key` values; not validated."""
    for key, value in overrides.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def pasted(overrides: Overrides) -> str:
    """As arguments of a command line."""
    plain = {None: "null", True: "true", False: "false"}
    return " ".join(f"{key}={plain.get(value, value) if value is None or isinstance(value, bool) else value}"
                    for key, value in overrides.items())


def _topologies(config: Config, cluster: Cluster) -> Iterator[Overrides]:
    world = cluster.world_size
    offloads = ["none", *(["cpu"] if cluster.dram_bytes else []), *(["nvme"] if _nvme(config, cluster) else [])]
    for tensor in _divisors(world):
        if tensor > cluster.per_node:
            break
        for context in [each for each in _divisors(world // tensor) if each <= _MOST_CONTEXT]:
            for stage in (0, 1, 2, 3):
                for offload in offloads if stage else ["none"]:
                    for recompute in ("none", "selective", "full"):
                        yield {
                            "parallel.tensor_parallel": tensor, "parallel.sequence_parallel": tensor > 1,
                            "parallel.context_parallel": context, "parallel.data_parallel": world // (tensor * context),
                            "engine.zero_stage": stage, "engine.offload_optimizer": offload,
                            "engine.offload_param": "none" if stage < 3 else config.engine.offload_param,
                            "training.recompute": recompute,
                        }


def _nvme(config: Config, cluster: Cluster) -> bool:
    return bool(cluster.ssd_bytes) and config.engine.nvme_path is not None


def _divisors(number: int) -> list[int]:
    low = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*low, *(number // each for each in low)})


def _tried(config: Config, overrides: Overrides, cluster: Cluster, vocab_size: int, utilisation: float) -> Plan | None:
    """The plan, where it is allowed and fits."""
    changed = apply(config, overrides)
    try:
        validate(changed, cluster.world_size)
        plan = make_plan(changed, cluster, vocab_size, utilisation)
    except ConfigError:
        return None
    return None if plan.shortages else plan


def _fitting(plan: Plan, changes: list[Overrides]) -> tuple[Overrides, Plan] | None:
    overrides = {key: value for change in changes for key, value in change.items()}
    found = _tried(plan.config, overrides, plan.cluster, plan.vocab_size, plan.utilisation)
    return None if found is None else (overrides, found)


def _memory_savers(config: Config) -> list[Overrides]:
    """What saves memory without another layout, in the order in which it costs time."""
    parallel, training, engine = config.parallel, config.training, config.engine
    found: list[Overrides] = []
    if parallel.tensor_parallel > 1 and not parallel.sequence_parallel:
        found.append({"parallel.sequence_parallel": True})
    if training.logits_tile is None:
        found.append({"training.logits_tile": _TILE})
    if engine.zero_stage == 0:
        found.append({"engine.zero_stage": 1})
    if training.recompute != "full":
        found.append({"training.recompute": "full"})
    if training.mlp_tile is None:
        found.append({"training.mlp_tile": _TILE})
    if training.micro_batch_size > 1:
        found.append({"training.micro_batch_size": 1})
    if engine.zero_stage < 3:
        found.append({"engine.zero_stage": 3})
    return found


def _changes(plan: Plan) -> list[Overrides]:
    """Single changes: those, and another layout or offload."""
    config, cluster = plan.config, plan.cluster
    found = _memory_savers(config)
    if config.training.recompute == "none":
        found.append({"training.recompute": "selective"})
    found += [{"engine.zero_stage": stage} for stage in (2, 3) if stage > max(1, config.engine.zero_stage)]
    if config.engine.offload_optimizer == "none" and cluster.dram_bytes:
        found.append({"engine.zero_stage": max(1, config.engine.zero_stage), "engine.offload_optimizer": "cpu"})
    found += [{f"engine.{each}": "none"} for each in ("offload_optimizer", "offload_param")
              if getattr(config.engine, each) != "none"]
    layout = plan.layout
    for tensor in _divisors(cluster.world_size):
        if layout.tensor < tensor <= cluster.per_node:
            found.append({"parallel.tensor_parallel": tensor, "parallel.sequence_parallel": True,
                          "parallel.data_parallel": None})
    for context in _divisors(cluster.world_size):
        if context > layout.context:
            found.append({"parallel.context_parallel": context, "parallel.data_parallel": None})
    return found


def _differing(config: Config, overrides: Overrides) -> Overrides:
    """Those that change something; data_parallel follows from the others."""
    def value(key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    return {key: new for key, new in overrides.items() if new != value(key) and key != "parallel.data_parallel"}


def _plainness(overrides: Overrides) -> tuple[Any, ...]:
    order = {"none": 0, "selective": 1, "cpu": 1, "full": 2, "nvme": 2}
    return (overrides["engine.zero_stage"], order[overrides["engine.offload_optimizer"]],
            order[overrides["training.recompute"]], overrides["parallel.tensor_parallel"])
