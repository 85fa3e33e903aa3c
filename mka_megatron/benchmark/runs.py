"""The comparison of attention types: which runs it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mka_megatron.benchmark.cells import Budget, Cell, Extra, Row, run_cells
from mka_megatron.benchmark.data import TOKENS, prepared
from mka_megatron.benchmark.parity import match_parameters
from mka_megatron.benchmark.settings import ATTENTION, attention_type, contender, one_document_rows
from mka_megatron.benchmark.world import world, world_size
from mka_megatron.config.errors import ConfigError
from mka_megatron.parallel.groups import Topology


def run_benchmark(
    attention_types: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    sequence_lengths: Sequence[int] = (),
    tokens: int = TOKENS,
    epochs: int = 1,
    learning_rate: float | None = None,
    match: str | None = "gqa",
    distributed: bool | None = None,
    output: Path | str | None = None,
    extra: Extra | None = None,
    topology: Topology | None = None,
    **options: Any,
) -> list[Row]:
    """Train every attention type on the same rows, evaluate it on the test half of the held-out documents, and tabulate it.

    Args:
        attention_types: of `settings.ATTENTION`; None: all.
        seeds: of weights and data order, one run each.
        sequence_lengths: one is the length of the rows; of several the speed alone is measured, on rows that are single
            documents, as many tokens a step at each (a row at least).
        tokens, epochs, learning_rate: as for `get_dataloader` and `train_model`.
        match: the type whose number of parameters all get; None: the MLP stays as it is.
        distributed: True: refuse to run without a launcher's ranks; False: refuse to run with several; None: either.
        output: directory for results.json, table.md and plots, whose finished runs are not repeated; None: no files.
        extra: figures of each trained model, added to its row.
        topology: process groups; None: those of this process.
        options: of `settings.contender`.

    Returns:
        A row per run; the first rank prints their table.

    Raises ConfigError or DataError, in one sentence, before anything is trained.
    """
    _check_launch(distributed)
    names = [attention_type(name) for name in attention_types or ATTENTION]
    options = {"world_size": world_size()} | options
    cells = []
    for length in sequence_lengths or (None,):
        sized = options | ({"sequence_length": length} if len(sequence_lengths) < 2 else _as_many_tokens(options, length))
        for seed in seeds:
            for name in names:
                config = contender(name, seed=seed, **sized)
                cells.append(Cell(name, seed, config if len(sequence_lengths) < 2 else one_document_rows(config)))
    first = cells[0].config
    topology = topology or world(first.parallel, first.engine.timeout_seconds)
    if match is not None:
        match = attention_type(match)
        size = prepared(first, topology).vocab_size
        cells = [Cell(c.name, c.seed, match_parameters(c.config, match, size)) for c in cells]
    budget = Budget(tokens, epochs, learning_rate, "test" if len(sequence_lengths) < 2 else None)
    return run_cells(cells, budget, topology, baseline="gqa", output=output, extra=extra)


def _check_launch(distributed: bool | None) -> None:
    ranks = world_size()
    if distributed and ranks == 1:
        raise ConfigError("distributed is True, but there is one rank: start this with torchrun --nproc_per_node=N or deepspeed.")
    if distributed is False and ranks > 1:
        raise ConfigError(f"distributed is False, but a launcher started {ranks} ranks: start this with python.")


def _as_many_tokens(options: dict[str, Any], length: int | None) -> dict[str, Any]:
    """`options` for rows of `length`: as many tokens a step as without, a row for each rank at least."""
    usual = contender("gqa", **options)
    tokens = usual.training.global_batch_size * usual.data.sequence_length
    rows = max(world_size(), tokens // (length or 1))
    return dict(options, sequence_length=length, batch_size=rows, gradient_accumulation_steps=1)
