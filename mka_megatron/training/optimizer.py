"""AdamW for the parameters of a model: groups, and which implementation, decided once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mka_megatron.config.schema import Config, TrainingConfig

log = logging.getLogger(__name__)

_UNDECAYED_NAMES = ("bias", "decay", "beta")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices with `weight_decay`; norms, biases, decays and blends without.

    Undecayed is what has fewer than two dimensions, or whose own name starts with bias, decay or beta
    (a gate per KV head has two-dimensional biases, a decay per channel is [G,d]).
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_name = name.rpartition(".")[2]
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: partitioned by ZeRO-3
            matrix = dimensions >= 2 and not own_name.startswith(_UNDECAYED_NAMES)
            (decayed if matrix else undecayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, by the fastest implementation that this host has.

    CUDA: apex's fused Adam, else DeepSpeed's, else PyTorch's fused one. PyTorch's on CPU hosts, for
    offloaded states, and for ZeRO 0 in half precision. (DeepSpeed's CPU Adam is no faster than PyTorch's,
    and a resumed run is not bitwise the uninterrupted one: it keeps beta^t as a running product and
    restarts it from pow.)
    """
    groups = parameter_groups(model, config.training.weight_decay)
    candidates = _candidates(config, device)
    for name, factory in candidates:
        try:
            optimizer = factory([dict(group) for group in groups], **_arguments(config.training))
        except Exception as error:
            if name == candidates[-1][0]:
                raise
            log.info("optimizer: %s is not available (%s)", name, str(error).splitlines()[0])
            continue
        log.info("optimizer: %s", name)
        return optimizer
    raise AssertionError("unreachable: the last candidate is returned or raises")


def _arguments(training: TrainingConfig) -> dict[str, Any]:
    return {
        "lr": 0.0,  # the engine sets it before every step
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
    }


def _candidates(config: Config, device: torch.device) -> list[tuple[str, Callable[..., torch.optim.Optimizer]]]:
    torch_fused = ("PyTorch fused AdamW", _torch_fused)
    offloaded = config.engine.offload_optimizer != "none"
    unsharded_half = config.engine.zero_stage == 0 and config.training.precision != "fp32"
    if device.type == "cuda" and not offloaded and not unsharded_half:
        return [("apex fused Adam", _apex), ("DeepSpeed fused Adam", _deepspeed_fused), torch_fused]
    return [torch_fused]


def _torch_fused(groups: Iterable[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **arguments)


def _apex(groups: Iterable[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **arguments)


def _deepspeed_fused(groups: Iterable[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **arguments)
