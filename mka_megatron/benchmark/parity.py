"""Equally many parameters for every variant: the MLP takes what the attention leaves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import AttentionConfig, Config
from mka_megatron.planning.flops import weights

TOLERANCE = 0.01
"""Relative difference in parameters that counts as equal."""

_ALIGNMENT = 8  # channels: what half precision on tensor cores wants


def match_parameters(config: Config, variant: Any, vocab_size: int) -> Config:
    """`config` with the MLP width that brings its weights nearest to those of its model with another attention.

    Args:
        variant: attention.variant of that model, plain, with the MLP as `config` has it.
        vocab_size: rows of the output layer.

    Raises ConfigError where that is more than TOLERANCE away, or would leave no MLP.
    """
    like = dataclasses.replace(config, attention=AttentionConfig(variant, mla=config.attention.mla))
    wanted = weights(like, vocab_size)
    step = math.lcm(_ALIGNMENT, config.parallel.tensor_parallel)
    per_step = 3 * config.model.hidden_size * config.model.num_layers * step
    width = config.model.ffn_hidden_size // step * step
    at = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_hidden_size=width))
    width += step * round((wanted - weights(at, vocab_size)) / per_step)
    if width > 0:
        found = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_hidden_size=width))
        if abs(weights(found, vocab_size) - wanted) <= TOLERANCE * wanted:
            return found
    raise ConfigError(
        f"model.ffn_hidden_size: no width gives {config.attention.variant} the {wanted:,} weights of "
        f"{variant}; make the model larger, or compare without matching."
    )
