"""Rotary tables: frequencies by transformers' own functions, so that they equal the original model's."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mka_megatron.config.schema import RopeConfig


class RotaryTable:
    """cos and sin of every position below `max_position`, fp32, computed once per device.

    Not a module: engines that cast a model to half precision must leave the table alone.
    """

    def __init__(self, rope: RopeConfig, rotary_dim: int, max_position: int) -> None:
        source = LlamaRotaryEmbedding(_hf_config(rope, rotary_dim, max_position))
        # angles [P, rotary_dim / 2] -> tables [P, rotary_dim], the two halves alike
        angles = torch.arange(max_position, dtype=torch.float32)[:, None] * source.inv_freq.float()[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        self._cos = angles.cos() * source.attention_scaling
        self._sin = angles.sin() * source.attention_scaling

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B,S] int64 -> (cos, sin), each [B,S,rotary_dim] fp32."""
        if self._cos.device != positions.device:
            self._cos, self._sin = self._cos.to(positions.device), self._sin.to(positions.device)
        return self._cos[positions], self._sin[positions]


def _hf_config(rope: RopeConfig, rotary_dim: int, max_position: int) -> LlamaConfig:
    parameters: dict[str, float | str] = {
        "rope_type": "default" if rope.scaling == "none" else rope.scaling,
        "rope_theta": rope.theta,
    }
    if rope.scaling != "none":
        parameters["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return LlamaConfig(head_dim=rotary_dim, max_position_embeddings=max_position, rope_parameters=parameters)
