"""Runs, one after the other on the same ranks: each trained, evaluated, measured and written before the next."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from mka_megatron.benchmark import report
from mka_megatron.benchmark.data import TOKENS, held_out, prepared, train_rows
from mka_megatron.benchmark.model import BenchmarkModel
from mka_megatron.benchmark.training import train_model
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.inference.measure import PeakMemory
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import NonFiniteError
from mka_megatron.training.host import versions
from mka_megatron.training.monitor import write_json
from mka_megatron.training.records import perplexity

Row = dict[str, Any]
Extra = Callable[[BenchmarkModel, str], Row]
"""Figures of a trained model besides; the name is its cell's."""

SPEED_STEPS = 4
"""Optimizer steps of a run that only measures speed, the first one not timed."""


@dataclass(frozen=True)
class Budget:
    """What every run gets."""

    tokens: int = TOKENS
    """Slots of the training rows."""
    epochs: int = 1
    """Passes over them."""
    learning_rate: float | None = None
    """Its peak; None: as configured."""
    split: Literal["valid", "test"] | None = "test"
    """The held-out half that is evaluated; None: SPEED_STEPS steps of training are measured, and nothing else."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    name: str
    seed: int
    config: Config

    @property
    def row(self) -> Row:
        """What identifies it."""
        return {"name": self.name, "seed": self.seed, "sequence_length": self.config.data.sequence_length}


def run_cells(
    cells: Sequence[Cell],
    budget: Budget,
    topology: Topology,
    *,
    baseline: str,
    output: Path | str | None = None,
    extra: Extra | None = None,
) -> list[Row]:
    """A row of figures per cell; the first rank prints their table.

    With an `output` directory it writes them after each run, and a run whose row is there already is not repeated.

    Args:
        baseline: the name whose losses the others' are compared with.
        extra: adds figures of each trained model to its row.

    Raises ConfigError where the results that are there cannot be read.
    """
    directory = None if output is None else Path(output)
    done = _finished(directory)
    rows: list[Row] = []
    for cell in cells:
        key = _key(cell.config, budget, topology.world_size)
        known = done.pop(key) if key in done else None
        rows.append(known or cell.row | {"key": key} | _attempt(cell, budget, topology, extra))
        if topology.rank == 0 and directory is not None:
            content = {"machine": _machine(topology), "budget": dataclasses.asdict(budget), "rows": [*rows, *done.values()]}
            write_json(directory / "results.json", content)
    if topology.rank == 0:
        text = report.table(rows, baseline)
        print(text, flush=True)
        if directory is not None:
            (directory / "table.md").write_text(text, encoding="utf-8")
            report.plots(rows, directory)
    return rows


def measure(
    config: Config,
    budget: Budget,
    topology: Topology,
    extra: Callable[[BenchmarkModel], Row] | None = None,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> Row:
    """The figures of one run: training, evaluation, memory, and `extra`'s."""
    data = prepared(config, topology)
    peak = PeakMemory(topology.device)
    peak.restart()
    per_step = config.training.global_batch_size * config.data.sequence_length
    rows = train_rows(config, data, topology, SPEED_STEPS * per_step if budget.split is None else budget.tokens)
    others = None if budget.split is None else held_out(config, data, topology, budget.split)
    with BenchmarkModel(config, topology, data) as model:
        trained = train_model(model, rows, budget.epochs, budget.learning_rate, progress)
        row: Row = {
            "parameters": model.parameters,
            "steps": len(trained.losses),
            "train_loss": trained.loss,
            "train_seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
            "data_sha256": trained.data_sha256,
        }
        if others is not None:
            began = time.perf_counter()
            result = model.engine.evaluate(others)
            row |= {
                "eval_loss": result.loss, "perplexity": perplexity(result.loss), "eval_tokens": result.tokens,
                "eval_seconds": time.perf_counter() - began,
            }  # fmt: skip
        row |= _memory(peak, topology)
        if extra is not None:
            row |= extra(model)
    gc.collect()
    return row


def _attempt(cell: Cell, budget: Budget, topology: Topology, extra: Extra | None) -> Row:
    """`measure`, with a bar; what one run alone fails at is recorded, and the others go on."""
    quiet = topology.rank != 0 or not sys.stderr.isatty()
    with tqdm(desc=f"{cell.name}, seed {cell.seed}", unit="step", disable=quiet, leave=False) as bar:

        def progress(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        try:
            return measure(cell.config, budget, topology, extra and (lambda model: extra(model, cell.name)), progress)
        except NonFiniteError as error:
            return {"error": str(error)}
        except torch.OutOfMemoryError as error:
            if topology.world_size > 1:  # the other ranks are waiting
                raise
            return {"error": str(error).partition("\n")[0]}


def _memory(peak: PeakMemory, topology: Topology) -> Row:
    """Bytes, of the rank that used most."""
    both = torch.tensor([peak.above(), peak.reserved()], dtype=torch.int64, device=topology.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return dict(zip(("allocated_bytes", "reserved_bytes"), both.tolist(), strict=True))


def _key(config: Config, budget: Budget, ranks: int) -> str:
    content = json.dumps([dataclasses.asdict(config), dataclasses.asdict(budget), ranks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _finished(directory: Path | None) -> dict[str, Row]:
    """Rows of earlier calls by key, those that failed left out."""
    path = None if directory is None else directory / "results.json"
    if path is None or not path.is_file():
        return {}
    try:
        return {row["key"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if "error" not in row}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a file of results; move it away, or choose another output directory.") from None


def _machine(topology: Topology) -> Row:
    on_cuda = topology.device.type == "cuda"
    name = torch.cuda.get_device_name(topology.device) if on_cuda else platform.processor() or platform.machine()
    return {"device": name, "ranks": topology.world_size, "threads": torch.get_num_threads(), "versions": versions()}
