"""What the terminal shows: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TextIO

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

from mka_megatron.training.records import Evaluation, perplexity

_LOG_WIDTH = 100


class Display:
    """Rank 0's view of the run on `stream`; `close` it.

    On a terminal (and with `bar`), one live bar with the latest loss; lines above it for evaluations
    and checkpoints. Otherwise one timestamped line per call, so that a log file stays readable.
    """

    def __init__(self, total_steps: int, *, bar: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False)
        self._total = total_steps
        self._wants_bar = bar and self._console.is_terminal
        self._seconds = 0.0
        self._steps_timed = 0
        self._bar: Progress | None = None

    def start(self, first_step: int) -> None:
        """Training begins after `first_step` steps: show the bar from here on."""
        if self._wants_bar:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=self._total, completed=first_step, status="")
            self._bar.start()

    def close(self) -> None:
        """End the bar; lines can still be shown."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

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

    def table(self, title: str, rows: Sequence[tuple[str, str | None]]) -> None:
        """Show (name, value) rows; those whose value is None are left out."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column("what")
        table.add_column("value", overflow="fold")
        for name, value in rows:
            if value is not None:
                table.add_row(name, value)
        if not self._console.is_terminal:
            self._console.width = _LOG_WIDTH
        self._console.print(table)
