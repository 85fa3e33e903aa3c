"""Which differences between a checkpoint and a run are refused, without running either."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    RoutingConfig,
    SourceConfig,
    TrainingConfig,
)
from mka_megatron.training import checkpoint, reshape, saving
from mka_megatron.training.checkpoint import Checkpoint, CheckpointError


def engine(config: Config, world_size: int = 2, optimizer: str = "AdamW") -> Any:
    topology = SimpleNamespace(world_size=world_size, tp_size=1, cp_size=1, dp_size=world_size)
    return SimpleNamespace(config=config, topology=topology, optimizer_name=optimizer, segments=None, cuts={})


def written_by(writer: Any) -> Checkpoint:
    body = {"layout": saving.layout(writer), "config": asdict(writer.config)}
    return Checkpoint(Path("runs/a/checkpoints/step-00000004"), body)


@pytest.mark.parametrize(
    ("reader", "sentence"),
    [
        (engine(Config(training=TrainingConfig(precision="bf16"))), "training.precision fp32, but this run has bf16; set it back"),
        (engine(Config(training=TrainingConfig(segment_length=64))), "training.segment_length None, but this run has 64; set it"),
    ],
)
def test_what_no_layout_can_change(reader: Any, sentence: str) -> None:
    written = written_by(engine(Config()))
    with pytest.raises(CheckpointError, match=sentence):
        reshape.check(reader, written, checkpoint._changes(reader, written))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (Config(training=TrainingConfig(segment_length=64, global_batch_size=16)),
         r"training\.global_batch_size 8 in the middle of a sample .*, but this run has 16; set it back, or resume from"),
        (Config(training=TrainingConfig(segment_length=64), data=DataConfig(sequence_length=256)), r"data\.sequence_length 512 in"),
        (Config(training=TrainingConfig(segment_length=64), data=DataConfig(train=(SourceConfig("a.txt"),))), r"data\.train \["),
        (Config(training=TrainingConfig(segment_length=64, seed=1)), r"training\.seed 1234 in the middle"),
    ],
)
def test_samples_in_progress_stay_the_same_samples(changed: Config, sentence: str) -> None:
    written = written_by(engine(Config(training=TrainingConfig(segment_length=64))))
    written = Checkpoint(written.path, json.loads(json.dumps(written.body)))
    reader = engine(changed)
    reader.segments = SimpleNamespace(saved_position=lambda folder: 0)
    reshape.check(reader, written, {})
    reader.segments = SimpleNamespace(saved_position=lambda folder: 2)
    with pytest.raises(CheckpointError, match=sentence):
        reshape.check(reader, written, {})
    same = engine(Config(training=TrainingConfig(segment_length=64, steps=9), data=DataConfig(cache_dir="x", workers=1)))
    same.segments = reader.segments
    reshape.check(same, written, {})


def test_what_changes_is_named() -> None:
    written, reader = written_by(engine(Config())), engine(Config(engine=EngineConfig(zero_stage=3)), 4, "FusedAdam")
    changes = checkpoint._changes(reader, written)
    assert changes == {"parallel.data_parallel": (2, 4), "engine.zero_stage": (1, 3), "optimizer": ("AdamW", "FusedAdam")}
    reshape.check(reader, written, changes)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(attention=AttentionConfig(variant="gqa")), "attention.variant fastmka, but this run has gqa"),
        (Config(model=ModelConfig(rope=RopeConfig(theta=1e4))), "model.rope.theta 1000000.0, but this run has 10000.0"),
        (Config(routing=RoutingConfig(mode="top1")), "routing.mode soft, but this run has top1"),
    ],
)
def test_another_model(config: Config, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint._check_model(engine(config), written_by(engine(Config())))


def test_what_only_starts_a_run_may_differ() -> None:
    """The weights that were imported, the blend's first value, and how long the run goes on."""
    config = Config(
        model=ModelConfig(init_from="/models/qwen"), routing=RoutingConfig(beta_init=0.5),
        training=replace(TrainingConfig(), steps=9, learning_rate=1.0),
    )
    checkpoint._check_model(engine(config), written_by(engine(Config())))
    assert not checkpoint._changes(engine(config), written_by(engine(Config())))
