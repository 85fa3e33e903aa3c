"""Config -> the dictionary DeepSpeed is started with. Every DeepSpeed JSON key of the project is here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.schema import Config
from mka_megatron.training.segments import segments_per_step

_BUCKET_ELEMENTS = 50_000_000
_NVME_SUB_GROUP_ELEMENTS = 100_000_000
_LARGEST_TOKENIZER = 262_144

# The value of these keys follows from our configuration, so a user's JSON may only repeat it.
_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.clip_grad",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "fp16.loss_scale": "training.precision",
    "fp16.initial_scale_power": "engine.initial_loss_scale_power",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "engine.nvme_path",
    "zero_optimization.offload_param.device": "engine.offload_param",
    "zero_optimization.offload_param.nvme_path": "engine.nvme_path",
}
# Left to the user: they change speed, memory or logging, not what is computed.
_FREE = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "dump_state",
        "fp16",
        "memory_breakdown",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_optimization",
    }
)
# The non-finite guard and the learning-rate schedule of the engine rest on these.
_FIXED = {
    "optimizer": "the optimizer comes from training.* (AdamW)",
    "scheduler": "the schedule comes from training.schedule",
    "bf16.check_grad_overflow": "the guard of training.max_bad_steps needs it on",
    "bf16.immediate_grad_update": "the guard of training.max_bad_steps needs the default",
    "zero_optimization.compute_grad_norm": "the guard of training.max_bad_steps needs it on",
    "zero_optimization.elastic_checkpoint": "a checkpoint goes on in another topology without it",
}
# Of the free ones, those by which a ZeRO stage orders or groups a rank's states, in memory and in its files.
_CUTS = {"zero_optimization.round_robin_gradients": (1, 2), "zero_optimization.sub_group_size": (3,)}


def accumulation_steps(config: Config, data_parallel: int) -> int:
    """Micro-batches per rank and optimizer step."""
    per_pass = config.training.micro_batch_size * data_parallel
    if config.training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size is {config.training.global_batch_size}, which is not a multiple of "
            f"training.micro_batch_size x replicas = {config.training.micro_batch_size} x {data_parallel}."
        )
    return config.training.global_batch_size // per_pass


def build(config: Config, data_parallel: int, on_cuda: bool) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize` and `deepspeed.zero.Init`.

    Args:
        config: a validated configuration; `engine.deepspeed_config`, if set, is merged over ours.
        data_parallel: number of replicas.
        on_cuda: whether the run is on GPUs (pinned host memory and overlapped communication pay there).

    Raises:
        ConfigError: the user's file is unreadable, or a key in it contradicts the configuration.
    """
    ours = _ours(config, data_parallel, on_cuda)
    path = config.engine.deepspeed_config
    return ours if path is None else _merge(ours, _read(path), path)


def clips_itself(config: Config) -> bool:
    """Whether DeepSpeed leaves clipping and the non-finite check to the engine (stage 0 in fp32)."""
    return config.engine.zero_stage == 0 and config.training.precision == "fp32"


def cuts(config: Config) -> dict[str, Any]:
    """What the user's JSON says of how a rank's states lie in its files; None where it leaves that as it is."""
    user = {} if config.engine.deepspeed_config is None else _read(config.engine.deepspeed_config)
    values = {key: _lookup(user, key) if config.engine.zero_stage in stages else None for key, stages in _CUTS.items()}
    return {key: None if value in (False, "auto") else value for key, value in values.items()}


def requested_stage(path: str) -> int | None:
    """The ZeRO stage that a DeepSpeed JSON asks for, if it does. Raises ConfigError where it cannot be read."""
    stage = _lookup(_read(path), "zero_optimization.stage")
    if stage is not None and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise ConfigError(f"engine.deepspeed_config: {path} sets zero_optimization.stage to {show(stage)}; give 0, 1, 2 or 3.")
    return stage


def _ours(config: Config, data_parallel: int, on_cuda: bool) -> dict[str, Any]:
    training, engine = config.training, config.engine
    result: dict[str, Any] = {
        "train_batch_size": training.global_batch_size * segments_per_step(config),
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, data_parallel) * segments_per_step(config),
        "gradient_clipping": 0.0 if clips_itself(config) else training.clip_grad,
        "zero_optimization": _zero(config, data_parallel, on_cuda),
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "zero_force_ds_cpu_optimizer": False,  # see optimizer.build_optimizer
        "steps_per_print": None,
        "checkpoint": {"tag_validation": "Ignore"},
    }
    if training.precision == "fp16":
        result["fp16"] |= {"loss_scale": 0, "initial_scale_power": engine.initial_loss_scale_power}
    if training.precision == "bf16" and engine.zero_stage > 0:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    if "nvme" in (engine.offload_optimizer, engine.offload_param):
        result["aio"] = {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 1}
    return result


