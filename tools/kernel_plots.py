"""Plots of what kernels/verify.py measured: time, bandwidth and TFLOP/s against the length, one picture of each per device.

Called by tools/kernel_report.py. Needs matplotlib: the extra `plots`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
"""Points (S, value) of every line."""


class NoPlots(Exception):
    """What is missing, in one sentence."""


def write(records: Sequence[dict[str, Any]], to: Path) -> list[Path]:
    """`<device>-time.png`, `<device>-bandwidth.png` and `<device>-tflops.png` in `to` for every record, of the ops that have it.

    Raises NoPlots without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoPlots("plots need matplotlib: pip install 'mka-megatron[plots]'.") from error
    to.mkdir(parents=True, exist_ok=True)
    written = []
    for record in records:
        device = record["device"]["device"]
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        kinds = (("time", "ms", times), ("bandwidth", "GB/s", bandwidths), ("tflops", "TFLOP/s", rates))
        for kind, unit, series in kinds:
            lines = {op: found for op in record["ops"] if (found := series(record, op))}
            if not lines:
                continue
            figure = Figure(figsize=(7 * len(lines), 5), layout="constrained")
            figure.suptitle(f"{device}: {kind}, sources {record['source_hash'][:12]}")
            for axes, (op, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
                _draw(axes, op, unit, found)
                if kind == "bandwidth":
                    axes.axhline(record["copy_gbps"], color="grey", linewidth=1, label="copy")
                axes.legend(fontsize="small")
            at = to / f"{name}-{kind}.png"
            figure.savefig(at, dpi=120)
            written.append(at)
    return written


def times(record: dict[str, Any], op: str) -> Series:
    """Milliseconds of every case of the op, and of its peers ("case, peer")."""

    def value(timing: dict[str, Any]) -> dict[str, float]:
        return {"": timing["ms"], **{f", {peer}": ms for peer, ms in timing["peers"].items()}}

    return _series(record, op, value)


def bandwidths(record: dict[str, Any], op: str) -> Series:
    """GB/s of every case of the op that has to move its bytes."""

    def value(timing: dict[str, Any]) -> dict[str, float]:
        return {"": timing["bytes_moved"] / (timing["ms"] * 1e6)} if timing["bytes_moved"] else {}

    return _series(record, op, value)


def rates(record: dict[str, Any], op: str) -> Series:
    """TFLOP/s of every case of the op that has to compute its products."""

    def value(timing: dict[str, Any]) -> dict[str, float]:
        return {"": timing["flops"] / (timing["ms"] * 1e9)} if timing["flops"] else {}

    return _series(record, op, value)


def _series(record: dict[str, Any], op: str, value: Callable[[dict[str, Any]], dict[str, float]]) -> Series:
    found: Series = defaultdict(list)
    for timing in record["ops"][op]["timings"]:
        for name, number in value(timing).items():
            found[timing["case"] + name].append((timing["slots"], number))
    return {name: sorted(points) for name, points in found.items()}


def _draw(axes: Any, op: str, unit: str, lines: Series) -> None:
    for name, points in lines.items():
        dashed = any(name.startswith(f"{other}, ") for other in lines)
        axes.plot(*zip(*points, strict=True), "--x" if dashed else "-o", linewidth=1, markersize=4, label=name)
    axes.set(title=op, xlabel="S (tokens)", ylabel=unit, xscale="log", yscale="log" if unit == "ms" else "linear")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
