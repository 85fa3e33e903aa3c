"""The weights of a training checkpoint of any ZeRO stage into a model, without its optimizer and engine."""

from __future__ import annotations

import torch

from mka_megatron.config.schema import Config
from mka_megatron.model.gpt import GPT
from mka_megatron.training.manifest import Checkpoint
from mka_megatron.training.resharded import Resharded


def load_weights(model: GPT, checkpoint: Checkpoint, config: Config, tp_rank: int) -> None:
    """Fill `model`, one tensor at a time.

    Args:
        model: built from `config`, not partitioned by ZeRO.
        checkpoint: verified.
        config: the checkpoint's model under this run's tensor-parallel size, which may be another.
        tp_rank: of this process among those.

    Raises:
        ConfigError: the files are not those of this model, or the variant cannot change its tensor-parallel size.
    """
    source = Resharded(model, config, checkpoint, tp_rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source.read("weights", name, 0, parameter.view(-1))
        source.read_planes(model)
