"""Some tokens at a time: the MLP's activations and the logits of a whole sequence never exist together.

A tile is a share of the slots that each rank holds. Under sequence parallelism the layers gather it over the
tensor-parallel ranks as they would gather all of it: a tile then has slots of every rank's shard, and what a rank holds
stays as it is. In training a tile is computed again in the backward pass, which is one graph: autograd sums a weight's
gradient over the tiles before any hook sees it.

Shapes: S slots of the sequence, B batch, h hidden, V vocabulary, P ranks that the sequence is sharded over (1 without
sequence parallelism), t slots of a tile on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TiledMLP(MLP):
    """Megatron's MLP, `tile` tokens at a time."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, tp_group: dist.ProcessGroup, tile: int) -> None:
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.tile = tile

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **unused: object) -> tuple[Tensor, None]:
        """hidden_states [S/P,B,h] -> (output of this shape, None: there is no bias)."""
        slots = tile_slots(self.tile, hidden_states, _shares(self.config, self.tp_group))
        return torch.cat(tiled(self._tile, [(part,) for part in hidden_states.split(slots)])), None

    def _tile(self, hidden: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden)[0]
        return output


class TiledLayer(TransformerLayer):
    """Megatron's layer with a :class:`TiledMLP` of the same parameters; `submodules` are those without the MLP."""

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *args: Any, mlp: MLPSubmodules,
                 tile: int, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.mlp = TiledMLP(config, mlp, self.pg_collection.tp, tile)


class TokenLosses(nn.Module):
    """Hidden states -> loss of every token.

    Has no parameters: it reads the weight in its own forward pass, where ZeRO-3 sees that it is needed there, and
    gathers it once for all tiles.

    Args:
        output_layer: projects to this rank's share of the vocabulary.
        holder: the module whose `weight` the projection takes: output_layer, or with tied embeddings the embedding.
        vocab_size: entries without padding.
        tile: tokens whose logits are there at a time; None: all.
    """

    def __init__(self, output_layer: ColumnParallelLinear, holder: nn.Module, vocab_size: int, tile: int | None) -> None:
        super().__init__()
        self._theirs = (output_layer, holder)  # the model's: in a tuple they are not this module's children
        self.vocab_size = vocab_size
        self.tile = tile
        self.tp_group: dist.ProcessGroup = output_layer.tp_group
        self.shares = _shares(output_layer.config, self.tp_group)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [S/P,B,h], labels [B,S], each an entry of the vocabulary -> nll [B,S] fp32, in nats."""
        # a tile's logits come as [P,t] slots: [B,S] -> [B,P,S/P]
        by_shard = labels.unflatten(1, (self.shares, -1))
        slots = tile_slots(self.tile, hidden, self.shares)
        tiles = list(zip(hidden.split(slots), by_shard.split(slots, dim=2), strict=True))
        _, holder = self._theirs
        # [B,P,t] each -> [B,S]
        return torch.cat(tiled(self._tile, tiles, holder.get_parameter("weight")), dim=2).flatten(1)

    def _tile(self, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        output_layer, _ = self._theirs
        # [t,B,h] -> [P*t,B,V/tp]
        logits, _ = output_layer(hidden, weight=weight, runtime_gather_output=False)
        return token_losses(logits, labels.flatten(1), self.vocab_size, self.tp_group).unflatten(1, (self.shares, -1))


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int, tp_group: dist.ProcessGroup) -> Tensor:
    """logits [S,B,V/tp], labels [B,S] -> nll [B,S] fp32; entries from vocab_size on take no probability."""
    local = logits.shape[-1]
    real = min(local, max(0, vocab_size - tp_group.rank() * local))
    if real < local:
        padding = torch.arange(local, device=logits.device) >= real
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    labels = labels.transpose(0, 1).contiguous()
    if tp_group.size() == 1:
        # [S,B,V] -> [S*B,V]: one fused op instead of the vocabulary-parallel sequence
        nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    else:
        nll = vocab_parallel_cross_entropy(logits, labels)
    return nll.transpose(0, 1)


def tiled(function: Callable[..., Tensor], tiles: Sequence[tuple[Tensor, ...]], *shared: Tensor) -> list[Tensor]:
    """`function(*tile, *shared)` of every tile; where there are several, nothing of a tile is kept for its backward."""
    if len(tiles) == 1:
        return [function(*tiles[0], *shared)]
    return [checkpoint(function, *tile, *shared, use_reentrant=False, preserve_rng_state=False) for tile in tiles]


def tile_slots(tile: int | None, hidden: Tensor, shares: int) -> int:
    """How many slots of a rank's `hidden` [S/P,B,h] make a tile of at most `tile` tokens on all P=`shares` ranks."""
    slots, rows, _ = hidden.shape
    return slots if tile is None else max(1, tile // (rows * shares))


def _shares(config: TransformerConfig, tp_group: dist.ProcessGroup) -> int:
    return tp_group.size() if config.sequence_parallel else 1
