"""What a run ends with: the figures of metrics.json and the table on the terminal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mka_megatron.config.schema import Config
from mka_megatron.training.host import versions
from mka_megatron.training.records import Evaluation, perplexity


@dataclass(frozen=True)
class Throughput:
    """Speed of the training steps of this process, evaluation and checkpoints left out."""

    steps: int
    tokens: int
    """Token slots, over all replicas."""
    seconds: float
    data_seconds: float
    """Part of `seconds` spent waiting for batches."""
    flops: float
    """Model FLOPs on one device."""

    @property
    def tokens_per_second(self) -> float | None:
        """Token slots per second over all replicas; None before the first step."""
        return self.tokens / self.seconds if self.steps else None

    @property
    def flops_per_second(self) -> float | None:
        """Model FLOP/s of one device; None before the first step."""
        return self.flops / self.seconds if self.steps else None


@dataclass(frozen=True)
class Summary:
    """A finished or interrupted run."""

    step: int
    interrupted: str | None
    """Name of the signal that stopped the run early."""
    resumed_from: int | None
    """Step of the checkpoint that this process started from."""
    skipped_steps: int
    """Steps of this process that were not applied: non-finite, or an fp16 overflow."""
    train_loss: float | None
    """Mean over the last `logging.interval` steps, nats per token."""
    evaluations: tuple[Evaluation, ...]
    """All of the run, those before a resume too."""
    bigram_loss: float | None
    """Nats per token of a bigram model, trained on the training tokens, on exactly the evaluation's labels."""
    parameters: int
    peak_memory_gib: float
    """Of the rank that used most."""
    throughput: Throughput
    wall_seconds: float
    """This process, from the start of data preparation."""
    checkpoint: str | None
    metrics: str

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None


def metrics(summary: Summary, config: Config, peak_flops: float | None) -> dict[str, Any]:
    """The content of metrics.json."""
    speed, last = summary.throughput, summary.evaluation
    rate = speed.flops_per_second
    return {
        "finished": summary.step >= config.training.steps,
        "interrupted": summary.interrupted,
        "step": summary.step,
        "resumed_from": summary.resumed_from,
        "skipped_steps": summary.skipped_steps,
        "final": {
            "train_loss": summary.train_loss,
            "valid_loss": last.loss if last else None,
            "valid_perplexity": last.perplexity if last else None,
            "valid_tokens": last.tokens if last else None,
            "bigram_loss": summary.bigram_loss,
            "bigram_perplexity": None if summary.bigram_loss is None else perplexity(summary.bigram_loss),
        },
        "evaluations": [dataclasses.asdict(item) for item in summary.evaluations],
        "throughput": {
            "steps": speed.steps,
            "seconds": speed.seconds,
            "data_seconds": speed.data_seconds,
            "seconds_per_step": speed.seconds / speed.steps if speed.steps else None,
            "tokens_per_second": speed.tokens_per_second,
            "tflops_per_device": None if rate is None else rate / 1e12,
            "mfu": None if rate is None or peak_flops is None else rate / peak_flops,
        },
        "parameters": summary.parameters,
        "peak_memory_gib": summary.peak_memory_gib,
        "wall_seconds": summary.wall_seconds,
        "checkpoint": summary.checkpoint,
        "config": dataclasses.asdict(config),
        "versions": versions(),
    }


def rows(summary: Summary, config: Config) -> list[tuple[str, str | None]]:
    """(name, value) for the table at the end."""
    last, speed = summary.evaluation, summary.throughput
    rate = speed.tokens_per_second
    return [
        ("parameters", f"{summary.parameters:,}"),
        ("steps", f"{summary.step:,}"),
        ("steps skipped", f"{summary.skipped_steps:,}" if summary.skipped_steps else None),
        ("train loss", _nats(summary.train_loss)),
        ("held-out loss", _nats(last.loss if last else None)),
        ("held-out perplexity", f"{last.perplexity:.2f} on {last.tokens:,} tokens" if last else None),
        (
            "bigram perplexity, same tokens",
            None if summary.bigram_loss is None else f"{perplexity(summary.bigram_loss):.2f}",
        ),
        ("tokens per second", None if rate is None else f"{rate:,.0f}"),
        ("time per step", None if rate is None else f"{1000 * speed.seconds / speed.steps:.0f} ms"),
        ("time in training steps", str(timedelta(seconds=round(speed.seconds)))),
        ("time in all", str(timedelta(seconds=round(summary.wall_seconds)))),
        ("peak memory of a rank", f"{summary.peak_memory_gib:.2f} GiB"),
        ("checkpoint", summary.checkpoint),
        ("metrics", summary.metrics),
        (
            "TensorBoard",
            f"tensorboard --logdir {config.training.output_dir}" if config.logging.tensorboard else None,
        ),
    ]


def _nats(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.4f} nats per token"
