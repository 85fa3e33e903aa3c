"""What a typed configuration must satisfy before any process group starts.

Every check is a function of the configuration and raises ConfigError with one sentence that names key, value
and fix. `validate` needs no files; `check_files` looks at the paths that the run needs to exist.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.schema import Config, DataConfig, ParallelConfig
from mka_megatron.config.variants import (
    GATED,
    HAS_HF_WEIGHTS,
    block_core,
    effective_kv_heads,
    has_kernels,
    needs_chunks,
    recalls,
)

# Smallest value of each number; None means "greater than zero".
LIMITS: dict[str, int | None] = {
    "model.num_layers": 1, "model.hidden_size": 1, "model.ffn_hidden_size": 1, "model.num_attention_heads": 1,
    "model.num_kv_heads": 1, "model.head_dim": 2, "model.vocab_size": 1, "model.vocab_multiple": 1,
    "model.max_position_embeddings": 1, "model.norm_eps": None, "model.init_std": None,
    "model.rope.theta": None, "model.rope.factor": 1, "model.rope.original_max_position": 1,
    "model.rope.low_freq_factor": None, "model.rope.high_freq_factor": None, "model.rope.beta_fast": None,
    "model.rope.beta_slow": None,
    "attention.mla.q_lora_rank": 1, "attention.mla.kv_lora_rank": 1, "attention.mla.qk_nope_head_dim": 1,
    "attention.mla.qk_rope_head_dim": 2, "attention.mla.v_head_dim": 1,
    "routing.gate_hidden_size": 1,
    "memory_hierarchy.l1.window": 1, "memory_hierarchy.l1.chunk_size": 1,
    "memory_hierarchy.l2.min_span": 1, "memory_hierarchy.l2.max_span": 1,
    "memory_hierarchy.l3.recalled_chunks": 1, "memory_hierarchy.l3.hash_bits": 64,
    "memory_hierarchy.l3.hash_tables": 1, "memory_hierarchy.l3.hash_seed": 0, "memory_hierarchy.l3.hbm_pool_gib": 0,
    "memory_hierarchy.l3.dram_pool_gib": None, "memory_hierarchy.l3.ssd_pool_gib": None,
    "training.segment_length": 1, "training.segments_per_step": 1, "training.logits_tile": 1, "training.mlp_tile": 1,
    "parallel.tensor_parallel": 1, "parallel.context_parallel": 1, "parallel.pipeline_parallel": 1,
    "parallel.data_parallel": 1,
    "data.tokenizer_vocab_size": 257, "data.workers": 1, "data.sequence_length": 2,
    "training.steps": 1, "training.micro_batch_size": 1, "training.global_batch_size": 1,
    "training.learning_rate": None, "training.min_learning_rate": 0, "training.warmup_steps": 0,
    "training.decay_steps": 0, "training.weight_decay": 0, "training.adam_eps": None, "training.clip_grad": 0,
    "training.seed": 0, "training.eval_interval": 0, "training.eval_batches": 0, "training.save_interval": 0,
    "training.keep_last": 1, "training.max_bad_steps": 1,
    "engine.initial_loss_scale_power": 0, "engine.timeout_seconds": 1,
    "logging.interval": 1,
}
LARGEST_INTEGER = 2**31 - 1
MOST_LAYERS = 1000
"""What is worked out layer by layer before a run starts stays a matter of seconds."""


def validate(config: Config, world_size: int | None = None) -> None:
    """Refuse an impossible configuration.

    Args:
        config: typed configuration.
        world_size: number of ranks; None skips the checks that need it.

    Raises:
        ConfigError: one sentence that names the key, the value and the fix.
    """
    validate_attention(config)
    _check_heads(config)
    _check_memory(config)
    _check_parallel(config)
    _check_data(config)
    _check_training(config)
    _check_engine(config)
    data_parallel = config.parallel.data_parallel
    if world_size is not None:
        data_parallel = data_parallel_size(config.parallel, world_size)
    _check_batches(config, data_parallel)


def validate_attention(config: Config) -> None:
    """The part of `validate` that depends on attention, routing and memory_hierarchy only. Raises ConfigError."""
    check_values(config, "")
    _check_limits(config)
    _check_attention(config)
    _check_levels(config)


def validate_architecture(config: Config) -> None:
    """The part of `validate` that says which model it is: heads, attention, routing, memory. Raises ConfigError."""
    validate_attention(config)
    _check_heads(config)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas on `world_size` ranks; raises ConfigError where the layout does not fill them exactly."""
    sizes = {"tensor_parallel": parallel.tensor_parallel, "context_parallel": parallel.context_parallel,
             "pipeline_parallel": parallel.pipeline_parallel}
    shard = math.prod(sizes.values())
    product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1 or name.startswith("t"))
    if parallel.data_parallel is not None:
        if shard * parallel.data_parallel != world_size:
            raise refuse("parallel.data_parallel", parallel.data_parallel,
                         f"with {product} it needs {shard * parallel.data_parallel} ranks but {world_size} were "
                         "started; leave parallel.data_parallel out or start that many (NPROC)")
    elif world_size % shard:
        raise ConfigError(f"{product} needs a multiple of {shard} ranks but {world_size} were started; "
                          "change it or the number of processes (NPROC).")
    return world_size // shard