def _zero(config: Config, data_parallel: int, on_cuda: bool) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 0:
        return zero
    zero |= {
        "overlap_comm": on_cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
    }
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer, "pin_memory": on_cuda}
        if engine.offload_optimizer == "nvme":
            zero["offload_optimizer"]["nvme_path"] = _swap_folder(config)
            zero["sub_group_size"] = _NVME_SUB_GROUP_ELEMENTS
    if engine.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch.nn.functional.linear for good
        if config.training.mlp_tile is not None:
            zero["leaf_module"] = {"classes": ["TiledMLP"]}  # its weights are gathered once, not for every tile
    if engine.offload_param != "none":
        zero["offload_param"] = {"device": engine.offload_param, "pin_memory": on_cuda}
        if engine.offload_param == "nvme":
            zero["offload_param"] |= {"nvme_path": _swap_folder(config), "buffer_size": _buffer(config, data_parallel)}
    return zero


def _swap_folder(config: Config) -> str:
    """This run's folder under engine.nvme_path: DeepSpeed names swap files by rank only, so two runs would meet."""
    run = hashlib.sha256(str(Path(config.training.output_dir).resolve()).encode()).hexdigest()[:12]
    return str(Path(config.engine.nvme_path or "") / f"run-{run}")


def _buffer(config: Config, data_parallel: int) -> int:
    """Elements of the largest parameter's partition: what one buffer of the parameter swapper must hold."""
    model = config.model
    vocabulary = model.vocab_size
    if vocabulary is None:
        vocabulary = config.data.tokenizer_vocab_size if config.data.tokenizer is None else _LARGEST_TOKENIZER
    heads = model.num_attention_heads + 2 * model.num_kv_heads
    rows = max(vocabulary + model.vocab_multiple, 2 * model.ffn_hidden_size, heads * model.head_dim)
    largest = rows * model.hidden_size // config.parallel.tensor_parallel
    return max(largest // data_parallel, 1 << 18) + 1024


def _read(path: str) -> dict[str, Any]:
    try:
        user = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"engine.deepspeed_config: {path} cannot be read as JSON ({error}).") from None
    if not isinstance(user, dict):
        raise ConfigError(f"engine.deepspeed_config: {path} must hold a JSON object.")
    return user


def _merge(ours: dict[str, Any], user: dict[str, Any], path: str) -> dict[str, Any]:
    merged = json.loads(json.dumps(ours))
    for key, value in _leaves(user):
        _check_shape(merged, key, value, path)
        if value == "auto":  # the Hugging Face convention for "derive it": ours where we have it, else the default
            continue
        if key == "optimizer.type" and value == "AdamW":
            continue
        if key in _FIXED or key.split(".")[0] in _FIXED:
            why = _FIXED.get(key) or _FIXED[key.split(".")[0]]
            raise ConfigError(f"engine.deepspeed_config: {path} sets {show(key)}, but {why}; remove the key.")
        if key in _OWNED:
            expected = _lookup(ours, key)
            if key.endswith(".nvme_path") and expected is not None:
                expected = str(Path(expected).parent)
            if not _same(value, expected):
                raise ConfigError(
                    f"engine.deepspeed_config: {path} sets {key} to {show(value)}, but {_OWNED[key]} makes it "
                    f"{show(expected)}; remove the key or change {_OWNED[key]}."
                )
            continue
        if key.split(".")[0] not in _FREE:
            raise ConfigError(
                f"engine.deepspeed_config: {path} sets {show(key)}, which this engine does not use; remove the key "
                f"(accepted sections: {', '.join(sorted(_FREE))})."
            )
        _set(merged, key, value)
    return merged


def _check_shape(merged: dict[str, Any], key: str, value: Any, path: str) -> None:
    """Refuse a section that is one value, and a value that is a section. Raises ConfigError."""
    if isinstance(_lookup(merged, key), dict):
        raise ConfigError(f"engine.deepspeed_config: {path} sets {show(key)} to {show(value)}, but it is a section; write it as "
                          "an object.")
    *parents, _ = key.split(".")
    for name in (".".join(parents[: n + 1]) for n in range(len(parents))):
        if not isinstance(_lookup(merged, name), dict | type(None)):
            raise ConfigError(f"engine.deepspeed_config: {path} sets {show(key)}, but {name} is one value; write it without an object.")


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, dict):
            found.append((prefix + key, value))
    return found


def _lookup(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _same(value: Any, expected: Any) -> bool:
    """Equal, where an absent section counts as off."""
    off = (None, False, "none")
    return value == expected or (value in off and expected in off)
