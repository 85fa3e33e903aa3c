"""Which parameters decay, and that an implementation which is missing does not stop the run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mka_megatron.config.schema import Config, EngineConfig, TrainingConfig
from mka_megatron.training import optimizer as module
from mka_megatron.training.optimizer import build_optimizer, parameter_groups


class Model(nn.Module):
    """One parameter of each kind that the real model has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.decay_k = nn.Parameter(torch.zeros(2, 4))
        self.beta = nn.Parameter(torch.zeros(1))
        self.bias1 = nn.Parameter(torch.zeros(2, 5))
        self.fc1 = nn.Parameter(torch.zeros(2, 5, 4))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.debiased_head = nn.Parameter(torch.zeros(4, 4))


def names(model: nn.Module, group: dict) -> set[str]:
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {of[id(parameter)] for parameter in group["params"]}


def test_matrices_decay_and_nothing_else() -> None:
    model = Model()
    decayed, undecayed = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed) == {"linear.weight", "fc1", "debiased_head"}
    assert names(model, undecayed) == {"linear.bias", "norm.weight", "norm.bias", "decay_k", "beta", "bias1"}


def test_partitioned_parameters_are_judged_by_their_whole_shape() -> None:
    """ZeRO-3 leaves an empty vector in a parameter's place and the shape in ds_shape."""
    model = Model()
    model.linear.weight.ds_shape = model.linear.weight.shape
    model.linear.weight.data = torch.empty(0)
    assert "linear.weight" in names(model, parameter_groups(model, 0.1)[0])


@pytest.mark.parametrize(
    "engine",
    [EngineConfig(zero_stage=1), EngineConfig(zero_stage=1, offload_optimizer="cpu"), EngineConfig(zero_stage=0)],
)
def test_hyperparameters_reach_the_optimizer(engine: EngineConfig) -> None:
    training = TrainingConfig(adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-7, weight_decay=0.3)
    built = build_optimizer(Config(training=training, engine=engine), Model(), torch.device("cpu"))
    assert isinstance(built, torch.optim.AdamW)
    for group, decay in zip(built.param_groups, (0.3, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-7, decay)


def test_on_a_gpu_the_next_implementation_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without apex and without a compiler for DeepSpeed's op."""

    def unavailable(*groups: object, **arguments: object) -> None:
        raise RuntimeError("no nvcc\nand a long build log")

    monkeypatch.setattr(module, "_deepspeed_fused", unavailable)
    assert isinstance(build_optimizer(Config(), Model(), torch.device("cuda")), torch.optim.AdamW)


def test_the_last_implementation_may_not_fail_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*groups: object, **arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "_torch_fused", broken)
    with pytest.raises(RuntimeError, match="broken"):
        build_optimizer(Config(), Model(), torch.device("cpu"))
