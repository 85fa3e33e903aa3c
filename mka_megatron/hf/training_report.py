"""What a fine-tuning run writes: losses.jsonl, TensorBoard, progress on stderr, and metrics.json.

TensorBoard's names are those of the Megatron training ("lm loss", "learning-rate", "lm loss validation ppl", ...).
"""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Report:
    """Rank 0's books; the other ranks' write nothing. `close` it."""

    def __init__(self, output_dir: Path, first_step: int, steps: int, *, rank: int, tensorboard: bool) -> None:
        self._output_dir, self._steps, self._writes = output_dir, steps, rank == 0
        self._bar: tqdm[Any] | None = None
        self._board: Any = None
        self._window: list[dict[str, float]] = []
        self._first_step, self._seconds = first_step, 0.0
        if not self._writes:
            return
        self._losses = _kept(output_dir / "losses.jsonl", first_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, desc="fine-tuning", unit="step")

    def step(self, step: int, record: dict[str, float]) -> None:
        """Book one step: loss, grad_norm, learning_rate, labels, tokens, seconds."""
        if not self._writes:
            return
        exact = {f"{name}_hex": record[name].hex() for name in ("loss", "grad_norm")}
        self._losses.write(json.dumps({"step": step, **record, **exact}) + "\n")
        self._window.append(record)
        self._seconds += record["seconds"]
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, batch_size: int) -> None:
        """A log line and TensorBoard points: means over the steps since the last."""
        if not self._writes or not self._window:
            return
        window, self._window = self._window, []
        loss = sum(record["loss"] for record in window) / len(window)
        seconds = sum(record["seconds"] for record in window)
        rate = sum(record["tokens"] for record in window) / seconds
        last = window[-1]
        left = timedelta(seconds=round(self._seconds / (step - self._first_step) * (self._steps - step)))
        self.say(f"step {step}/{self._steps} | loss {loss:.4f} | ppl {perplexity(loss):.2f} | {rate:,.0f} tok/s | "
                 f"lr {last['learning_rate']:.2e} | grad-norm {last['grad_norm']:.3f} | ETA {left}")
        self._scalars(step, {
            "lm loss": loss, "learning-rate": last["learning_rate"], "grad-norm": last["grad_norm"],
            "batch-size": float(batch_size), "iteration-time": seconds / len(window), "tokens per second": rate,
        })  # fmt: skip

    def evaluation(self, step: int, loss: float, labels: int, seconds: float) -> None:
        """Book a held-out evaluation."""
        if not self._writes:
            return
        self.say(f"step {step}/{self._steps} | validation loss {loss:.4f} | validation ppl {perplexity(loss):.2f} | "
                 f"{labels:,} tokens in {seconds:.1f} s")
        self._scalars(step, {"lm loss validation": loss, "lm loss validation ppl": perplexity(loss)})

    def say(self, text: str) -> None:
        """One line of progress."""
        if not self._writes:
            return
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def finish(self, metrics: dict[str, Any], config: dict[str, Any]) -> None:
        """Write `metrics`, with the configuration, to metrics.json."""
        if not self._writes:
            return
        partial = self._output_dir / ".metrics.json.writing"
        partial.write_text(json.dumps({**metrics, "config": config}, indent=2, allow_nan=False) + "\n")
        os.replace(partial, self._output_dir / "metrics.json")

    def close(self) -> None:
        """Close the files and the bar."""
        if not self._writes:
            return
        self._losses.close()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that overflows."""
    return math.exp(loss) if loss < 709.0 else math.inf


def _kept(path: Path, first_step: int) -> Any:
    """The log of losses, open for writing after the lines of steps up to `first_step`."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:first_step]))
    return open(path, "a", buffering=1)
