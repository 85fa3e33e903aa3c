"""One table as JSON, CSV and Markdown, and a heat map of it as PNG."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class HeatMap:
    """Scores over two axes."""

    name: str
    """Of the file, without its ending."""
    title: str
    x: str
    """What the columns are."""
    y: str
    """What the rows are."""
    columns: Sequence[Cell]
    rows: Sequence[Cell]
    values: Sequence[Sequence[float | None]]
    """[rows][columns], 0 to 100; None: nothing was measured."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    figures: dict[str, Any]
    """results.json: everything, at full precision."""
    maps: Sequence[HeatMap] = ()
    notes: Sequence[str] = field(default=())
    """Sentences below the table: what it is not."""


def write(report: Report, directory: Path) -> list[Path]:
    """Write results.json, results.csv, results.md and, where matplotlib is, a PNG per map; returns the files."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(report.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in report.rows])
    texts = {
        "results.json": json.dumps(report.figures, indent=1, ensure_ascii=False) + "\n",
        "results.csv": table.getvalue(),
        "results.md": markdown(report) + "\n",
    }
    written = []
    for name, text in texts.items():
        path = directory / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    drawn = (draw(each, directory) for each in report.maps)
    return written + [path for path in drawn if path is not None]


def markdown(report: Report) -> str:
    """The table and the notes."""
    lines = [f"**{report.title}**", "", _line(report.columns), "| --- |" + " --: |" * (len(report.columns) - 1)]
    lines += [_line([shown(cell) for cell in row]) for row in report.rows]
    return "\n".join([*lines, *(line for note in report.notes for line in ("", note))])


def shown(cell: Cell) -> str:
    """A cell as a reader wants it."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) >= 1000 else f"{cell:.2f}" if abs(cell) >= 10 else f"{cell:.4f}"
    return str(cell).replace("|", "\\|")


def percent(value: float | None) -> str | None:
    """A score of 0 to 100 for a table."""
    return None if value is None else f"{value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(each: HeatMap, directory: Path) -> Path | None:
    """`directory`/`name`.png; None where matplotlib (the extra `plots`) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(2 + 0.9 * len(each.columns), 1.5 + 0.4 * len(each.rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in each.values]
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(each.columns)), [str(cell) for cell in each.columns])
    axes.set_yticks(range(len(each.rows)), [str(cell) for cell in each.rows])
    axes.set(title=each.title, xlabel=each.x, ylabel=each.y)
    for row, line in enumerate(each.values):
        for column, value in enumerate(line):
            if value is not None:
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="small")
    figure.colorbar(image, label="score, %")
    path = directory / f"{each.name}.png"
    figure.savefig(path, dpi=120)
    return path
