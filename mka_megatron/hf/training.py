"""Fine-tuning of a transformers model with our attention: data, model, resume, steps, evaluations, checkpoints, report.

Every rank runs the same code. One process trains alone; under torchrun (or accelerate launch, which sets the same
environment) replicas share every step's samples (DDP), and with tp_size the ranks of a replica share its layers.
Accelerate as a library is not used: DDP and transformers' own plans do all of it.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from mka_megatron.config.errors import refuse
from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.data.batch import Batch
from mka_megatron.data.prepare import prepare
from mka_megatron.hf import training_data, training_model, training_state
from mka_megatron.hf.ranks import Ranks, joined
from mka_megatron.hf.training_data import Inputs
from mka_megatron.hf.training_report import Report, perplexity


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the message says where and what to try."""


@dataclass
class Progress:
    """The run so far, kept in its checkpoints."""

    step: int = 0
    loss_sum: float = 0.0
    """Of the steps' losses."""
    seconds: float = 0.0
    """In training steps, waiting for data included."""
    warm_seconds: float = 0.0
    """Of these, after the warm-up steps."""
    warm_tokens: int = 0
    """Trained on in that time, over all replicas."""
    start_perplexity: float | None = None
    """Held out, before the first step."""


def fine_tune(config: FineTuneConfig) -> dict[str, Any]:
    """Run `config` to its end, or to the step after a signal.

    Args:
        config: of `load_fine_tune`, model.init_from being a directory.

    Returns:
        What metrics.json holds.

    Raises:
        ConfigError, DataError: the run cannot start; one sentence says what to change.
        NonFiniteError: a loss or gradient is not finite.
    """
    _check_output(config)
    transformers_logging.disable_progress_bar()
    with joined(config.tp_size, config.timeout_seconds) as ranks:
        return Run(config, ranks).run()


