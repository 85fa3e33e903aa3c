"""A benchmark small enough for tests: a few kilobytes of Python sources and a model of two layers."""

from __future__ import annotations

import sysconfig
from pathlib import Path

TOKENS = 4 * 128 * 3
"""Three steps."""


def overrides(cache: Path) -> list[str]:
    """What makes it small; `cache` is where its data go."""
    text = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return [
        f"data.train=[{{path: '{text}/*.py'}}]", f"data.cache_dir={cache}", "data.valid_fraction=0.3",
        "data.tokenizer_vocab_size=384", "data.sequence_length=128", "memory_hierarchy.l1.chunk_size=32",
        "model={num_layers: 2, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4, num_kv_heads: 2, head_dim: 16}",
        "attention.mla={kv_lora_rank: 16, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16}",
        "routing.gate_hidden_size=16", "training.eval_batches=4", "training.warmup_steps=2",
        "training.global_batch_size=4", "training.micro_batch_size=4",
    ]
