"""The states of a training checkpoint, cut for another tensor-parallel size: any interval of any shard, in bounded memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.model.hf_table import Entry, hf_table
from mka_megatron.model.resharding import regions
from mka_megatron.training.manifest import Checkpoint
from mka_megatron.training.shards import Shards, Value

_BLOCK = 16 << 20  # bytes of columns put together at a time
_EMBEDDING = "embedding.word_embeddings.weight"


class Resharded:
    """A checkpoint's parameters and moments as a tensor-parallel rank's shards.

    Args:
        model: this rank's, of which names and shapes are taken.
        config: the checkpoint's model under this run's tensor-parallel size, which may be another.
        checkpoint: verified.
        rank: of this process among the tensor-parallel ones.

    Raises:
        ConfigError: the variant's parameters cannot be cut anew for another size; methods raise it where the files are not
            those of this model.
    """

    def __init__(self, model: nn.Module, config: Config, checkpoint: Checkpoint, rank: int) -> None:
        self._rank, self._ranks = rank, config.parallel.tensor_parallel
        written = int(checkpoint.body["layout"]["parallel.tensor_parallel"])
        if written == self._ranks:
            self._new = self._old = _own_table(model)
        else:
            self._new, self._old = (_table(model, config, ranks, checkpoint) for ranks in (self._ranks, written))
        self.shards = Shards(checkpoint, self._old)

    def read(self, value: Value, name: str, start: int, out: Tensor) -> None:
        """Fill `out` [n] with [start, start + n) of the flattened shard; it stays as it is where there is no such moment."""
        position = 0
        for piece in self._pieces(value, name, start, out.numel()):
            out[position : position + len(piece)].copy_(piece)
            position += len(piece)

    def read_planes(self, model: nn.Module) -> None:
        """Fill the hash planes, which all ranks share, where the checkpoint has them."""
        for name, buffer in model.named_buffers():
            if name.endswith(".planes") and name in self._old and name in self.shards:
                for piece in self.shards.fragments("weights", name, 0, 0, buffer.numel()):
                    buffer.view(-1).copy_(piece)

    def _pieces(self, value: Value, name: str, start: int, length: int) -> Iterator[Tensor]:
        new, old = self._new[name], self._old[name]
        if new is old or not new.split:
            yield from self.shards.fragments(value, name, self._rank if new is old else 0, start, length)
            return
        parts = list(regions(new, self._ranks, self._rank, old, self.shards.ranks))
        if new.dim == 1:
            yield from self._columns(value, name, parts, start, length)
            return
        row, position = math.prod(new.shape[1:]), 0  # elements
        for rank, first, count in parts:
            low, high = max(start, position), min(start + length, position + count * row)
            if low < high:
                yield from self.shards.fragments(value, name, rank, first * row + low - position, high - low)
            position += count * row

    def _columns(self, value: Value, name: str, parts: list[tuple[int, int, int]], start: int, length: int) -> Iterator[Tensor]:
        """The same of a matrix whose columns are shared out, some rows at a time."""
        width, theirs = self._new[name].shard(self._ranks)[1], self._old[name].shard(self.shards.ranks)[1]
        step = max(1, _BLOCK // (4 * max(width, theirs)))
        end = start + length
        for first in range(start // width, -(-end // width), step):
            rows = min(step, -(-end // width) - first)
            block, column = torch.zeros(rows, width), 0
            for rank, begin, count in parts:
                wide, position = torch.zeros(rows * theirs), 0
                for piece in self.shards.fragments(value, name, rank, first * theirs, rows * theirs):
                    wide[position : position + len(piece)].copy_(piece)
                    position += len(piece)
                block[:, column : column + count] = wide.view(rows, theirs)[:, begin : begin + count]
                column += count
            yield block.view(-1)[max(0, start - first * width) : end - first * width]


def _own_table(model: nn.Module) -> dict[str, Entry]:
    """This rank's shards as they are: enough where the ranks that share each layer stay the same."""
    planes = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".planes")}
    held = {**dict(model.named_parameters()), **planes}
    return {name: Entry(name, _shape(tensor), (), split=False) for name, tensor in held.items()}


def _table(model: nn.Module, config: Config, ranks: int, checkpoint: Checkpoint) -> dict[str, Entry]:
    """Of this model at `ranks` tensor-parallel ranks, the padding of its vocabulary taken as words."""
    here = config.parallel.tensor_parallel
    rows = _shape(dict(model.named_parameters())[_EMBEDDING])[0] * here
    parallel = dataclasses.replace(config.parallel, tensor_parallel=ranks)
    try:
        return hf_table(dataclasses.replace(config, parallel=parallel), rows)
    except ConfigError:
        written = checkpoint.body["layout"]["parallel.tensor_parallel"]
        raise ConfigError(
            f"checkpoint {checkpoint.path} was written with parallel.tensor_parallel {written}, but this run has {here}: the "
            f"parameters of attention.variant {config.attention.variant} are not cut anew; set it back."
        ) from None


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ds_shape: partitioned by ZeRO-3