def learning_rate(step: int, steps: int, config: FineTuneConfig) -> float:
    """Of the step with index `step` (0 is the first): linear warm-up to the peak, then a cosine to the last step."""
    peak, floor, done = config.learning_rate, config.min_learning_rate, step + 1
    if done <= config.warmup_steps:
        return peak * (done / config.warmup_steps)
    progress = min(1.0, (done - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Run:
    """The parts of a run, built in order by the constructor, and the loop over them."""

    def __init__(self, config: FineTuneConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.output_dir = Path(config.output_dir)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
        torch.use_deterministic_algorithms(config.deterministic)
        torch.manual_seed(config.seed)
        assert config.model.init_from is not None
        self.tokenizer = config.data.tokenizer or config.model.init_from
        with ranks.first():
            self.data = prepare(replace(config.data, tokenizer=self.tokenizer), progress=sys.stderr.isatty())
        assert self.data.tokenizer is not None
        self.eos_id = self.data.tokenizer.eos_id
        self.steps: int = (
            config.epochs * training_data.steps_of_epoch(config, self.data, ranks)
            if config.max_steps is None
            else config.max_steps
        )
        self.evaluation = training_data.evaluation_batches(config, self.data, ranks) if config.eval_ppl else ()
        self.checkpoint = training_state.newest(self.output_dir) if config.resume == "auto" else None
        self.fixed = {
            "seed": config.seed,
            "data.sequence_length": config.data.sequence_length,
            "samples per step": training_data.global_batch_size(config, ranks),
        }
        state = None
        if self.checkpoint is not None:
            state = training_state.read(self.checkpoint, config.architecture, self.fixed)
        self.progress = Progress() if state is None else Progress(**state["progress"])
        self.resumed_from = self.progress.step or None
        directory = config.model.init_from if self.checkpoint is None else str(self.checkpoint)
        self.model = training_model.load(config, ranks, directory)
        self._check_vocabulary()
        self.loss: nn.Module = training_model.Loss(self.model, config.precision)
        if ranks.dp_size > 1 and ranks.tp_size == 1:
            self.loss = DistributedDataParallel(self.loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(
            training_model.parameter_groups(self.model, config.weight_decay),
            lr=0.0,  # set before every step
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        if self.checkpoint is not None:
            training_state.restore(self.checkpoint, self.model, self.optimizer, ranks)
        self.report = Report(
            self.output_dir, self.progress.step, self.steps, rank=ranks.rank, tensorboard=config.tensorboard
        )

    def run(self) -> dict[str, Any]:
        """All remaining steps, then the metrics."""
        config, progress = self.config, self.progress
        try:
            self._introduce()
            if config.eval_ppl and progress.step == 0:
                progress.start_perplexity = self._evaluate()
            signalled = self._train()
            final = None
            if config.eval_ppl and signalled is None:
                final = self._evaluate() if self.steps else progress.start_perplexity
            metrics = self._metrics(signalled, final)
            self.report.finish(metrics, asdict(config))
            if signalled is not None:
                self.report.say(f"interrupted by {signalled.name} at step {progress.step}, saved {self.checkpoint}; "
                                "the same command resumes it")
            return metrics
        finally:
            self.report.close()

    def _train(self) -> signal.Signals | None:
        """Steps up to the last, or to the one after a signal, which is returned."""
        config, progress = self.config, self.progress
        with training_data.training_batches(config, self.data, self.ranks, progress.step) as batches:
            while progress.step < self.steps:
                began = time.perf_counter()
                inputs = [Inputs.of(batch, self.eos_id) for batch in next(batches)]
                record = self._step(inputs)
                record["seconds"] = time.perf_counter() - began
                self._book(record)
                last, signalled = progress.step == self.steps, self.ranks.stop()
                if last or signalled or progress.step % config.log_steps == 0:
                    self.report.log(progress.step, training_data.global_batch_size(config, self.ranks))
                if config.eval_ppl and not last and not signalled and _due(progress.step, config.eval_steps):
                    self._evaluate()
                if last or signalled or _due(progress.step, config.save_steps):
                    self._save()
                if signalled and not last:
                    return signalled
        return None

    def _step(self, inputs: Sequence[Inputs]) -> dict[str, float]:
        """One optimizer step over this replica's micro-batches."""
        self.loss.train()
        rate = learning_rate(self.progress.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.ranks.device
        own = torch.tensor(
            [sum(each.label_count for each in inputs), sum(each.count for each in inputs)], dtype=torch.float64, device=device
        )
        labels, tokens = self.ranks.sum(own).tolist()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, each in enumerate(inputs):
            last = index + 1 == len(inputs)
            ddp = self.loss if isinstance(self.loss, DistributedDataParallel) else None
            with contextlib.nullcontext() if last or ddp is None else ddp.no_sync():
                nats = self._nats(each)
                # Replicas' gradients are averaged; the loss is a mean over the labels of all of them.
                (nats * (self.ranks.dp_size / max(labels, 1))).backward()
            total += nats.detach()
        loss = float(self.ranks.sum(total)) / max(labels, 1)
        if self.ranks.dp_size > 1 and self.ranks.tp_size > 1:
            training_model.average_gradients(self.model, self.ranks)
        norm = training_model.clip(self.model, self.config.clip_grad)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"Step {self.progress.step + 1}: the loss is {loss} and the gradient norm {norm}; go on from "
                f"{self.checkpoint or 'the start'} with a lower learning_rate, or look at the data of this step."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate, "labels": labels, "tokens": tokens}

    def _nats(self, inputs: Inputs) -> torch.Tensor:
        device = self.ranks.device
        tensors = (inputs.tokens, inputs.positions, inputs.labels)
        return self.loss(*(each.to(device, non_blocking=True) for each in tensors))

    def _book(self, record: dict[str, float]) -> None:
        progress = self.progress
        progress.step += 1
        progress.loss_sum += record["loss"]
        progress.seconds += record["seconds"]
        if progress.step > self.config.warmup_steps:
            progress.warm_seconds += record["seconds"]
            progress.warm_tokens += int(record["tokens"])
        self.report.step(progress.step, record)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Held-out perplexity."""
        began = time.perf_counter()
        self.loss.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        batch: Batch
        for batch in self.evaluation:
            inputs = Inputs.of(batch, self.eos_id)
            sums[0] += self._nats(inputs)
            sums[1] += inputs.label_count
        total, labels = self.ranks.sum(sums).tolist()
        loss = total / max(labels, 1)
        self.report.evaluation(self.progress.step, loss, int(labels), time.perf_counter() - began)
        return perplexity(loss)

    def _save(self) -> None:
        state = {"step": self.progress.step, "fixed": self.fixed, "progress": asdict(self.progress)}
        self.checkpoint = training_state.save(
            self.model, self.optimizer, self.ranks, self.output_dir,
            self.tokenizer if Path(self.tokenizer).is_dir() else None, state, self.config.keep_last,
        )  # fmt: skip
        self.report.say(f"step {self.progress.step}/{self.steps} | saved {self.checkpoint}")

    def _metrics(self, signalled: signal.Signals | None, final: float | None) -> dict[str, Any]:
        progress, cuda = self.progress, self.ranks.device.type == "cuda"
        gpu = self.ranks.largest(torch.cuda.max_memory_allocated() if cuda else 0.0)
        rss = self.ranks.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return {
            "finished": progress.step >= self.steps,
            "interrupted": signalled.name if signalled else None,
            "step": progress.step,
            "resumed_from": self.resumed_from,
            "train_mean_loss": progress.loss_sum / progress.step if progress.step else None,
            "train_total_elapsed_s": progress.seconds,
            "train_throughput_tok_s": progress.warm_tokens / progress.warm_seconds if progress.warm_seconds else None,
            "peak_gpu_memory_gb": gpu / 1e9,
            "peak_rss_gb": rss / 1e9,
            "eval_perplexity_start": _finite(progress.start_perplexity),
            "eval_perplexity": _finite(final),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }

    def _introduce(self) -> None:
        config, ranks = self.config, self.ranks
        held = sum(corpus.tokens for corpus in self.data.valid)
        self.report.say(
            f"{type(self.model).__name__}: {sum(p.numel() for p in self.model.parameters()):,} parameters; {ranks.size} x "
            f"{ranks.device.type} (tensor {ranks.tp_size} x data {ranks.dp_size}), {config.precision}; {self.steps} steps of "
            f"{training_data.global_batch_size(config, ranks)} samples of {config.data.sequence_length} tokens"
        )
        self.report.say(f"data: {sum(corpus.tokens for corpus in self.data.train):,} training tokens, {held:,} held out")
        if self.resumed_from:
            self.report.say(f"resumed from {self.checkpoint} at step {self.resumed_from}")

    def _check_vocabulary(self) -> None:
        if self.data.vocab_size > self.model.config.vocab_size:
            own = self.config.data.tokenizer is None
            fix = "give the model rows for them (resize_token_embeddings)" if own else "use the model's own (null)"
            raise refuse("data.tokenizer", self.config.data.tokenizer, f"the tokenizer of {self.tokenizer} has "
                         f"{self.data.vocab_size} entries, the model {self.model.config.vocab_size}; {fix}")
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.eos_id


def _check_output(config: FineTuneConfig) -> None:
    """Create output_dir. Raises ConfigError."""
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse("output_dir", config.output_dir, f"it cannot be created ({error.strerror}); choose another") from None
    if config.resume == "none" and (found := training_state.newest(output_dir)):
        raise refuse("resume", "none", f"{found} is there; move it away, choose another output_dir, or use auto")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
