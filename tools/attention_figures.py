"""What tools/bench_attention.py prints and draws of its points."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.attention_cores import Setting

PEERS = ("gqa", "cudnn", "flash", "mla", "mla-cudnn", "flex", "nsa")
"""What the others are compared with, where it was measured before them."""


def seconds(point: dict[str, Any]) -> float:
    """Of all that was measured."""
    both = point["forward_backward_seconds"]
    return point["forward_seconds"] if both is None else both


def relate(points: list[dict[str, Any]]) -> None:
    """Adds to the last point its growth per doubling since the variant's last length, and how often faster it is than
    the peers at this length with these heads."""
    point = points[-1]
    if "missing" in point:
        return
    name, _, heads = point["variant"].partition("@")
    measured = [p for p in points[:-1] if "missing" not in p]
    earlier = [p for p in measured if p["variant"] == point["variant"]]
    values: dict[str, Callable[[dict[str, Any]], float]] = {
        "time": seconds, "scores": lambda p: p["scores"], "memory": lambda p: max(p["peak_mib"], 1e-3),
    }  # fmt: skip
    for kind, value in values.items():
        point[f"{kind}_per_doubling"] = None
        if earlier:
            doublings = math.log2(point["length"] / earlier[-1]["length"])
            point[f"{kind}_per_doubling"] = (value(point) / value(earlier[-1])) ** (1 / doublings)
    here = [(p["variant"].partition("@"), p) for p in measured if p["length"] == point["length"]]
    alike = {other: p for (other, _, with_heads), p in here if with_heads == heads}
    point["times_faster"] = {
        peer: seconds(alike[peer]) / seconds(point) for peer in PEERS if peer in alike and peer != name
    }


def head(setting: Setting, threads: int) -> str:
    """What is measured where, and the columns' names."""
    where = torch.cuda.get_device_name() if setting.device == "cuda" else f"CPU, {threads} threads"
    return (
        f"{where}, {setting.dtype}, {setting.heads}/{setting.kv_heads} heads of {setting.head_dim}, chunk {setting.chunk}, "
        f"window {setting.window}, recalled {setting.recalled}, {setting.backend}"
        f"{', whole layers' if setting.layer else ''}; medians of {setting.repeats}\n"
        f"{'':42}|{'growth per doubling':^27}|{'TFLOP/s':^16}|\n"
        f"{'variant':14}{'length':>8}{'fwd s':>10}{'fwd+bwd s':>10}|{'time':>8}{'scores':>8}{'memory':>8}   |"
        f"{'fwd':>8}{'bwd':>8}|{'peak MiB':>9}   times faster than"
    )


def line(point: dict[str, Any]) -> str:
    """A row of the table."""
    begin = f"{point['variant']:14}{point['length']:>8}"
    if "missing" in point:
        return f"{begin}  not measured: {point['missing']}"

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    rates = point.get("tflops", {})
    faster = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in point["times_faster"].items())
    return (
        f"{begin}{cell(point['forward_seconds'], 10, 4)}{cell(point['forward_backward_seconds'], 10, 4)}|"
        f"{cell(point['time_per_doubling'], 8, 2)}{cell(point['scores_per_doubling'], 8, 2)}"
        f"{cell(point['memory_per_doubling'], 8, 2)}   |"
        f"{cell(rates.get('forward'), 8, 2)}{cell(rates.get('backward'), 8, 2)}|{cell(point['peak_mib'], 9, 1)}   {faster}"
    ).rstrip()


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and, of cores, TFLOP/s over length."""
    from matplotlib.figure import Figure

    measured = [p for p in points if "missing" not in p]
    panels: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("seconds", "log", seconds), ("peak MiB", "log", lambda p: max(p["peak_mib"], 1e-3)),
    ]  # fmt: skip
    if any("tflops" in p for p in measured):
        panels.append(("TFLOP/s, forward", "linear", lambda p: p["tflops"]["forward"]))
        if any("backward" in p.get("tflops", {}) for p in measured):
            panels.append(("TFLOP/s, backward", "linear", lambda p: p["tflops"]["backward"]))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (label, scale, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for variant in dict.fromkeys(p["variant"] for p in measured):
            own = [p for p in measured if p["variant"] == variant]
            axis.plot([p["length"] for p in own], [value(p) for p in own], marker="o", label=variant)
        axis.set(xlabel="tokens", ylabel=label, yscale=scale)
        axis.set_xscale("log", base=2)
        axis.legend()
    figure.savefig(path)