def check_files(config: Config) -> None:
    """Refuse a path that must exist before the run starts and does not."""
    engine = config.engine
    if engine.deepspeed_config is not None:
        path = Path(engine.deepspeed_config)
        fix = "give the path of a DeepSpeed JSON file"
        if not path.is_file():
            raise refuse("engine.deepspeed_config", engine.deepspeed_config, f"there is no such file; {fix}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise refuse("engine.deepspeed_config", engine.deepspeed_config, f"it is not JSON; {fix}") from None
        if not isinstance(content, dict):
            raise refuse("engine.deepspeed_config", engine.deepspeed_config, f"it is not a JSON object; {fix}")
    if config.training.resume not in ("auto", "none") and not Path(config.training.resume).is_dir():
        raise refuse("training.resume", config.training.resume,
                     "it must be auto, none or the directory of a checkpoint that exists")


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_values(value: Any, key: str) -> None:
    """Finite numbers, integers that fit, text that can be a file name."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_values(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            check_values(item, f"{key}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise refuse(key, value, "it must be a finite number")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise refuse(key, value, f"it must be at most {LARGEST_INTEGER}")
    elif isinstance(value, str) and (not value.strip() or not value.isprintable()):
        raise refuse(key, value, "it must be printable text, or null or left out for the default")


def _check_limits(config: Config) -> None:
    for key, smallest in LIMITS.items():
        value = _value(config, key)
        if value is None:
            continue
        if smallest is None and value <= 0:
            raise refuse(key, value, "it must be greater than 0")
        if smallest is not None and value < smallest:
            raise refuse(key, value, f"it must be at least {smallest}")
    if config.model.num_layers > MOST_LAYERS:
        raise refuse("model.num_layers", config.model.num_layers, f"it must be at most {MOST_LAYERS}")
    for key in ("logging.profile_steps", "logging.memory_snapshot_steps"):
        for step in _value(config, key):
            if not 1 <= step <= config.training.steps:
                raise refuse(key, step, f"steps run from 1 to training.steps ({config.training.steps})")


def _check_heads(config: Config) -> None:
    model, tensor_parallel, variant = config.model, config.parallel.tensor_parallel, config.attention.variant
    kv_heads = effective_kv_heads(variant, model)
    if model.head_dim % 2:
        raise refuse("model.head_dim", model.head_dim, "rotary embedding turns pairs of channels; make it even")
    if config.attention.mla.qk_rope_head_dim % 2:
        raise refuse("attention.mla.qk_rope_head_dim", config.attention.mla.qk_rope_head_dim,
                     "rotary embedding turns pairs of channels; make it even")
    if model.num_attention_heads % model.num_kv_heads:
        raise refuse("model.num_kv_heads", model.num_kv_heads,
                     f"it must divide model.num_attention_heads ({model.num_attention_heads})")
    if model.num_attention_heads % tensor_parallel:
        raise refuse("parallel.tensor_parallel", tensor_parallel,
                     f"it must divide model.num_attention_heads ({model.num_attention_heads})")
    if model.ffn_hidden_size % tensor_parallel:
        raise refuse("parallel.tensor_parallel", tensor_parallel,
                     f"it must divide model.ffn_hidden_size ({model.ffn_hidden_size})")
    if model.vocab_multiple % tensor_parallel:
        raise refuse("model.vocab_multiple", model.vocab_multiple,
                     f"it must be a multiple of parallel.tensor_parallel ({tensor_parallel})")
    if kv_heads < tensor_parallel and variant in GATED:
        raise refuse("parallel.tensor_parallel", tensor_parallel,
                     f"attention.variant {variant} needs at least one KV head per rank and there are {kv_heads}; "
                     f"use parallel.tensor_parallel {kv_heads} or less, or more model.num_kv_heads")
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        raise refuse("parallel.tensor_parallel", tensor_parallel,
                     f"with {kv_heads} KV heads it must divide them or be a multiple of them; change it or "
                     "model.num_kv_heads")
    if model.init_from is not None and (variant not in HAS_HF_WEIGHTS or kv_heads != model.num_kv_heads):
        raise refuse("attention.variant", variant, f"the weights of model.init_from have {model.num_kv_heads} KV heads "
                     "in grouped projections; use gqa, mka or fastmka")
    rope = model.rope
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise refuse("model.rope.high_freq_factor", rope.high_freq_factor,
                     f"it must be greater than model.rope.low_freq_factor ({rope.low_freq_factor})")
    if rope.scaling == "yarn" and rope.beta_fast <= rope.beta_slow:
        raise refuse("model.rope.beta_fast", rope.beta_fast,
                     f"it must be greater than model.rope.beta_slow ({rope.beta_slow})")
    if rope.scaling == "none" and rope.factor != 1:
        raise refuse("model.rope.factor", rope.factor,
                     "it has no effect with model.rope.scaling none; set the scaling, or leave the factor out")


def _check_attention(config: Config) -> None:
    attention, routing, memory = config.attention, config.routing, config.memory_hierarchy
    if attention.mixture != "output" and attention.variant != "mka":
        raise refuse("attention.mixture", attention.mixture,
                     f"only attention.variant mka has a mixture and the variant is {attention.variant}; leave it out")
    if attention.fuse != "kv" and attention.variant != "fastmka":
        raise refuse("attention.fuse", attention.fuse,
                     f"only attention.variant fastmka fuses and the variant is {attention.variant}; leave it out")
    if attention.core == "block" and attention.variant not in ("fastmka", "blockmka"):
        raise refuse("attention.core", attention.core,
                     f"attention.variant {attention.variant} has the dense core only; use fastmka or blockmka")
    if attention.block_backend != "auto" and not block_core(config):
        raise refuse("attention.block_backend", attention.block_backend,
                     "only the block core has a backend; leave it out, or use attention.core block")
    if attention.kernels == "cuda" and not has_kernels(config):
        raise refuse("attention.kernels", attention.kernels,
                     "with these levels attention.variant "
                     f"{attention.variant} has nothing that the kernels compute; leave it out")
    by_score = block_core(config) or attention.mixture == "score"
    if attention.variant in GATED and by_score and routing.mode == "top1":
        raise refuse("routing.mode", routing.mode, "as a weight on attention scores (attention.mixture score, block "
                     "core) its gradient is zero; use soft or top2, or mixture output")
    one_level = not memory.l2.enabled and not memory.l3.enabled
    if attention.variant in GATED and routing.mode in ("top1", "top2") and one_level:
        raise refuse("routing.mode", routing.mode, "with memory_hierarchy.l2.enabled false and l3.enabled false there "
                     "is one level to choose from; use soft, or enable one")


def _check_levels(config: Config) -> None:
    memory = config.memory_hierarchy
    window, chunk, l3 = memory.l1.window, memory.l1.chunk_size, memory.l3
    if window is not None and window % chunk:
        raise refuse("memory_hierarchy.l1.window", window,
                     f"it must be a multiple of memory_hierarchy.l1.chunk_size ({chunk})")
    if window is None and block_core(config):
        raise refuse("memory_hierarchy.l1.window", "null",
                     f"the block core needs a window; set it to a multiple of memory_hierarchy.l1.chunk_size ({chunk})")
    if memory.l2.min_span <= 1:
        raise refuse("memory_hierarchy.l2.min_span", memory.l2.min_span,
                     "the decay is 1 - 1/span and must be above 0; make it greater than 1")
    if memory.l2.max_span < memory.l2.min_span:
        raise refuse("memory_hierarchy.l2.max_span", memory.l2.max_span,
                     f"it must be at least memory_hierarchy.l2.min_span ({memory.l2.min_span})")
    if l3.enabled and not recalls(config):
        raise refuse("memory_hierarchy.l3.enabled", True,
                     f"attention.variant {config.attention.variant} has no memory levels; use mka, fastmka or blockmka")
    if l3.hash_bits % 64:
        raise refuse("memory_hierarchy.l3.hash_bits", l3.hash_bits, "codes are whole 64-bit words; use 64, 128, 256, ...")


def _check_memory(config: Config) -> None:
    window = config.memory_hierarchy.l1.window
    if window is not None and not block_core(config) and window < config.data.sequence_length:
        raise refuse("memory_hierarchy.l1.window", window,
                     "a window shorter than the sequence needs the block core; use attention.variant blockmka, or "
                     f"fastmka with attention.core block, or null, or at least data.sequence_length "
                     f"({config.data.sequence_length})")
    if needs_chunks(config) and config.data.reset_at_documents and not config.data.pad_documents_to_chunks:
        raise refuse("data.pad_documents_to_chunks", False, "chunks must not cross documents under the block core or "
                     "memory_hierarchy.l3.enabled; set it to true (or data.reset_at_documents to false)")
    _check_tiers(config)


def _check_tiers(config: Config) -> None:
    memory, l3 = config.memory_hierarchy, config.memory_hierarchy.l3
    on_ssd = l3.placement == "ssd"
    used = {"l3.placement": on_ssd, "l3.hbm_pool_gib": l3.hbm_pool_gib > 0, "l3.dram_pool_gib": l3.dram_pool_gib is not None}
    for key, wanted in used.items():
        if wanted and not l3.enabled:
            raise refuse(f"memory_hierarchy.{key}", _value(config, f"memory_hierarchy.{key}"),
                         "there is no long-term memory to place; set memory_hierarchy.l3.enabled, or leave it out")
        if wanted and not block_core(config):
            raise refuse(f"memory_hierarchy.{key}", _value(config, f"memory_hierarchy.{key}"), "the dense core keeps every "
                         "token on the device; use attention.variant blockmka, or fastmka with attention.core block, or leave it out")
    if on_ssd and memory.ssd_spill_path is None:
        raise refuse("memory_hierarchy.l3.placement", "ssd",
                     "it needs a directory; set memory_hierarchy.ssd_spill_path")
    if on_ssd and l3.dram_pool_gib is None:
        raise refuse("memory_hierarchy.l3.placement", "ssd", "nothing would reach the disk while DRAM is unlimited; set "
                     "memory_hierarchy.l3.dram_pool_gib")
    for key in ("ssd_spill_path", "l3.ssd_pool_gib"):
        value = _value(config, f"memory_hierarchy.{key}")
        if value is not None and not on_ssd:
            raise refuse(f"memory_hierarchy.{key}", value,
                         f"memory_hierarchy.l3.placement is {l3.placement}; set it to ssd, or leave this out")


def _check_parallel(config: Config) -> None:
    parallel, sequence = config.parallel, config.data.sequence_length
    if parallel.pipeline_parallel != 1:
        if config.engine.zero_stage >= 2:
            raise refuse("engine.zero_stage", config.engine.zero_stage,
                         f"ZeRO-2 and ZeRO-3 do not work with parallel.pipeline_parallel {parallel.pipeline_parallel}; "
                         "set parallel.pipeline_parallel to 1")
        raise refuse("parallel.pipeline_parallel", parallel.pipeline_parallel,
                     "pipeline stages are not supported; set it to 1 and use tensor_parallel or ZeRO-3")
    if parallel.context_parallel > 1:
        _check_context(config)
    if parallel.sequence_parallel and parallel.tensor_parallel == 1:
        raise refuse("parallel.sequence_parallel", True,
                     "it shards over the tensor-parallel ranks; set parallel.tensor_parallel above 1, or turn it off")
    shares = parallel.tensor_parallel * parallel.context_parallel
    if parallel.sequence_parallel and sequence % shares:
        raise refuse("data.sequence_length", sequence, "with parallel.sequence_parallel it must be a multiple of "
                     f"parallel.tensor_parallel x context_parallel ({shares})")


def _check_context(config: Config) -> None:
    """Rows that context-parallel ranks share."""
    ranks, attention, l2 = config.parallel.context_parallel, config.attention, config.memory_hierarchy.l2
    if attention.mixture == "score":
        raise refuse("parallel.context_parallel", ranks,
                     "attention.mixture score is not shared over ranks; set it to 1, or use mixture output")
    if attention.variant in ("mka", "fastmka") and l2.enabled and l2.summary == "mean":
        raise refuse("memory_hierarchy.l2.summary", "mean", "between context-parallel ranks only the ema carries its "
                     "state; use ema, or set parallel.context_parallel to 1")
    sequence, chunk = config.data.sequence_length, config.memory_hierarchy.l1.chunk_size
    if sequence % ranks:
        raise refuse("data.sequence_length", sequence, f"it must be a multiple of parallel.context_parallel ({ranks})")
    if needs_chunks(config) and sequence % (ranks * chunk):
        raise refuse("data.sequence_length", sequence, "every context-parallel rank holds whole chunks; make it a "
                     f"multiple of parallel.context_parallel x memory_hierarchy.l1.chunk_size ({ranks * chunk})")


def check_sources(data: DataConfig) -> None:
    """Refuse sources that cannot make a training and a validation set."""
    if not data.train:
        raise ConfigError("data.train is []: there must be at least one source; leave it out for the default corpus.")
    for key, sources in (("train", data.train), ("valid", data.valid)):
        for index, source in enumerate(sources):
            if source.weight <= 0:
                raise refuse(f"data.{key}[{index}].weight", source.weight, "it must be greater than 0")
    if not 0 <= data.valid_fraction < 1:
        raise refuse("data.valid_fraction", data.valid_fraction, "it must be at least 0 and less than 1")


def _check_data(config: Config) -> None:
    data, chunk = config.data, config.memory_hierarchy.l1.chunk_size
    if data.sequence_length > config.model.max_position_embeddings:
        raise refuse("data.sequence_length", data.sequence_length,
                     f"the model reaches model.max_position_embeddings ({config.model.max_position_embeddings}) "
                     "positions; shorten it, or raise that key")
    check_sources(data)
    if not data.valid and data.valid_fraction == 0:
        raise refuse("data.valid_fraction", data.valid_fraction,
                     "data.valid is empty, so nothing would be held out; raise it, or name sources in data.valid")
    if data.train_on_prompts and data.format != "sft":
        raise refuse("data.train_on_prompts", True, "only data.format sft has prompts; set the format or leave it out")
    if data.pad_documents_to_chunks and data.sequence_length % chunk:
        raise refuse("data.sequence_length", data.sequence_length, "with data.pad_documents_to_chunks it must be a "
                     f"multiple of memory_hierarchy.l1.chunk_size ({chunk})")


def _check_training(config: Config) -> None:
    training = config.training
    _check_segments(config)
    if training.warmup_steps > training.steps:
        raise refuse("training.warmup_steps", training.warmup_steps,
                     f"it must be at most training.steps ({training.steps})")
    if training.schedule == "wsd" and training.warmup_steps + training.decay_steps > training.steps:
        raise refuse("training.decay_steps", training.decay_steps,
                     f"with training.warmup_steps ({training.warmup_steps}) it is longer than training.steps "
                     f"({training.steps}); shorten it")
    if training.min_learning_rate > training.learning_rate:
        raise refuse("training.min_learning_rate", training.min_learning_rate,
                     f"it must be at most training.learning_rate ({training.learning_rate})")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise refuse(f"training.{name}", getattr(training, name), "it must be at least 0 and less than 1")


def _check_segments(config: Config) -> None:
    segment, steps = config.training.segment_length, config.training.segments_per_step
    sequence, chunk = config.data.sequence_length, config.memory_hierarchy.l1.chunk_size
    if segment is None:
        if steps is not None:
            raise refuse("training.segments_per_step", steps,
                         "a sample is one piece; set training.segment_length too, or leave it out")
        return
    if not block_core(config):
        raise refuse("training.segment_length", segment, "the dense core sees every token at once; use attention.variant "
                     "blockmka, or fastmka with attention.core block, or leave it out")
    if segment % chunk:
        raise refuse("training.segment_length", segment,
                     f"it must be a multiple of memory_hierarchy.l1.chunk_size ({chunk})")
    if sequence % segment:
        raise refuse("training.segment_length", segment, f"it must divide data.sequence_length ({sequence})")
    if steps is not None and (sequence // segment) % steps:
        raise refuse("training.segments_per_step", steps,
                     f"it must divide the segments of a sample ({sequence // segment})")
    if config.parallel.context_parallel > 1:
        raise refuse("training.segment_length", segment, "segments are not sharded over ranks; set "
                     "parallel.context_parallel to 1, or leave it out")
    if config.memory_hierarchy.l2.summary == "mean" and config.attention.variant == "fastmka":
        raise refuse("memory_hierarchy.l2.summary", "mean", "between segments only the ema carries its state; use ema, or "
                     "leave training.segment_length out")


def _check_engine(config: Config) -> None:
    engine = config.engine
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        raise refuse("engine.offload_optimizer", engine.offload_optimizer,
                     "it needs ZeRO; set engine.zero_stage to 1 or more")
    if engine.offload_optimizer == "nvme" and engine.zero_stage != 3:
        raise refuse("engine.offload_optimizer", "nvme",
                     f"it needs engine.zero_stage 3 (it is {engine.zero_stage}); set that, or offload to cpu")
    if engine.offload_param != "none" and engine.zero_stage != 3:
        raise refuse("engine.offload_param", engine.offload_param,
                     f"it needs engine.zero_stage 3 (it is {engine.zero_stage}); set that, or none")
    if engine.nvme_path is None and "nvme" in (engine.offload_optimizer, engine.offload_param):
        key = "offload_optimizer" if engine.offload_optimizer == "nvme" else "offload_param"
        raise refuse(f"engine.{key}", "nvme", "it needs a directory; set engine.nvme_path")
    if config.training.async_save and "nvme" in (engine.offload_optimizer, engine.offload_param):
        raise refuse("training.async_save", True, "it keeps a copy of the rank's states in host memory, which offload to nvme is "
                     "there to save; set it to false")
    if engine.initial_loss_scale_power > 32:
        raise refuse("engine.initial_loss_scale_power", engine.initial_loss_scale_power, "it must be at most 32")


def _check_batches(config: Config, data_parallel: int | None) -> None:
    training = config.training
    replicas = data_parallel or 1
    per_step = training.micro_batch_size * replicas
    if training.global_batch_size % per_step:
        layout = f" x {replicas} replicas" if replicas > 1 else ""
        raise refuse("training.global_batch_size", training.global_batch_size,
                     f"it must be a multiple of training.micro_batch_size {training.micro_batch_size}{layout}, "
                     f"for example {math.ceil(training.global_batch_size / per_step) * per_step}")
