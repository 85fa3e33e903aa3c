"""Tiny random Hugging Face checkpoints, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TOKENS = torch.randint(0, SHAPE["vocab_size"], (2, 96), generator=torch.Generator().manual_seed(3))
FAMILIES = ("qwen2", "qwen2-tied", "qwen2-yarn", "qwen3", "llama", "llama-tied")


def random_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model with every parameter, biases and norms too, drawn at random, so that a dropped one shows."""
    tied = family.endswith("-tied")
    if family.startswith("qwen2"):
        rope = {"rope_parameters": YARN} if family.endswith("yarn") else {}
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied, **rope))
    elif family.startswith("qwen3"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=tied))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, rope_parameters=LLAMA3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(model: PreTrainedModel, directory: Path, sharded: bool = False) -> Path:
    """Write `model`; `sharded` splits it over several safetensors files."""
    model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
    return directory
