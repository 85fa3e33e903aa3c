"""What reads a configuration, and what a run works out of it before it starts anything."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import yaml

from mka_megatron.config import plain, typed
from mka_megatron.config.fine_tune import FineTuneConfig, load_fine_tune
from mka_megatron.config.hf_sections import SECTIONS, from_json, to_json
from mka_megatron.config.load import load_attention, load_config
from mka_megatron.config.schema import Config
from mka_megatron.config.validate import data_parallel_size
from mka_megatron.planning.cluster import GIB, Cluster, gpu_by_key
from mka_megatron.planning.flops import model_flops
from mka_megatron.planning.plan import make_plan, vocabulary
from mka_megatron.planning.report import as_json, explained, table
from mka_megatron.training.__main__ import parse
from mka_megatron.training.deepspeed_config import accumulation_steps, build
from tests.fuzz.cases import Case
from tools import train_hf


def read(case: Case, folder: Path) -> Config | FineTuneConfig:
    """The configuration of `case`. Raises ConfigError."""
    files = [folder / name for name in case.files]
    arguments = [str(path) for path in files if "=" not in str(path)] + case.overrides
    if case.loader == "run":
        return load_config(files, case.overrides, case.world_size)
    if case.loader == "command":
        return parse(arguments)
    if case.loader == "fine_tune":
        return load_fine_tune(files, case.overrides, case.world_size)
    if case.loader == "train_hf":
        return train_hf.parse(arguments, offline=True)
    return load_attention(folder / "model", files, case.overrides)


def prepare(config: Config | FineTuneConfig, world_size: int | None, whole_run: bool) -> None:
    """Everything that comes before the first process group. Raises ConfigError.

    Args:
        whole_run: the other sections than model and attention were checked too.
    """
    plain_values = dataclasses.asdict(config)
    printed = yaml.dump(plain_values, Dumper=yaml.CSafeDumper, sort_keys=False)  # --print-config
    if isinstance(config, FineTuneConfig):
        config, whole_run = config.architecture, False
    _exported(config)
    if not whole_run:
        return
    if config.model.init_from is None:
        assert typed.typed(yaml.load(printed, Loader=yaml.CSafeLoader), {}) == config
    ranks = world_size or math.prod((config.parallel.tensor_parallel, config.parallel.context_parallel, config.parallel.data_parallel or 1))
    replicas = data_parallel_size(config.parallel, ranks)
    accumulation_steps(config, replicas)
    for on_cuda in (False, True):
        json.dumps(build(config, replicas, on_cuda))
    vocab_size, _ = vocabulary(config)
    flops = model_flops(config, vocab_size)
    assert flops.training_per_token(config.data.sequence_length) > 0
    per_node = math.gcd(ranks, 8)
    for gpu in ("h100-80g", "cpu"):
        plan = make_plan(config, Cluster(gpu_by_key(gpu), per_node, ranks // per_node, 64 * GIB, 10 * GIB), vocab_size)
        assert table(plan, 1e9) and explained(plan)
        json.dumps(as_json(plan, 1e9), allow_nan=False)


def _exported(config: Config) -> None:
    """The sections that an exported model's config.json carries come back as they were."""
    sections = json.loads(json.dumps(to_json(config)))
    assert to_json(dataclasses.replace(config, **dict(zip(SECTIONS, from_json(sections), strict=True)))) == sections
    assert plain.typed(sections, {}) == typed.typed(sections, {})
