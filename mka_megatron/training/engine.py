"""One optimizer step at a time on DeepSpeed: loss scaling, the learning rate, and the non-finite guard."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError
from torch import Tensor, nn

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.hierarchy import Session
from mka_megatron.parallel.cpu_host import patch_deepspeed
from mka_megatron.parallel.groups import MegatronMPU, Topology
from mka_megatron.training import deepspeed_config, ops
from mka_megatron.training.optimizer import build_optimizer
from mka_megatron.training.schedule import learning_rate
from mka_megatron.training.segments import Segments, segments_per_step

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on every rank."""

    loss: float
    """Mean nats per label over the global batch; NaN or infinite where the step was bad."""
    grad_norm: float
    """L2 norm of the whole model's gradient before clipping; infinite where the step was skipped."""
    tokens: int
    """Labels in the global batch."""
    skipped: bool
    """The parameters were left alone: non-finite loss or gradient, or fp16 overflow."""
    learning_rate: float
    """Learning rate of the step."""
    loss_scale: float
    """fp16: scale of the next step; else 1."""

    @property
    def bad(self) -> bool:
        """Skipped for a non-finite loss or gradient; an fp16 overflow under a finite loss is the scale finding its level."""
        return self.skipped and not (math.isfinite(self.loss) and self.loss_scale > 1.0)


