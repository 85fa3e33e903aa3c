"""A contender: Megatron's model with one attention, under the training engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mka_megatron.benchmark.data import prepared
from mka_megatron.benchmark.parity import match_parameters
from mka_megatron.benchmark.settings import attention_type as type_of
from mka_megatron.benchmark.settings import contender
from mka_megatron.benchmark.world import world, world_size
from mka_megatron.config.schema import Config
from mka_megatron.data.prepare import Prepared
from mka_megatron.model.build import build_model
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.norms import parameter_count


class BenchmarkModel:
    """The model of `config` and the engine that trains it. `close` it, or use it as a context manager."""

    def __init__(self, config: Config, topology: Topology, data: Prepared) -> None:
        self.topology, self.data = topology, data
        self.module: GPT = build_model(config, topology, data.vocab_size, construction_context(config, topology))
        self.parameters = parameter_count(self.module, topology)
        """Elements of the whole model, shared ones once."""
        self.engine = Engine(config, self.module, topology)

    @property
    def config(self) -> Config:
        """What it was built from, with the steps and learning rate of the last training."""
        return self.engine.config

    def close(self) -> None:
        """Release what the engine holds."""
        self.engine.close()

    def __enter__(self) -> BenchmarkModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def get_model(
    attention_type: str = "fastmka",
    *,
    match: str | None = "gqa",
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    topology: Topology | None = None,
    **options: Any,
) -> BenchmarkModel:
    """The small GPT with an attention type, with initial weights.

    Args:
        attention_type: mha, mqa, gqa, mla, mka, fastmka (or fmka), blockmka.
        match: the type whose number of parameters it gets, within 1%; None: the MLP width stays as configured.
        files, overrides: configuration, as the training command takes it.
        topology: process groups; None: those of this process.
        options: `num_groups`, `seed`, `batch_size`, ... of `settings.contender`.

    Raises ConfigError, in one sentence.
    """
    config = contender(attention_type, files=files, overrides=overrides, **{"world_size": world_size()} | options)
    topology = topology or world(config.parallel, config.engine.timeout_seconds)
    data = prepared(config, topology)
    if match is not None:
        config = match_parameters(config, type_of(match), data.vocab_size)
    return BenchmarkModel(config, topology, data)
