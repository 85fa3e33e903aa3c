"""The DeepSpeed dictionary: DeepSpeed itself accepts it, a user's file is merged, contradictions are named."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import (
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from mka_megatron.training.deepspeed_config import accumulation_steps, build, cuts

TRAINING = TrainingConfig(micro_batch_size=2, global_batch_size=16, clip_grad=0.7)


def config(training: TrainingConfig = TRAINING, **engine: Any) -> Config:
    return Config(training=training, engine=EngineConfig(**engine))


def with_file(tmp_path: Path, user: Any, **engine: Any) -> Config:
    path = tmp_path / "ds.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    return config(deepspeed_config=str(path), **engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "offload_optimizer": "cpu"}, {"zero_stage": 3},
        {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/fast"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    ],
    ids=str,
)
def test_deepspeed_reads_what_was_meant(engine: dict[str, Any], precision: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = config(replace(TRAINING, precision=precision), initial_loss_scale_power=11, **engine)
    parsed = DeepSpeedConfig(build(run, 1, on_cuda=False))
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (16, 2)
    assert parsed.gradient_accumulation_steps == 8
    assert parsed.zero_optimization_stage == engine["zero_stage"]
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    assert parsed.float16_config.enabled == (precision == "fp16")
    if precision == "fp16":
        assert parsed.float16_config.loss_scale == 0
        assert parsed.float16_config.initial_dynamic_scale() == 2**11
    for part in ("offload_optimizer", "offload_param"):
        section = getattr(parsed.zero_config, part)
        assert (section.device if section else "none") == engine.get(part, "none")
        if engine.get(part) == "nvme":
            assert Path("/fast") in section.nvme_path.parents
    if precision == "fp32" and engine["zero_stage"] == 0:
        assert parsed.gradient_clipping == 0  # the engine clips itself
    else:
        assert parsed.gradient_clipping == 0.7


def test_replicas_and_micro_batches_must_divide_the_global_batch() -> None:
    assert accumulation_steps(config(), 8) == 1
    with pytest.raises(ConfigError, match=r"global_batch_size is 16, which is not a multiple of .* 2 x 3"):
        accumulation_steps(config(), 3)


def test_two_runs_do_not_share_swap_files() -> None:
    def path(output_dir: str) -> str:
        run = config(
            replace(TRAINING, output_dir=output_dir), zero_stage=3, offload_optimizer="nvme", nvme_path="/fast"
        )
        return build(run, 1, on_cuda=False)["zero_optimization"]["offload_optimizer"]["nvme_path"]

    assert path("a") == path("./a") != path("b")


@pytest.mark.parametrize("replicas", [1, 8])
def test_swap_buffers_hold_the_largest_parameter(replicas: int) -> None:
    """Qwen2.5-7B: the embedding, or fc1 where the vocabulary is small, shared by the replicas."""
    for vocabulary, largest in ((152_064, 152_064 * 3584), (1000, 2 * 18_944 * 3584)):
        run = Config(
            model=ModelConfig(
                hidden_size=3584, ffn_hidden_size=18_944, num_attention_heads=28, num_kv_heads=4, head_dim=128,
                vocab_size=vocabulary,
            ),
            training=TRAINING,
            engine=EngineConfig(zero_stage=3, offload_param="nvme", nvme_path="/fast"),
            parallel=ParallelConfig(tensor_parallel=2),
            data=DataConfig(),
        )
        size = build(run, replicas, on_cuda=False)["zero_optimization"]["offload_param"]["buffer_size"]
        assert largest / 2 / replicas <= size <= 1.1 * largest / 2 / replicas + 1024


def test_a_users_file_is_merged(tmp_path: Path) -> None:
    user = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": 0.7,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale_window": 500},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    }
    ours = build(config(zero_stage=2), 4, on_cuda=False)
    merged = build(with_file(tmp_path, user, zero_stage=2), 4, on_cuda=False)
    assert merged["wall_clock_breakdown"] is True
    assert merged["zero_optimization"] == ours["zero_optimization"] | {"reduce_bucket_size": 1000}
    assert merged["fp16"] == {"enabled": False, "loss_scale_window": 500}
    for key in ("train_batch_size", "gradient_clipping", "bf16", "gradient_accumulation_steps"):
        assert merged[key] == ours[key]
    assert "optimizer" not in merged


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ({"train_batch_size": 32}, ("train_batch_size to 32", "training.global_batch_size", "16")),
        ({"train_micro_batch_size_per_gpu": 1}, ("train_micro_batch_size_per_gpu", "training.micro_batch_size")),
        ({"gradient_accumulation_steps": 8}, ("gradient_accumulation_steps", "training.global_batch_size")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping to 1.0", "training.clip_grad", "0.7")),
        ({"zero_optimization": {"stage": 3}}, ("zero_optimization.stage to 3", "engine.zero_stage", "2")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled to true", "training.precision")),
        ({"bf16": {"enabled": True}}, ("bf16.enabled", "training.precision")),
        ({"fp16": {"loss_scale": 128}}, ("fp16.loss_scale", "training.precision")),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ("zero_optimization.offload_optimizer.device", "engine.offload_optimizer"),
        ),
        ({"optimizer": {"type": "Lion"}}, ("optimizer.type", "training.*")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, ("optimizer.params.lr", "training.*")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler.type", "training.schedule")),
        ({"bf16": {"check_grad_overflow": False}}, ("bf16.check_grad_overflow", "max_bad_steps")),
        ({"zero_optimisation": {"stage": 2}}, ("zero_optimisation.stage", "zero_optimization")),
        ({"pipeline": {"stages": 2}}, ("pipeline.stages", "does not use")),
        ({"zero_optimization": 3}, ("zero_optimization to 3", "is a section")),
        ({"bf16": True}, ("bf16 to true", "is a section")),
        ({"zero_optimization": {"stage": {"a": 1}}}, ("zero_optimization.stage.a", "is one value")),
        ({"aio": 3, "aio.x": 1}, ("aio.x", "aio is one value")),
        ("{oops", ("cannot be read as JSON",)),
        ("[1]", ("must hold a JSON object",)),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(tmp_path: Path, user: Any, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(with_file(tmp_path, user, zero_stage=2), 4, on_cuda=False)
    message = str(refusal.value)
    assert "ds.json" in message
    for part in named:
        assert part in message
    assert "\n" not in message


def test_accepted_sections_are_in_order(tmp_path: Path) -> None:
    """The message that lists them is for people."""
    with pytest.raises(ConfigError) as refusal:
        build(with_file(tmp_path, {"x": 1}), 4, on_cuda=False)
    listed = str(refusal.value).split("accepted sections: ")[1].rstrip(").").split(", ")
    assert all(a < b for a, b in pairwise(listed))


def test_what_lays_the_states_out_is_read_where_the_stage_does(tmp_path: Path) -> None:
    user = {"zero_optimization": {"round_robin_gradients": True, "sub_group_size": 5000}}
    robin, size = "zero_optimization.round_robin_gradients", "zero_optimization.sub_group_size"
    assert cuts(with_file(tmp_path, user, zero_stage=2)) == {robin: True, size: None}
    assert cuts(with_file(tmp_path, user, zero_stage=3)) == {robin: None, size: 5000}
    plain = {"zero_optimization": {"round_robin_gradients": False, "sub_group_size": "auto"}}
    for stage in (0, 1, 3):
        assert set(cuts(with_file(tmp_path, plain, zero_stage=stage)).values()) == {None}
    assert set(cuts(config()).values()) == {None}


def test_the_users_nvme_path_may_repeat_ours(tmp_path: Path) -> None:
    engine = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/fast"}
    same = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/fast", "buffer_count": 8}}}
    merged = build(with_file(tmp_path, same, **engine), 4, on_cuda=False)["zero_optimization"]["offload_optimizer"]
    assert merged["buffer_count"] == 8
    same["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/slow"
    with pytest.raises(ConfigError, match=r"nvme_path to /slow, but engine.nvme_path makes it /fast"):
        build(with_file(tmp_path, same, **engine), 4, on_cuda=False)
