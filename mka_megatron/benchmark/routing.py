"""Where a trained gate sends its queries: mean shares of the memory levels by layer, position and task.

Shapes: B rows, S slots, G KV heads, L levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mka_megatron.benchmark.data import held_out
from mka_megatron.benchmark.model import BenchmarkModel
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.data.loader import collate
from mka_megatron.data.packing import Row
from mka_megatron.evaluation.passkey import Passkey
from mka_megatron.model.core_attention import VariantCore
from mka_megatron.training.monitor import write_json

BUCKETS = 16
"""Parts of a row that positions are counted into."""
BATCHES = 8
"""Batches of each task."""


@dataclass(frozen=True)
class Routes:
    """Shares of one task."""

    levels: tuple[str, ...]
    shares: np.ndarray
    """[layers, BUCKETS, L] mean over tokens and KV heads; NaN where no token stands."""
    samples: list[Tensor]
    """Per layer [tokens, L]: the shares of every token, KV heads averaged."""


def analyse(model: BenchmarkModel, tasks: Mapping[str, Iterable[Batch]]) -> dict[str, Routes]:
    """The routes of each task's tokens by their position in their document. A collective call.

    Raises ConfigError for a model without a gate.
    """
    cores = [module for module in model.module.modules() if isinstance(module, VariantCore) and module.route is not None]
    if not cores:
        raise ConfigError(f"attention.variant is {model.config.attention.variant}: it has one level, so there are no routes to see.")
    return {name: _routes(model, cores, batches) for name, batches in tasks.items()}


def _routes(model: BenchmarkModel, cores: Sequence[VariantCore], batches: Iterable[Batch]) -> Routes:
    seen: list[list[Tensor]] = [[] for _ in cores]
    positions: list[Tensor] = []
    for batch in batches:
        documents = batch.documents
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if documents.padding is None else ~documents.padding
        positions.append(documents.positions[real])
        for layer, core in enumerate(cores):
            core.observe = _keep(seen[layer], real)
        try:
            model.engine.evaluate([batch])
        finally:
            for core in cores:
                core.observe = None
    where = torch.cat(positions) * BUCKETS // model.config.data.sequence_length
    samples = [torch.cat(each) for each in seen]
    shares = np.full((len(samples), BUCKETS, samples[0].shape[-1]), np.nan)
    for bucket in range(BUCKETS):
        if bool((where == bucket).any()):
            for layer, each in enumerate(samples):
                shares[layer, bucket] = each[where == bucket].mean(dim=0).numpy()
    return Routes(level_names(model.config)[: shares.shape[-1]], shares, samples)


def _keep(into: list[Tensor], real: Tensor) -> Any:
    def keep(weights: Tensor) -> None:
        # [B,S,L] or [B,S,G,L] -> [tokens,L]
        mean = weights.float().cpu()
        into.append((mean if mean.dim() == 3 else mean.mean(dim=2))[real])

    return keep


def level_names(config: Config) -> tuple[str, ...]:
    """Of the levels that are there, in the gate's order."""
    memory = config.memory_hierarchy
    return ("L1", *("L2",) * memory.l2.enabled, *("L3",) * memory.l3.enabled)


def tasks_of(model: BenchmarkModel, texts: Mapping[str, Path]) -> dict[str, list[Batch]]:
    """Held-out rows, passkey prompts of a row's length, and the beginning of each text file.

    Raises ConfigError where a file cannot be read, rows are too short, or the data came without a tokenizer.
    """
    config, tokenizer = model.config, model.data.tokenizer
    tasks = {"held-out": list(islice(held_out(config, model.data, model.topology, "valid"), BATCHES))}
    if tokenizer is None:
        raise ConfigError("data.tokenizer: null, so there are no passkey prompts and texts; name the tokenizer of the data.")
    rows, length = BATCHES * config.training.micro_batch_size, config.data.sequence_length
    try:
        passkey, rng = Passkey(lambda text: len(tokenizer.encode([text])[0]), length), Random(0)  # noqa: S311
    except ValueError:
        raise ConfigError(f"data.sequence_length: {length} tokens are too few for a passkey prompt; give at least 512.") from None
    tasks["passkey"] = _batches(tokenizer.encode([passkey.trial(rng).prompt for _ in range(rows)]), config)
    for name, path in texts.items():
        try:
            ids = tokenizer.encode([path.read_text(encoding="utf-8")[: 16 * rows * length]])[0]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as text ({error}); give a UTF-8 file.") from None
        tasks[name] = _batches([ids[i * length : (i + 1) * length] for i in range(rows) if ids[i * length :]], config)
    return tasks


def _batches(documents: Sequence[Sequence[int]], config: Config) -> list[Batch]:
    """A row for each document, padded, without labels."""
    length, size = config.data.sequence_length, config.training.micro_batch_size
    rows = []
    for ids in documents:
        tokens, padding, starts = np.zeros(length, np.int64), np.ones(length, bool), np.zeros(length, bool)
        tokens[: len(ids)], padding[: len(ids)], starts[0] = ids, False, True
        rows.append(Row(tokens, np.full(length, IGNORE, np.int64), starts, padding))
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def write(found: Mapping[str, Routes], config: Config, directory: Path) -> None:
    """routing.json, routing.png (where matplotlib is installed) and TensorBoard histograms."""
    bucket = config.data.sequence_length // BUCKETS
    content = {
        "variant": config.attention.variant,
        "seed": config.training.seed,
        "tokens_per_bucket": bucket,
        "tasks": {name: {"levels": routes.levels, "shares": routes.shares.tolist()} for name, routes in found.items()},
        "config": dataclasses.asdict(config),
    }
    write_json(directory / "routing.json", content)
    if find_spec("matplotlib") is not None:
        _heat_maps(found, bucket, directory / "routing.png")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard")) as board:
        for name, routes in found.items():
            for layer, sample in enumerate(routes.samples):
                for level, title in enumerate(routes.levels):
                    board.add_histogram(f"routing {name}/layer {layer:02d} {title}", sample[:, level], 0)


def _heat_maps(found: Mapping[str, Routes], bucket: int, path: Path) -> None:
    from matplotlib.figure import Figure

    levels = next(iter(found.values())).levels
    figure = Figure(figsize=(4.5 * len(levels), 2.2 * len(found) + 0.6), layout="constrained")
    axes = figure.subplots(len(found), len(levels), squeeze=False)
    for (name, routes), row in zip(found.items(), axes, strict=True):
        for level, axis in enumerate(row):
            image = axis.imshow(
                routes.shares[..., level], vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis",
                extent=(0, BUCKETS * bucket, -0.5, len(routes.shares) - 0.5),
            )  # fmt: skip
            axis.set_title(f"{name}: {levels[level]}")
            axis.set_xlabel("position in the document")
            axis.set_ylabel("layer")
            axis.set_yticks(range(len(routes.shares)))
    figure.colorbar(image, ax=axes, label="share of the route")
    figure.savefig(path, dpi=120)
