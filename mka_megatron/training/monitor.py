"""Everything a run writes for people and plots: TensorBoard, losses.jsonl, metrics.json.

Rank 0 holds a Monitor; the other ranks hold none. Scalars carry the names that Megatron-LM users
plot ("lm loss", "grad-norm", "throughput", ...) and, for what Megatron does not write, torchtitan's
("throughput(tps)", "time_metrics/data_loading(s)", "memory/max_active(GiB)", ...).

losses.jsonl has one line per step, with the loss as a hexadecimal float so that runs can be compared
bit by bit; after a resume the lines of steps that the checkpoint does not hold are dropped.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mka_megatron.memory.tiers.statistics import TierStatistics
from mka_megatron.training.progress import Display
from mka_megatron.training.records import Evaluation, StepRecord, Window


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` atomically; NaN and infinities become null, as JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_finite(content), file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class LossLog:
    """losses.jsonl: one line per step, handed to the system before the next step starts."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep the lines of steps up to `resumed_step` and append after them."""
        kept = []
        if path.exists() and resumed_step:
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break  # the line that a killed process was writing, or what a machine without power left
        partial = path.with_name(f".{path.name}.kept")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = open(path, "a", buffering=1)

    def write(self, record: StepRecord) -> None:
        line = {
            "step": record.step,
            "samples": record.samples,
            "loss": record.loss if math.isfinite(record.loss) else None,
            "loss_hex": record.loss.hex(),
            "grad_norm_hex": record.grad_norm.hex(),
            "learning_rate": record.learning_rate,
            "tokens": record.tokens,
            "skipped": record.skipped,
            "seconds": round(record.seconds, 6),
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


class Monitor:
    """Rank 0's books. `close` it at the end; metrics.json is rewritten by `save_metrics`."""

    def __init__(
        self,
        output_dir: Path,
        *,
        display: Display,
        tensorboard: bool,
        resumed_step: int,
        global_batch_size: int,
        devices: int,
        peak_flops: float | None,
    ) -> None:
        """`peak_flops` in FLOP/s of one device; None leaves MFU out."""
        output_dir.mkdir(parents=True, exist_ok=True)
        self._output_dir = output_dir
        self._display = display
        self._global_batch_size = global_batch_size
        self._devices = devices
        self._peak_flops = peak_flops
        self._losses = LossLog(output_dir / "losses.jsonl", resumed_step)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Points of steps that a killed run did not save are hidden, so a resumed curve has no double part.
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resumed_step + 1)
        self._window = Window()

    def step(self, record: StepRecord) -> None:
        """Book one step."""
        self._losses.write(record)
        self._window.add(record)
        self._display.advance(record.step, record.seconds)

    def bad_step(self, record: StepRecord, in_a_row: int) -> None:
        """Tell at once of a step whose loss or gradient was not finite."""
        first, last = record.samples
        self._display.line(
            f"step {record.step}: loss {record.loss:.4g}, gradient norm {record.grad_norm:.4g}: the step was not applied "
            f"(bad step {in_a_row} in a row, samples {first} to {last} in data order)"
        )
        self._write(record.step, {"bad steps in a row": float(in_a_row)})

    def log(
        self,
        step: int,
        *,
        loss_scale: float,
        params_norm: float,
        memory: Mapping[str, float],
        gates: Sequence[tuple[Sequence[float], float]],
        tiers: TierStatistics | None,
        recall_distances: Tensor | None,
    ) -> dict[str, float]:
        """Write the scalars of the steps since the last call and return their means.

        `memory`: GiB by name; `gates`: (shares of the levels, entropy in nats) per gated layer; `tiers`: the page
        store of rank 0 since the last call; `recall_distances`: in chunks, of any shape.
        """
        means = self._window.drain()
        tera = means["flops_per_second"] / 1e12
        scalars = {
            "lm loss": means["loss"],
            "learning-rate": means["learning_rate"],
            "grad-norm": means["grad_norm"],
            "params-norm": params_norm,
            "loss-scale": loss_scale,
            "batch-size": float(self._global_batch_size),
            "iteration-time": means["seconds"],
            "throughput": tera,
            "tokens per second": means["tokens_per_second"],
            "skipped steps": means["skipped"],
            "throughput(tps)": means["tokens_per_second"] / self._devices,
            "tflops": tera,
            "time_metrics/end_to_end(s)": means["seconds"],
            "time_metrics/data_loading(s)": means["data_seconds"],
            "time_metrics/data_loading(%)": 100.0 * means["data_seconds"] / means["seconds"],
        }
        if self._peak_flops is not None:
            scalars["mfu(%)"] = 100.0 * means["flops_per_second"] / self._peak_flops
        scalars |= {f"memory/{name}(GiB)": value for name, value in memory.items()}
        scalars |= gate_scalars(gates)
        if tiers is not None:
            scalars |= tier_scalars(tiers, means["steps"])
        self._write(step, scalars)
        if self._board is not None and recall_distances is not None and recall_distances.numel():
            self._board.add_histogram("recall/distance (chunks)", recall_distances, step)
        self._display.train(step, means)
        return means

    def evaluation(self, result: Evaluation) -> None:
        """Book a held-out evaluation."""
        self._display.evaluation(result)
        self._write(
            result.step, {"lm loss validation": result.loss, "lm loss validation ppl": result.perplexity}
        )
        if self._board is not None:
            self._board.flush()

    def save_metrics(self, content: Mapping[str, Any]) -> Path:
        """Write metrics.json."""
        path = self._output_dir / "metrics.json"
        write_json(path, content)
        return path

    def start(self, first_step: int) -> None:
        """Training begins after `first_step` steps."""
        self._display.start(first_step)

    def say(self, text: str) -> None:
        """Show one line."""
        self._display.line(text)

    def finish(self, title: str, rows: Sequence[tuple[str, str | None]]) -> None:
        """Show the table at the end."""
        self._display.close()
        self._display.table(title, rows)

    def close(self) -> None:
        """Flush and close the files, and end the bar."""
        self._display.close()
        self._losses.close()
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)