class NonFiniteError(RuntimeError):
    """`training.max_bad_steps` consecutive steps had a non-finite loss or gradient; `result` is the last one's."""

    def __init__(self, message: str, result: StepResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class EvalResult:
    """Held-out loss; equal on every rank."""

    loss: float
    """Mean nats per label."""
    tokens: int
    """Labels it is the mean over."""


def construction_context(config: Config, topology: Topology) -> AbstractContextManager | None:
    """The context to build the model in: ZeRO-3 partitions each module as it appears; None otherwise."""
    if config.engine.zero_stage != 3:
        return None
    if topology.device.type == "cpu":
        patch_deepspeed()
    # zero.Init reads the world from DeepSpeed's own handle on torch.distributed
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    return deepspeed.zero.Init(
        config_dict_or_path=deepspeed_config.build(config, topology.dp_size, topology.device.type == "cuda"),
        data_parallel_group=MegatronMPU(topology).get_sequence_data_parallel_group(),
        mpu=MegatronMPU(topology),
    )


class Engine:
    """A model under DeepSpeed. `step` counts the optimizer steps taken, skipped ones included.

    Args:
        config: a validated configuration.
        model: `model(tokens, documents, labels) -> nll [B,S]`, built inside `construction_context`.
        topology: process groups and device.
        note: told what the engine is doing, before each pass over a micro-batch.

    Raises:
        ConfigError: the DeepSpeed JSON or the precision cannot be used on this host.
    """

    def __init__(
        self, config: Config, model: nn.Module, topology: Topology, note: Callable[[str], None] = lambda doing: None
    ) -> None:
        self.config, self.topology, self.model, self.note = config, topology, model, note
        self.step = 0
        self.bad_steps = 0
        self.accumulation = deepspeed_config.accumulation_steps(config, topology.dp_size)
        self.segments = None if config.training.segment_length is None else Segments(config, topology)
        self.passes = self.accumulation * segments_per_step(config)
        _check_host(config, topology)
        if config.training.deterministic:
            _make_deterministic()
        deepspeed_logger.setLevel(logging.WARNING)
        optimizer = build_optimizer(config, model, topology.device)
        self.optimizer_name = type(optimizer).__name__
        self.cuts = deepspeed_config.cuts(config)
        self.deepspeed = _initialize(config, model, optimizer, topology)
        self.averaged_over = topology.dp_size
        if config.engine.zero_stage == 3 and self.deepspeed.zero_reduce_scatter():
            self.averaged_over *= topology.cp_size  # the other reductions of DeepSpeed 0.19 leave these ranks out
        if isinstance(scaler := getattr(self.deepspeed.optimizer, "loss_scaler", None), DynamicLossScaler):
            scaler.raise_error_at_min_scale = False  # the guard below stops the run, with a reason

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this replica's `accumulation` micro-batches of the global batch.

        Context-parallel ranks bring the same rows; each computes its shard of them. With training.segment_length it
        goes over the segments from `segments.next` on; bring the same micro-batches until that is 0 again.

        Raises:
            ValueError: another number of micro-batches, or rows that the context-parallel ranks cannot share.
            NonFiniteError: this was the `training.max_bad_steps`-th bad step in a row.
            TierError: a tier of the long-term memory is full, or has lost a page.
        """
        if len(micro_batches) != self.accumulation:
            raise ValueError(f"train_step takes {self.accumulation} micro-batches, got {len(micro_batches)}.")
        rate = learning_rate(self.step, self.config.training)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        shards = [self._shard(batch).to(self.topology.device) for batch in micro_batches]
        labels = self._count_labels(shards if self.segments is None else self.segments.parts(shards))
        # DeepSpeed averages over replicas and passes; the loss is a mean over labels.
        scale = self.averaged_over * self.passes / max(labels, 1)
        total = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for index, (batch, session) in enumerate(self._parts(shards)):
            self.note(f"step {self.step + 1}, pass {index + 1} of {self.passes}")
            nll = self._forward(batch, session).sum()
            total += nll.detach()
            factor = torch.tensor(scale, dtype=torch.float32, device=nll.device)
            if index + 1 == self.passes:
                dist.all_reduce(total, group=self.topology.dp_cp_group)
                # A non-finite loss on any rank makes every rank's gradient NaN, so all skip alike.
                factor = torch.where(torch.isfinite(total), factor, torch.nan)
            self._backward(nll * factor)
            if session is not None:
                session.commit()
            if index + 1 < self.passes:
                self.deepspeed.step()
        if self.segments is not None:
            self.segments.advance()
        result = self._update(float(total) / max(labels, 1), labels, rate)
        self.step += 1
        self._guard(result)
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> EvalResult:
        """Mean loss over `batches` of every replica; each replica must bring as many (ZeRO-3 gathers)."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        for batch in batches:
            rows = self._shard(batch).to(self.topology.device)
            for part, session in [(rows, None)] if self.segments is None else self.segments.whole(rows):
                sums[0] += self._forward(part, session).sum()
                if session is not None:
                    session.commit()
            sums[1] += (rows.labels != IGNORE).sum()
        dist.all_reduce(sums, group=self.topology.dp_cp_group)
        total, labels = sums.tolist()
        return EvalResult(loss=total / max(labels, 1), tokens=int(labels))

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers and the memory's tiers; call it before the process groups are destroyed."""
        if self.segments is not None:
            self.segments.close()
        self.deepspeed.destroy()
        deepspeed.utils.groups.mpu = None  # it would keep every process group alive until the interpreter ends

    def _parts(self, shards: Sequence[Batch]) -> Iterator[tuple[Batch, Session | None]]:
        """What a step's passes go over: the shards, or their segments with the memory of those before."""
        if self.segments is not None:
            return self.segments.step(shards)
        return ((shard, None) for shard in shards)

    def _forward(self, batch: Batch, session: Session | None) -> Tensor:
        history = () if session is None else (session,)
        return self.deepspeed(batch.tokens, batch.documents, batch.labels, *history)

    def _shard(self, batch: Batch) -> Batch:
        """This rank's slots of the rows."""
        ranks, slots = self.topology.cp_size, batch.tokens.shape[1]
        if ranks == 1:
            return batch
        if slots % ranks:
            raise ValueError(f"rows of {slots} slots cannot be shared by {ranks} context-parallel ranks.")
        begin = self.topology.cp_rank * (slots // ranks)
        return batch.part(begin, begin + slots // ranks)

    def _count_labels(self, micro_batches: Sequence[Batch]) -> int:
        count = torch.stack([(batch.labels != IGNORE).sum() for batch in micro_batches]).sum()
        count = count.to(self.topology.device)
        dist.all_reduce(count, group=self.topology.dp_cp_group)
        return int(count)

    def _backward(self, loss: Tensor) -> None:
        if isinstance(self.deepspeed.optimizer, FP16_UnfusedOptimizer):
            loss = loss * self.loss_scale  # DeepSpeed scales the loss for its ZeRO optimizers only
        self.deepspeed.backward(loss)

    def _update(self, loss: float, labels: int, rate: float) -> StepResult:
        """Clip, check and apply the accumulated gradient."""
        if deepspeed_config.clips_itself(self.config):
            norm = _clip(self.model, self.config.training.clip_grad, self.topology)
            skipped = not math.isfinite(norm)
            if skipped:
                self.deepspeed.zero_grad()  # AdamW passes over parameters without a gradient
            self.deepspeed.step()
        else:
            scale = self.loss_scale if isinstance(self.deepspeed.optimizer, FP16_UnfusedOptimizer) else 1.0
            self.deepspeed.step()
            skipped = bool(self.deepspeed.optimizer.overflow)
            norm = math.inf if skipped else float(self.deepspeed.get_global_grad_norm()) / scale
        return StepResult(
            loss=loss,
            grad_norm=norm if math.isfinite(norm) else math.inf,
            tokens=labels,
            skipped=skipped,
            learning_rate=rate,
            loss_scale=self.loss_scale,
        )

    @property
    def loss_scale(self) -> float:
        """Factor on the next loss; 1 except in fp16."""
        return float(getattr(self.deepspeed.optimizer, "loss_scale", 1.0))

    def _guard(self, result: StepResult) -> None:
        """Count bad steps."""
        self.bad_steps = self.bad_steps + result.bad if result.skipped else 0
        limit = self.config.training.max_bad_steps
        if self.bad_steps >= limit:
            raise NonFiniteError(
                f"the loss or its gradient was not finite in {limit} consecutive steps (steps {self.step - limit + 1} to "
                f"{self.step}, last loss {result.loss})",
                result,
            )


def _initialize(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology) -> Any:
    if topology.device.type == "cpu":
        patch_deepspeed()
    dictionary = deepspeed_config.build(config, topology.dp_size, topology.device.type == "cuda")
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter):
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=dictionary, mpu=MegatronMPU(topology), dist_init_required=False
            )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"engine.deepspeed_config: DeepSpeed refuses {where}: {first['msg']}.") from None
    log.debug("%s", chatter.getvalue())
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        optimizer.state.clear()  # its constructor takes a step on zero gradients: moments 0, but step count 1
    return engine


