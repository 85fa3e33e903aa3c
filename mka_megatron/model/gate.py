"""The gate's parameters on Megatron: tensor-parallel aware, initialised alike at every size."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from mka_megatron.attention.gate import group_logits, input_logits, token_logits
from mka_megatron.config.schema import RoutingConfig
from mka_megatron.parallel.regions import copy_to_region, reduce_from_region
from mka_megatron.parallel.replicated import mark_partial

# Suffixes: S sequence, B batch, G local KV heads, H local query heads, d head dim, r gate width, L levels.


def sharded_parameter(full: Tensor, dim: int, tp_group: dist.ProcessGroup, dtype: torch.dtype) -> nn.Parameter:
    """This rank's slice of `full` along `dim`, marked the way Megatron and DeepSpeed expect."""
    shard = full.chunk(tp_group.size(), dim)[tp_group.rank()].to(dtype).contiguous()
    parameter = nn.Parameter(shard)
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
    return parameter


def _normal(*shape: int, std: float) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32).normal_(0.0, std)


class TokenGate(nn.Module):
    """One route per token from all query heads: row-parallel fc1, all-reduce, bias, SiLU, fc2 (fp32)."""

    def __init__(self, channels: int, levels: int, width: int, std: float, last_std: float,
                 tp_group: dist.ProcessGroup, dtype: torch.dtype):
        super().__init__()
        self.tp_group = tp_group
        self.fc1 = sharded_parameter(_normal(width, channels, std=std), 1, tp_group, dtype)
        self.bias1 = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.fc2 = nn.Parameter(_normal(levels, width, std=last_std).to(dtype))
        self.bias2 = nn.Parameter(torch.zeros(levels, dtype=dtype))

    def forward(self, q_SBHd: Tensor, x_SBh: Tensor) -> Tensor:
        """Raw local queries [S,B,H,d] -> logits [S,B,L] fp32, equal on every rank. `x_SBh` is not read."""
        logits = token_logits(q_SBHd, self.fc1, self.bias1, self.fc2, self.bias2,
                              lambda partial: reduce_from_region(partial, self.tp_group))
        return copy_to_region(logits, self.tp_group)


class InputGate(nn.Module):
    """Routes read from the layer input: each rank gates the tokens it holds, and the logits are gathered.

    `groups` is 1 for one route per token, or the model's KV heads for one per head (this rank's are returned).
    """

    def __init__(self, channels: int, levels: int, groups: int, width: int, std: float, last_std: float,
                 tp_group: dist.ProcessGroup, dtype: torch.dtype, sequence_parallel: bool):
        super().__init__()
        self.levels, self.groups = levels, groups
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel
        self.fc1 = nn.Parameter(_normal(width, channels, std=std).to(dtype))
        self.bias1 = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.fc2 = nn.Parameter(_normal(groups * levels, width, std=last_std).to(dtype))
        self.bias2 = nn.Parameter(torch.zeros(groups * levels, dtype=dtype))
        if sequence_parallel:
            for parameter in self.parameters():
                mark_partial(parameter)

    def forward(self, q_SBHd: Tensor, x_SBh: Tensor) -> Tensor:
        """Layer input [S or S/tp, B, hidden] -> logits [S,B,L] or [S,B,G,L] fp32. `q_SBHd` is not read."""
        logits = input_logits(x_SBh, self.fc1, self.bias1, self.fc2, self.bias2)
        if self.sequence_parallel:
            logits = gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            logits = copy_to_region(logits, self.tp_group)
        if self.groups == 1:
            return logits
        # [S,B,groups*L] -> [S,B,groups,L] -> this rank's groups
        return logits.unflatten(-1, (self.groups, self.levels)).chunk(self.tp_group.size(), 2)[self.tp_group.rank()]


class GroupGate(nn.Module):
    """One route per token and KV head, from that head's own queries: no communication."""

    def __init__(self, groups: int, channels: int, levels: int, width: int, std: float, last_std: float,
                 tp_group: dist.ProcessGroup, dtype: torch.dtype):
        super().__init__()
        self.fc1 = sharded_parameter(_normal(groups, width, channels, std=std), 0, tp_group, dtype)
        self.bias1 = sharded_parameter(torch.zeros(groups, width), 0, tp_group, dtype)
        self.fc2 = sharded_parameter(_normal(groups, levels, width, std=last_std), 0, tp_group, dtype)
        self.bias2 = sharded_parameter(torch.zeros(groups, levels), 0, tp_group, dtype)

    def forward(self, q_SBHd: Tensor, x_SBh: Tensor) -> Tensor:
        """Raw local queries [S,B,H,d] -> logits [S,B,G,L] fp32. `x_SBh` is not read."""
        return group_logits(q_SBHd, self.fc1, self.bias1, self.fc2, self.bias2)


def build_gate(routing: RoutingConfig, *, hidden_size: int, heads: int, groups: int, head_dim: int, levels: int,
               std: float, last_std: float, tp_group: dist.ProcessGroup, dtype: torch.dtype,
               sequence_parallel: bool) -> nn.Module:
    """The gate that `routing` describes; `heads` and `groups` are the whole model's, not this rank's.

    `std` and `last_std` are the standard deviations of its first and second layer; 0 for the second makes all
    levels equal at the start.
    """
    width = routing.gate_hidden_size
    if routing.gate_input == "x":
        routes = groups if routing.scope == "group" else 1
        return InputGate(hidden_size, levels, routes, width, std, last_std, tp_group, dtype, sequence_parallel)
    if routing.scope == "group":
        return GroupGate(groups, heads // groups * head_dim, levels, width, std, last_std, tp_group, dtype)
    return TokenGate(heads * head_dim, levels, width, std, last_std, tp_group, dtype)
