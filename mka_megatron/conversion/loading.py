"""The weights of a training checkpoint of any ZeRO stage into a model, without its optimizer and engine."""

from __future__ import annotations

import dataclasses
from itertools import chain

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.conversion.exporting import assemble
from mka_megatron.conversion.shards import Shards
from mka_megatron.model.gpt import GPT
from mka_megatron.model.hf_table import Entry, hf_table, hf_tensors
from mka_megatron.training.manifest import Checkpoint


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
    ranks = int(checkpoint.body["layout"]["parallel.tensor_parallel"])
    planes = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".planes"))
    held = dict(chain(model.named_parameters(), planes))
    with torch.no_grad():
        if ranks == config.parallel.tensor_parallel:
            shards = Shards(
                checkpoint,
                {name: _entry(name, tensor, ranks) for name, tensor in held.items()},
                masters=False,
            )
            for name, tensor in held.items():
                if name in shards:
                    fragments = list(shards.fragments(name, tp_rank, 0, tensor.numel()))
                    tensor.copy_(torch.cat(fragments).view(tensor.shape))
            return
        theirs = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, tensor_parallel=ranks)
        )
        vocab_size = model.real_vocab_size
        table = _table(theirs, vocab_size)
        shards = Shards(checkpoint, table, masters=False)
        sources = hf_tensors(table)
        for entry in _table(config, vocab_size).values():
            if entry.name in shards:
                held[entry.name].copy_(_part(entry, sources, shards, held[entry.name], tp_rank))


def _part(entry: Entry, sources: dict, shards: Shards, like: Tensor, tp_rank: int) -> Tensor:
    """This rank's part of a parameter, shaped like `like`; vocabulary padding zero."""
    shape, dim = like.shape, entry.dim
    start = tp_rank * shape[dim] if entry.split else 0
    pieces = [
        assemble(sources[run.source], shards, like.dtype).narrow(dim, run.start, run.length)
        for run in entry.cut(start, shape[dim])
    ]
    missing = shape[dim] - sum(piece.shape[dim] for piece in pieces)
    if missing:
        pieces.append(torch.zeros(*shape[:dim], missing, *shape[dim + 1 :], dtype=like.dtype))
    return torch.cat(pieces, dim)


def _table(config: Config, vocab_size: int) -> dict[str, Entry]:
    try:
        return hf_table(config, vocab_size)
    except ConfigError:
        ranks = config.parallel.tensor_parallel
        raise ConfigError(
            f"parallel.tensor_parallel: a checkpoint of attention.variant {config.attention.variant} is read at the "
            f"size that wrote it only; set it to that (one of the two is {ranks})."
        ) from None


def _entry(name: str, tensor: Tensor, ranks: int) -> Entry:
    """Of a parameter as this model has it; its sources in a Hugging Face directory do not matter here."""
    split = bool(getattr(tensor, "tensor_model_parallel", False))
    dim = int(getattr(tensor, "partition_dim", 0)) if split else 0
    shape = list(tensor.shape)
    shape[dim] *= ranks if split else 1
    return Entry(name, tuple(shape), (), dim, split)
