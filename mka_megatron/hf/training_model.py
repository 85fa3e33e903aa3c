"""The model of a fine-tuning run: loaded, given our attention, spread over ranks, with the loss on top.

Shapes: B batch, S sequence, h hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from mka_megatron.config.errors import ConfigError, refuse, show
from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.config.variants import gated
from mka_megatron.data.batch import IGNORE
from mka_megatron.hf.patch import patch_model
from mka_megatron.hf.ranks import Ranks

_LOGITS = 1 << 28
"""Logits that are there at a time: with more, the loss goes over the tokens in pieces."""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_UNDECAYED = ("bias", "decay", "beta")


def locate(name: str) -> str:
    """The directory that a model is in: itself, or the hub's, downloaded where it is not there. Raises ConfigError."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as error:  # the hub's client raises errors of many kinds here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.init_from is {show(name)}: it is no directory, and no model of that name can be had from "
                          f"the hub ({reason}); correct it.") from None


def load(config: FineTuneConfig, ranks: Ranks, directory: str) -> PreTrainedModel:
    """The causal language model in `directory` with the configured attention, weights in fp32, on this rank's device.

    Raises:
        ConfigError: files that cannot be loaded.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise refuse("model.init_from", directory, f"transformers cannot load it ({reason}); copy the model again") from None
    model, report = loaded
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        raise refuse("model.init_from", directory, f"its files have no usable tensor {lacking[0]}; copy the model again")
    if gated(config.architecture) and not hasattr(model.config, "mka"):
        patch_model(model, config.architecture, config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if ranks.tp_size > 1:
        _share_layers(model, ranks, gated(config.architecture))
    return model.to(ranks.device)


def _share_layers(model: PreTrainedModel, ranks: Ranks, whole_attention: bool) -> None:
    """Shard `model` over the ranks of its replica by transformers' own plan.

    A gate reads all heads, so that with one every rank keeps the whole attention. (from_pretrained shards while it
    loads, but then a replica must be all ranks or FSDP's, and accelerate is needed.)
    """
    plan = {f"model.layers.*.self_attn.{name}": "replicate" for name in _PROJECTIONS} if whole_attention else None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:  # a plan names both
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.maybe_distribute_model(
        model, DistributedConfig(tp_size=ranks.tp_size, tp_plan=plan), TransformersDeviceMesh(ranks.mesh, ranks.mesh)
    )
    if tied:
        head.weight = embedding.weight


@torch.no_grad()
def average_gradients(model: nn.Module, ranks: Ranks) -> None:
    """What DDP does, where it cannot take sharded weights. Collective."""
    group = ranks.mesh.get_group("dp_replicate")
    for parameter in model.parameters():
        if parameter.grad is not None:
            own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            dist.all_reduce(own, group=group)
            own /= ranks.dp_size


class Loss(nn.Module):
    """The model and its loss, the unit that replicas are synchronised by."""

    def __init__(self, model: PreTrainedModel, precision: str) -> None:
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """Sum of the nats over the labels of a batch, fp32.

        Args:
            tokens, positions: [B, S]; a position that does not follow the one before starts another document.
            labels: [B, S], the next token, IGNORE where there is none.
        """
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
            # [B, S, h] -> [B*S, h]
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            rows = max(1, _LOGITS // self.model.config.vocab_size)
            pieces = list(zip(hidden.split(rows), labels.split(rows), strict=True))
            if len(pieces) == 1:
                return self._nats(hidden, labels)
            parts = [checkpoint(self._nats, *piece, use_reentrant=False) for piece in pieces]
            return torch.stack(parts).sum()

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with `weight_decay`; norms, biases, decays and blends without.

    Parameters that are spread differently are in groups of their own, since a fused step takes one kind.
    """
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decayed = parameter.dim() >= 2 and not name.rpartition(".")[2].startswith(_UNDECAYED)
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((decayed, mesh), []).append(parameter)
    return [{"params": found, "weight_decay": weight_decay * decayed} for (decayed, _), found in groups.items()]


@torch.no_grad()
def clip(model: nn.Module, limit: float) -> float:
    """Scale the gradients to an L2 norm of at most `limit` (0: off); returns the norm before. Collective."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    squares = []
    for gradient in gradients:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2)
    norm = float(torch.stack(squares).sum().sqrt())
    if limit and norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm
