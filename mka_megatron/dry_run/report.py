"""What a dry run found, as plain data and as text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from mka_megatron.config.schema import Config
from mka_megatron.dry_run.layout import elements, kinds_of
from mka_megatron.dry_run.rank import RankRun

GROUPS = ("tensor", "context", "data", "replicas", "world")
Key = tuple[str, str, str]
"""(group, op, dtype)."""


def totals(run: RankRun) -> dict[Key, tuple[int, int, int]]:
    """Per group, op and dtype, of a whole step: (collectives, bytes that go in, bytes that the rank sends)."""
    names: dict[tuple[int, ...], str] = {}
    for name in GROUPS:
        names.setdefault(run.groups[name], name)
    counts: Counter[Key] = Counter()
    given: Counter[Key] = Counter()
    sent: Counter[Key] = Counter()
    for each, times in zip(run.step, run.counts, strict=True):
        key = (names.get(each.ranks, "other"), each.op, each.dtype)
        counts[key] += times
        given[key] += times * each.given
        sent[key] += times * each.sent(run.rank)
    return {key: (counts[key], given[key], sent[key]) for key in sorted(counts)}


def as_data(runs: Sequence[RankRun], whole_parameters: int, seconds: float) -> dict[str, Any]:
    """For JSON."""
    return {
        "parameters": whole_parameters,
        "accumulation": runs[0].accumulation,
        "seconds": round(seconds, 1),
        "ranks": [
            {
                "rank": run.rank,
                "place": dict(zip(("tensor", "context", "data"), run.place, strict=True)),
                "groups": {name: list(ranks) for name, ranks in run.groups.items() if name != "world"},
                "seconds": round(run.seconds, 1),
                "partitions": None if run.partitions is None
                else [{"elements": part.elements, "held": part.held} for part in run.partitions],
                "collectives": [
                    {"group": group, "op": op, "dtype": dtype, "count": count, "bytes": given, "sent": sent}
                    for (group, op, dtype), (count, given, sent) in totals(run).items()
                ],
            }
            for run in runs
        ],
    }  # fmt: skip


def header(config: Config, runs: Sequence[RankRun], parameters: int, ranks: int) -> str:
    """The world, what a rank holds of the model, and what was checked."""
    parallel, run = config.parallel, runs[0]
    replica = parallel.tensor_parallel * parallel.context_parallel
    local = sum(elements(each.shape) for each in run.held if each.trained)
    lines = [
        f"{ranks} ranks: tensor {parallel.tensor_parallel} x context {parallel.context_parallel} x data {ranks // replica}; "
        f"{config.data.sequence_length} tokens a row, {config.data.sequence_length // parallel.context_parallel} of them on a rank; "
        f"micro-batches of {config.training.micro_batch_size}, {run.accumulation} a step",
        f"weights: {parameters:,} in {sum(each.trained for each in run.held)} parameters, {local:,} on a rank",
        "process groups: " + ", ".join(
            f"{len(groups)} {kind} of {len(groups[0])}" for kind, groups in kinds_of(run.created).items() if groups
        ),
    ]  # fmt: skip
    if run.partitions is not None:
        elements_in, held = (sum(getattr(part, name) for part in run.partitions) for name in ("elements", "held"))
        lines.append(f"ZeRO {config.engine.zero_stage}: {elements_in:,} elements cut over {len(run.partitions[0].ranks)} replicas, "
                     f"{held:,} each, padding counted")
    return "\n".join(lines)


def table(runs: Sequence[RankRun]) -> str:
    """Collectives per step; bytes from the rank that sends least to the one that sends most."""
    rows: dict[Key, list[tuple[int, int, int, int]]] = defaultdict(list)
    for run in runs:
        for key, (count, given, sent) in totals(run).items():
            rows[key].append((sent, given, count, run.rank))
    lines = [f"{'group':<9} {'op':<15} {'dtype':<9} {'a step':>8} {'bytes put in':>21} {'bytes sent':>21}"]
    order = {name: number for number, name in enumerate((*GROUPS, "other"))}
    for key in sorted(rows, key=lambda key: (order[key[0]], key[1:])):
        found = rows[key]
        counts = sorted({count for _, _, count, _ in found})
        put_in = _between(sorted(given for _, given, _, _ in found))
        out = _between(sorted(sent for sent, _, _, _ in found))
        lines.append(f"{key[0]:<9} {key[1]:<15} {key[2]:<9} {'-'.join(map(str, counts)):>8} {put_in:>21} {out:>21}")
    sums = sorted(sum(sent for _, _, sent in totals(run).values()) for run in runs)
    return "\n".join([*lines, f"{'all':<66} {_between(sums):>20}"])


def _between(values: Sequence[int]) -> str:
    low, high = size(values[0]), size(values[-1])
    return high if low == high else f"{low} - {high}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