def _check_host(config: Config, topology: Topology) -> None:
    accelerator = get_accelerator()
    if accelerator.device_name() != topology.device.type:
        raise ConfigError(
            f"DeepSpeed chose the accelerator {accelerator.device_name()!r}, but the run is on "
            f"{topology.device.type!r}; set the environment variable DS_ACCELERATOR={topology.device.type}."
        )
    if config.training.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError("training.precision is fp16: this device does not support it, use bf16 or fp32.")
    if config.training.precision == "bf16" and not accelerator.is_bf16_supported():
        raise ConfigError("training.precision is bf16: this device does not support it, use fp16 or fp32.")
    ops.check(config.engine, topology.device.type == "cuda", config.memory_hierarchy.l3.placement == "ssd")


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@torch.no_grad()
def _clip(model: nn.Module, limit: float, topology: Topology) -> float:
    """Scale the gradients to an L2 norm of at most `limit` (0: off); returns the norm before.

    Tensor-parallel shards count on every rank, replicated parameters on the first only.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counted = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None
        and (topology.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
    ]
    # PyTorch's CPU norm sums in order: in fp32 it is off by 1e-4 for half a million elements.
    dtype = torch.float64 if topology.device.type == "cpu" else torch.float32
    square = torch.zeros((), dtype=dtype, device=topology.device)
    if counted:
        square += torch.stack(torch._foreach_norm(counted, 2, dtype)).square().sum()
    dist.all_reduce(square, group=topology.tp_group)
    norm = float(square.sqrt())
    if limit > 0 and norm > limit:
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
    return norm
