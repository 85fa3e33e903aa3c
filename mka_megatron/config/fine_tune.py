"""The configuration of fine-tuning on transformers' models (tools/train_hf.py).

The sections attention, routing, memory_hierarchy and data are those of `schema`; the run's own keys have no section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.hf_sections import PLACEMENT, SECTIONS
from mka_megatron.config.load import apply_init_from, merge_layers
from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RoutingConfig,
)
from mka_megatron.config.typed import typed_as
from mka_megatron.config.validate import (
    LARGEST_INTEGER,
    check_sources,
    check_values,
    validate_architecture,
    validate_attention,
)
from mka_megatron.config.variants import block_core, gated, needs_chunks


@dataclass(frozen=True)
class BaseModelConfig:
    """The model to fine-tune."""

    init_from: str | None = None
    """Hugging Face directory or hub name: a plain Qwen2, Qwen3 or Llama, or one converted by tools/convert_hf.py."""


@dataclass(frozen=True)
class FineTuneConfig:
    """A fine-tuning run (tools/train_hf.py). Of data, tokenizer null takes the model's own."""

    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    """The model to fine-tune."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Which attention takes the place of the model's; gqa keeps it."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """The gate over the memory levels."""
    memory_hierarchy: MemoryConfig = field(default_factory=MemoryConfig)
    """The memory levels."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources, tokenizer and packing."""
    tp_size: int = 1
    """Ranks that share every layer (transformers' tensor parallelism); the others are replicas."""
    seed: int = 1234
    """Seed of the gates' first values and of the data order."""
    deterministic: bool = False
    """Refuse nondeterministic kernels."""
    epochs: int = 1
    """Passes over the training documents, where max_steps is null."""
    max_steps: int | None = None
    """Optimizer steps; null: as many as epochs takes; 0: evaluate only."""
    batch_size: int = 2
    """Samples per replica and forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: bfloat16 arithmetic (autocast) over weights and optimizer states in fp32."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 10
    """Steps of linear warm-up, which the throughput leaves out too."""
    weight_decay: float = 0.0
    """AdamW weight decay (not on biases, norms, decays and blends)."""
    adam_beta1: float = 0.9
    """AdamW first-moment decay."""
    adam_beta2: float = 0.999
    """AdamW second-moment decay."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm limit; 0 turns clipping off."""
    eval_ppl: bool = False
    """Held-out perplexity before the first and after the last step (--eval-ppl)."""
    eval_steps: int = 0
    """Steps between evaluations, with eval_ppl; 0: only before and after."""
    eval_batches: int = 0
    """Batches per replica and evaluation; 0: the whole validation set."""
    eval_stride: int | None = None
    """Sliding window: every window of sequence_length tokens goes on by this many, and only they count. null: rows of
    whole windows, packed as in training."""
    output_dir: str = "runs/fine-tune"
    """Where checkpoints, TensorBoard events, losses.jsonl and metrics.json go."""
    save_steps: int = 0
    """Steps between checkpoints; 0: only at the end and on a signal."""
    keep_last: int = 2
    """Checkpoints kept."""
    resume: Literal["auto", "none"] = "auto"
    """auto: go on from the newest checkpoint of output_dir, if any; none: refuse an output_dir that has one."""
    log_steps: int = 10
    """Steps between log lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""
    timeout_seconds: int = 1800
    """Time limit of a collective."""

    @property
    def architecture(self) -> Config:
        """The sections that say what a layer computes, as the rest of the package takes them."""
        return Config(attention=self.attention, routing=self.routing, memory_hierarchy=self.memory_hierarchy)


# Smallest value of each number; None means "greater than zero".
LIMITS: dict[str, int | None] = {
    "tp_size": 1, "seed": 0, "epochs": 1, "max_steps": 0, "batch_size": 1, "gradient_accumulation": 1,
    "learning_rate": None, "min_learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0,
    "adam_eps": None, "clip_grad": 0, "eval_steps": 0, "eval_batches": 0, "eval_stride": 1, "save_steps": 0, "keep_last": 1,
    "log_steps": 1, "timeout_seconds": 1,
}  # fmt: skip


def load_fine_tune(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), world_size: int | None = None,
                   locate: Callable[[str], str | None] | None = None) -> FineTuneConfig:  # fmt: skip
    """The checked configuration of a fine-tuning run.

    Args:
        paths: one YAML file or several, later ones over earlier ones.
        overrides: `dotted.key=value` strings over every file.
        world_size: number of ranks; None skips the check that needs it.
        locate: model.init_from -> the directory of its files, or None where they are not here; then nothing that
            depends on the model's config.json is checked. None: a directory is itself, a hub name is not here.

    Returns:
        The configuration; where the directory is there, model.init_from is it, and the sections that one of our
        models fixes are the model's.

    Raises:
        ConfigError: one sentence that names the key or file, the value and the fix.
    """
    merged, origins = merge_layers(paths, overrides, FineTuneConfig)
    config = typed_as(FineTuneConfig, merged, origins)
    _check_run(config, world_size)
    if config.model.init_from is None:
        raise refuse("model.init_from", None, "there is nothing to fine-tune; give a Hugging Face directory or hub name")
    directory = (locate or _as_directory)(config.model.init_from)
    whole = dataclasses.replace(config.architecture, data=config.data)
    if directory is None:
        validate_attention(whole)
    else:
        model = merged["model"] | {"init_from": directory}
        whole = apply_init_from(
            dataclasses.replace(whole, model=ModelConfig(init_from=directory)), merged | {"model": model}, origins
        )
        validate_architecture(whole)
        _check_shape(whole, config.tp_size)
        config = dataclasses.replace(config, model=BaseModelConfig(directory), **{
            name: getattr(whole, name) for name in SECTIONS
        })  # fmt: skip
    _check_memory(whole)
    return config


def _as_directory(name: str) -> str | None:
    return name if Path(name).is_dir() else None


def _check_run(config: FineTuneConfig, world_size: int | None) -> None:
    check_values(config, "")
    check_sources(config.data)
    for key, smallest in LIMITS.items():
        value = getattr(config, key)
        if value is not None and smallest is None and value <= 0:
            raise refuse(key, value, "it must be greater than 0")
        if value is not None and smallest is not None and value < smallest:
            raise refuse(key, value, f"it must be at least {smallest}")
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(config, key) >= 1:
            raise refuse(key, getattr(config, key), "it must be less than 1")
    if config.seed > LARGEST_INTEGER:
        raise refuse("seed", config.seed, f"it must be at most {LARGEST_INTEGER}")
    if config.min_learning_rate > config.learning_rate:
        raise refuse("min_learning_rate", config.min_learning_rate,
                     f"it must be at most learning_rate ({config.learning_rate})")
    data = config.data
    if config.eval_ppl and not data.valid and data.valid_fraction == 0:
        raise refuse("data.valid_fraction", 0.0, "with eval_ppl something must be held out; raise it, or name sources in "
                     "data.valid")
    if config.eval_stride is not None and config.eval_stride > data.sequence_length:
        raise refuse("eval_stride", config.eval_stride, "tokens between the windows would not count; make it at most "
                     f"data.sequence_length ({data.sequence_length})")
    if world_size is not None and world_size % config.tp_size:
        raise ConfigError(f"tp_size is {config.tp_size} but {world_size} processes were started: start a multiple of "
                          "it, or change it.")


def _check_shape(whole: Config, tp_size: int) -> None:
    if not gated(whole) and whole.model.num_kv_heads % tp_size:
        raise refuse("tp_size", tp_size, f"it must divide the model's {whole.model.num_kv_heads} KV heads; change it")
    positions, length = whole.model.max_position_embeddings, whole.data.sequence_length
    if length > positions:
        raise refuse("data.sequence_length", length, f"the model's max_position_embeddings is {positions}; shorten it, or "
                     "scale the rope in the model's config.json")


def _check_memory(whole: Config) -> None:
    """What the model does by itself, or does not do while it trains, must not be asked for."""
    window, data = whole.memory_hierarchy.l1.window, whole.data
    if window is not None and not block_core(whole) and window < data.sequence_length:
        raise refuse("memory_hierarchy.l1.window", window, "a window shorter than data.sequence_length "
                     f"({data.sequence_length}) needs the block core; use attention.variant blockmka, or fastmka with "
                     "attention.core block, or null")
    if data.pad_documents_to_chunks:
        raise refuse("data.pad_documents_to_chunks", True, "here the model itself puts documents on chunk boundaries; "
                     "leave it out")
    if data.format == "sft" and needs_chunks(whole):
        raise refuse("data.format", "sft", "under the block core and recall a response must begin on a chunk, which packed "
                     "rows cannot say here; train with python -m mka_megatron.training")
    defaults = Config()
    for key in PLACEMENT:
        if key.startswith("memory_hierarchy."):
            value, default = _at(whole, key), _at(defaults, key)
            if value != default:
                raise refuse(key, value, "fine-tuning keeps a whole sample on the device; leave it out")


def _at(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value
