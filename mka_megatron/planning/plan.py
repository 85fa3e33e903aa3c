"""A configuration on a cluster: what it needs, what there is, and whether the one fits into the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mka_megatron.config.schema import Config
from mka_megatron.config.validate import data_parallel_size
from mka_megatron.planning.cluster import GIB, Cluster
from mka_megatron.planning.compute import UTILISATION, Times, Work, times, work
from mka_megatron.planning.memory import Device, Part, node_memory, rank_memory
from mka_megatron.planning.steps import Layout
from mka_megatron.planning.traffic import Flow, flows

_QWEN = 152_064


@dataclass(frozen=True)
class Shortage:
    """A memory that is too small."""

    where: str
    largest: Part
    """What takes most of it."""
    need: int
    """Bytes."""
    have: int
    """Bytes, the reserve taken off."""


@dataclass(frozen=True)
class Plan:
    """All figures of one configuration on one cluster; bytes, seconds, FLOPs."""

    config: Config
    cluster: Cluster
    layout: Layout
    vocab_size: int
    device: tuple[Part, ...]
    """Memory of one rank on its device, at the peak of a step."""
    dram: tuple[Part, ...]
    """Memory of one node besides; ranks on a CPU included."""
    ssd: tuple[Part, ...]
    """Disk of one node."""
    work: Work
    flows: tuple[Flow, ...]
    times: Times
    utilisation: float

    @cached_property
    def shortages(self) -> tuple[Shortage, ...]:
        """The memories that are too small, the device first."""
        cluster, found = self.cluster, []
        for where, parts, have, reserve in (
            ("a GPU's memory", self.device, cluster.device_bytes, cluster.device_reserve),
            ("a node's DRAM", self.dram, cluster.dram_bytes, cluster.dram_reserve),
            ("a node's SSD", self.ssd, cluster.ssd_bytes, 0),
        ):
            need = sum(part.bytes for part in parts)
            if have is not None and parts and need > have - reserve:
                found.append(Shortage(where, max(parts, key=lambda part: part.bytes), need, have - reserve))
        return tuple(found)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.work.tokens / self.times.step

    @property
    def gpu_seconds_per_token(self) -> float:
        """What a token costs: the measure of "cheapest"."""
        return self.cluster.world_size / self.tokens_per_second

    @property
    def mfu(self) -> float:
        """Share of the cluster's bf16 peak that the model's FLOPs reach."""
        peak = self.cluster.gpu.tflops * 1e12 * self.cluster.world_size
        return self.work.model_flops / self.times.step / peak


def make_plan(config: Config, cluster: Cluster, vocab_size: int, utilisation: float = UTILISATION) -> Plan:
    """The plan of a configuration that was validated for the cluster's number of ranks. Raises ConfigError otherwise."""
    parallel = config.parallel
    data = data_parallel_size(parallel, cluster.world_size)
    layout = Layout(parallel.tensor_parallel, parallel.context_parallel, data)
    kind: Device = "cpu" if cluster.on_cpu else "cuda"
    device = rank_memory(config, layout, vocab_size, kind)
    dram, ssd = node_memory(config, layout, vocab_size, cluster.per_node, kind)
    if cluster.on_cpu:
        ranks = cluster.per_node
        dram = (*(Part(part.name, ranks * part.bytes, f"{ranks} ranks x ({part.formula})") for part in device), *dram)
    done, sent = work(config, layout, vocab_size), flows(config, layout, vocab_size)
    took = times(config, cluster, layout, vocab_size, done, sent, utilisation)
    return Plan(config, cluster, layout, vocab_size, device, dram, ssd, done, sent, took, utilisation)


def vocabulary(config: Config) -> tuple[int, str | None]:
    """Entries to plan with, and what was assumed where the configuration does not say."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size, None
    if config.data.tokenizer is None:
        size = config.data.tokenizer_vocab_size
        return size, f"model.vocab_size is null: planned with data.tokenizer_vocab_size, {size:,}"
    return _QWEN, f"model.vocab_size is null: planned with {_QWEN:,} entries, Qwen2.5's"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"
