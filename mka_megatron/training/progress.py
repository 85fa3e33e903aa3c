"""What the terminal shows: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mka_megatron.training.monitor import Evaluation, perplexity


class ProgressDisplay:
    """Rank 0's view of the run on `stream`. Context manager.

    On a terminal (and with `bar`), one live bar with the latest loss; lines above it for evaluations
    and checkpoints. Otherwise one timestamped line per call, so that a log file stays readable.
    """

    def __init__(self, total_steps: int, first_step: int, *, bar: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._total = total_steps
        self._seconds = 0.0
        self._steps_timed = 0
        self._bar: Progress | None = None
        if bar and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int, seconds: float) -> None:
        """One step, of `seconds`, is done."""
        self._seconds += seconds
        self._steps_timed += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, means: dict[str, float]) -> None:
        """Show the means of the last steps (`monitor.Window.drain`)."""
        status = (
            f"loss {means['loss']:.4f} | ppl {perplexity(means['loss']):.2f} | "
            f"{means['tokens_per_second']:,.0f} tok/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, status=status)
            return
        skipped = f" | skipped {means['skipped']:.0f}" if means["skipped"] else ""
        self.line(
            f"step {step}/{self._total} | {status} | lr {means['learning_rate']:.2e} | "
            f"grad-norm {means['grad_norm']:.3f} | {1000 * means['seconds']:.0f} ms/step | "
            f"ETA {self._eta(step)}{skipped}"
        )

    def evaluation(self, result: Evaluation) -> None:
        """Show a held-out evaluation."""
        self.line(
            f"step {result.step}/{self._total} | validation loss {result.loss:.4f} | "
            f"validation ppl {result.perplexity:.2f} | {result.tokens:,} tokens in {result.seconds:.1f} s"
        )

    def line(self, text: str) -> None:
        """Show one line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=self._stream, flush=True)

    def _eta(self, step: int) -> str:
        mean = self._seconds / max(1, self._steps_timed)
        return str(timedelta(seconds=round(mean * (self._total - step))))


def print_summary(rows: Sequence[tuple[str, Any]], title: str, stream: TextIO | None = None) -> None:
    """Print (name, value) rows as a table; rows whose value is None are left out."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, str(value))
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(table)
