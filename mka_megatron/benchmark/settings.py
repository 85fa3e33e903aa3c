"""Which configuration a contender of the benchmark has: what all share, and what a variant adds to it.

Every variant's documents are padded to chunks, whether it has chunks or not: so all see the same batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config

SHARED = (
    "model={num_layers: 2, hidden_size: 128, ffn_hidden_size: 352, num_attention_heads: 4, num_kv_heads: 2, head_dim: 32, "
    "init_std: 0.05}",
    "attention.mla={kv_lora_rank: 32, qk_nope_head_dim: 32, qk_rope_head_dim: 16, v_head_dim: 32}",
    "memory_hierarchy.l1.chunk_size=64",
    "data={train: [stdlib], tokenizer_vocab_size: 1024, sequence_length: 512, valid_fraction: 0.08, "
    "pad_documents_to_chunks: true, workers: 1}",
    "training={global_batch_size: 2, micro_batch_size: 2, learning_rate: 4e-3, min_learning_rate: 2e-4, warmup_steps: 25, "
    "eval_batches: 48}",
    "engine.zero_stage=0",
)
"""The small GPT and its data, where no configuration file says otherwise."""

ATTENTION = {
    "mha": ("attention.variant=mha",),
    "mqa": ("attention.variant=mqa",),
    "gqa": ("attention.variant=gqa",),
    "mla": ("attention.variant=mla",),
    "mka": ("attention.variant=mka",),
    "fastmka": ("attention.variant=fastmka",),
    "blockmka": (
        "attention.variant=blockmka",
        "memory_hierarchy.l1.window=128",
        "memory_hierarchy.l3={enabled: true, recalled_chunks: 2}",
    ),
}
"""What each attention type adds."""

ALIASES = {"fmka": "fastmka"}

_POSITIONS = 4096  # that the model has where nothing else is said


def attention_type(name: str) -> str:
    """The type that `name` means. Raises ConfigError for one that does not exist."""
    known = ALIASES.get(name, name)
    if known not in ATTENTION:
        raise ConfigError(f"attention type {name!r} does not exist; choose of {', '.join([*ATTENTION, *ALIASES])}.")
    return known


def contender(
    name: str,
    *,
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    num_groups: int | None = None,
    seed: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    precision: str | None = None,
    zero_stage: int | None = None,
    deepspeed_config: str | None = None,
    world_size: int = 1,
) -> Config:
    """The checked configuration of an attention type.

    Args:
        name: of ATTENTION or ALIASES.
        files: configuration files instead of SHARED.
        overrides: `section.key=value`, over everything but this function's own arguments.
        num_groups: key/value heads of the variants that have groups.
        seed: of weights and data order.
        sequence_length: slots of a row.
        batch_size: rows of an optimizer step over all ranks, so that results do not depend on their number.
        gradient_accumulation_steps: passes that a rank's rows of a step are cut into.
        precision: fp32, bf16 or fp16.
        zero_stage, deepspeed_config: engine.*.
        world_size: ranks.

    Raises ConfigError, in one sentence.
    """
    own = [f"{key}={value}" for key, value in (
        ("model.num_kv_heads", num_groups), ("training.seed", seed), ("data.sequence_length", sequence_length),
        ("training.global_batch_size", batch_size), ("training.precision", precision), ("engine.zero_stage", zero_stage),
        ("engine.deepspeed_config", deepspeed_config),
        ("model.max_position_embeddings", sequence_length if (sequence_length or 0) > _POSITIONS else None),
    ) if value is not None]  # fmt: skip
    base = [*(() if files else SHARED), *ATTENTION[attention_type(name)], *overrides, *own]
    config = load_config(files, [*base, "training.micro_batch_size=1"])
    parallel = config.parallel
    replicas = max(1, world_size // (parallel.tensor_parallel * parallel.context_parallel))
    passes, rows = replicas * gradient_accumulation_steps, config.training.global_batch_size
    if rows % passes:
        raise ConfigError(
            f"a batch of {rows} rows cannot be shared by {replicas} replicas with {gradient_accumulation_steps} passes each; "
            f"make it a multiple of {passes}."
        )
    return load_config(files, [*base, f"training.micro_batch_size={rows // passes}"], world_size=world_size)


def one_document_rows(config: Config) -> Config:
    """`config` with rows that are single documents, whatever lies in them: what attention over a whole row costs."""
    data = dataclasses.replace(config.data, reset_at_documents=False, pad_documents_to_chunks=False)
    return dataclasses.replace(config, data=data)