def gate_scalars(gates: Sequence[tuple[Sequence[float], float]]) -> dict[str, float]:
    """TensorBoard names of each layer's gate shares (l1, l2, ...) and entropy, and of their means over layers."""
    if not gates:
        return {}
    scalars: dict[str, float] = {}
    for layer, (shares, entropy) in enumerate(gates):
        for level, share in enumerate(shares, start=1):
            scalars[f"gate/layer {layer:02d} l{level} share"] = share
        scalars[f"gate/layer {layer:02d} entropy"] = entropy
    for level in range(len(gates[0][0])):
        scalars[f"gate/mean l{level + 1} share"] = sum(shares[level] for shares, _ in gates) / len(gates)
    scalars["gate/mean entropy"] = sum(entropy for _, entropy in gates) / len(gates)
    return scalars


def tier_scalars(tiers: TierStatistics, steps: float) -> dict[str, float]:
    """TensorBoard names of what the page store holds, and of what it did per step over `steps` steps."""
    held = {f"tiers/{tier} {what}": float(getattr(tiers, f"{tier}_{what}")) for tier in ("hbm", "dram", "ssd")
            for what in ("pages", "bytes")}  # fmt: skip
    done = {"hbm hits": tiers.hbm_hits, "dram hits": tiers.dram_hits, "waited for ssd": tiers.misses,
            "evictions to ssd": tiers.evictions, "forgotten": tiers.forgotten, "written bytes": tiers.written_bytes,
            "read bytes": tiers.read_bytes, "stall (ms)": 1000 * tiers.stall_seconds}  # fmt: skip
    return held | {f"tiers/{name} per step": count / steps for name, count in done.items()}
