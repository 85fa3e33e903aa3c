"""Rows of runs as Markdown tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mka_megatron.benchmark.statistics import Mean, paired

Row = dict[str, Any]
_MIB = 1 << 20
# column: key, digits, unit of the key in the column's
_COLUMNS: dict[str, tuple[str, int, float]] = {
    "train loss": ("train_loss", 3, 1),
    "eval loss": ("eval_loss", 4, 1),
    "perplexity": ("perplexity", 2, 1),
    "train s": ("train_seconds", 1, 1),
    "eval s": ("eval_seconds", 1, 1),
    "tokens/s": ("tokens_per_second", 0, 1),
    "decode ms/token": ("decode_ms_per_token", 2, 1),
    "allocated MiB": ("allocated_bytes", 0, _MIB),
    "reserved MiB": ("reserved_bytes", 0, _MIB),
}


def table(rows: Sequence[Row], baseline: str) -> str:
    """A line per name (mean ± sample standard deviation over seeds), and losses against `baseline`, seed by seed.

    Where rows have several lengths, tokens per second by name and length.
    """
    lengths = sorted({row["sequence_length"] for row in rows})
    return _speeds(rows, lengths) if len(lengths) > 1 else _figures(rows, baseline)


def _figures(rows: Sequence[Row], baseline: str) -> str:
    good = [row for row in rows if "error" not in row]
    columns = [name for name, (key, _, _) in _COLUMNS.items() if any(key in row for row in good)]
    compares = any(row["name"] == baseline and "eval_loss" in row for row in good)
    against = [f"loss − {baseline}"] if compares else []
    lines = ["| | parameters | " + " | ".join(columns + against) + " |", "| --- |" + " --: |" * (1 + len(columns + against))]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in good if row["name"] == name]
        if not own:
            failed = next(row["error"] for row in rows if row["name"] == name)
            lines.append(f"| {name} | {failed} |" + " |" * len(columns + against))
            continue
        cells = [f"{own[0]['parameters']:,}", *(_cell(own, *_COLUMNS[column]) for column in columns)]
        if against:
            cells.append("" if name == baseline else _difference(good, name, baseline))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = len({row["seed"] for row in rows})
    notes = f"\n{seeds} seed{'s' * (seeds > 1)}"
    if seeds > 1:
        notes += ", mean ± sample standard deviation"
        notes += ("; differences seed by seed, mean ± standard error, bold beyond two of them" if against else "")
    return "\n".join(lines) + "\n" + notes + ".\n"


def _cell(rows: Sequence[Row], key: str, digits: int, unit: float) -> str:
    values = [row[key] / unit for row in rows if key in row]
    return Mean.of(values).text(digits) if values else ""


def _difference(rows: Sequence[Row], name: str, baseline: str) -> str:
    losses = [{r["seed"]: r["eval_loss"] for r in rows if r["name"] == each and "eval_loss" in r} for each in (name, baseline)]
    found = paired(*losses)
    if found is None:
        return ""
    if found.standard_error is None:
        return f"{found.mean:+.4f}"
    text = f"{found.mean:+.4f} ± {found.standard_error:.4f}"
    return f"**{text}**" if found.differs() else text


def _speeds(rows: Sequence[Row], lengths: Sequence[int]) -> str:
    lines = ["| tokens/s | " + " | ".join(f"{length:,}" for length in lengths) + " |", "| --- |" + " --: |" * len(lengths)]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for length in lengths:
            own = [row for row in rows if (row["name"], row["sequence_length"]) == (name, length)]
            good = [row for row in own if "error" not in row]
            cells.append(_cell(good, "tokens_per_second", 0, 1) if good else "failed" if own else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plots(rows: Sequence[Row], directory: Path) -> list[Path]:
    """benchmark.png (perplexity, speed, memory by name) or throughput.png (speed by length); none without matplotlib."""
    good = [row for row in rows if "error" not in row]
    if find_spec("matplotlib") is None or not good:
        return []
    lengths = sorted({row["sequence_length"] for row in good})
    return [_lines(good, lengths, directory) if len(lengths) > 1 else _bars(good, directory)]


def _bars(rows: Sequence[Row], directory: Path) -> Path:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["name"] for row in rows))
    panels = [name for name in ("perplexity", "tokens/s", "allocated MiB") if any(_COLUMNS[name][0] in row for row in rows)]
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        key, _, unit = _COLUMNS[panel]
        means = [Mean.of([row[key] / unit for row in rows if row["name"] == name and key in row]) for name in names]
        axis.bar(names, [each.mean for each in means], yerr=[each.std or 0 for each in means], capsize=3)
        axis.set_ylabel(panel)
        axis.tick_params(axis="x", rotation=60)
    path = directory / "benchmark.png"
    figure.savefig(path, dpi=120)
    return path


def _lines(rows: Sequence[Row], lengths: Sequence[int], directory: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [(n, [r["tokens_per_second"] for r in rows if (r["name"], r["sequence_length"]) == (name, n)]) for n in lengths]
        found = [(n, Mean.of(values).mean) for n, values in points if values]
        axis.loglog([n for n, _ in found], [speed for _, speed in found], marker="o", label=name, base=2)
    axis.set_xlabel("tokens of a row")
    axis.set_ylabel("training tokens/s")
    axis.legend()
    path = directory / "throughput.png"
    figure.savefig(path, dpi=120)
    return path
