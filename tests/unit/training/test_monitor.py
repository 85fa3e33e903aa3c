"""Files of a run: losses.jsonl, metrics.json and TensorBoard events, across a resume."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mka_megatron.memory.tiers.statistics import TierStatistics
from mka_megatron.training.monitor import LossLog, Monitor, gate_scalars, write_json
from mka_megatron.training.progress import Display
from mka_megatron.training.records import Evaluation, StepRecord, Window, perplexity


def record(step: int, loss: float = 2.0, *, skipped: bool = False, seconds: float = 0.5) -> StepRecord:
    return StepRecord(
        step=step,
        samples=(8 * step - 8, 8 * step - 1),
        loss=loss,
        grad_norm=1.5,
        learning_rate=1e-3,
        tokens=90,
        processed=100,
        skipped=skipped,
        seconds=seconds,
        data_seconds=0.1,
        flops=1e12,
    )


def monitor(directory: Path, resumed_step: int = 0, peak_flops: float | None = 8e12) -> Monitor:
    return Monitor(
        directory,
        display=Display(10, bar=False, stream=io.StringIO()),
        tensorboard=True,
        resumed_step=resumed_step,
        global_batch_size=8,
        devices=2,
        peak_flops=peak_flops,
    )


def log(books: Monitor, step: int, tiers: TierStatistics | None = None) -> dict[str, float]:
    return books.log(
        step, loss_scale=1.0, params_norm=3.0, memory={"max_resident": 1.25}, gates=[((0.75, 0.25), 0.5)],
        tiers=tiers, recall_distances=None if tiers is None else torch.tensor([2, 3, 3]),
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_loss_log_keeps_every_bit(tmp_path) -> None:
    value = 0.1 + 0.2
    books = LossLog(tmp_path / "losses.jsonl", resumed_step=0)
    books.write(record(1, value))
    assert float.fromhex(lines(tmp_path / "losses.jsonl")[0]["loss_hex"]) == value
    books.write(record(2, math.nan, skipped=True))
    last = lines(tmp_path / "losses.jsonl")[1]
    assert (last["loss"], last["loss_hex"], last["skipped"]) == (None, "nan", True)
    books.close()


def test_a_resume_drops_later_and_torn_lines(tmp_path) -> None:
    path = tmp_path / "losses.jsonl"
    books = LossLog(path, resumed_step=0)
    for step in range(1, 6):
        books.write(record(step))
    books.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    books = LossLog(path, resumed_step=3)
    books.write(record(4))
    books.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    LossLog(path, resumed_step=0).close()
    assert path.read_text() == ""


def test_bytes_that_a_dead_machine_left_do_not_end_the_next_start(tmp_path) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x80\x00\n{"step": 2}\n')
    LossLog(path, resumed_step=3).close()
    assert [line["step"] for line in lines(path)] == [1]


def test_window_means(tmp_path) -> None:
    window = Window()
    window.add(record(1, 2.0, seconds=0.5))
    window.add(record(2, 4.0, seconds=1.5))
    window.add(record(3, math.nan, skipped=True, seconds=1.0))
    means = window.drain()
    assert means["loss"] == 3.0
    assert means["seconds"] == 1.0
    assert means["tokens_per_second"] == 100.0
    assert means["flops_per_second"] == 1e12
    assert means["skipped"] == 1


def test_tensorboard_has_the_names_that_users_plot(tmp_path) -> None:
    books = monitor(tmp_path)
    books.step(record(1))
    log(books, 1)
    books.evaluation(Evaluation(1, 2.0, perplexity(2.0), 640, 8, 0.1))
    books.close()
    expected = {
        "lm loss": 2.0,
        "lm loss validation": 2.0,
        "lm loss validation ppl": math.exp(2.0),
        "learning-rate": 1e-3,
        "grad-norm": 1.5,
        "params-norm": 3.0,
        "loss-scale": 1.0,
        "batch-size": 8.0,
        "iteration-time": 0.5,
        "throughput": 2.0,
        "tokens per second": 200.0,
        "throughput(tps)": 100.0,
        "tflops": 2.0,
        "mfu(%)": 25.0,
        "time_metrics/data_loading(s)": 0.1,
        "time_metrics/data_loading(%)": 20.0,
        "memory/max_resident(GiB)": 1.25,
        "gate/layer 00 l1 share": 0.75,
        "gate/layer 00 l2 share": 0.25,
        "gate/layer 00 entropy": 0.5,
    }
    for tag, value in expected.items():
        assert points(tmp_path, tag) == [(1, pytest.approx(value, rel=1e-6))], tag


def test_tensorboard_shows_the_tiers_and_what_was_recalled(tmp_path) -> None:
    books = monitor(tmp_path)
    for step in (1, 2):
        books.step(record(step))
    log(books, 2, TierStatistics(pages=9, dram_pages=4, ssd_pages=5, ssd_bytes=640, dram_hits=6, misses=2,
                                 evictions=8, read_bytes=256, stall_seconds=0.5))  # fmt: skip
    books.close()
    expected = {"dram pages": 4, "ssd pages": 5, "ssd bytes": 640, "dram hits per step": 3,
                "waited for ssd per step": 1, "evictions to ssd per step": 4, "read bytes per step": 128,
                "stall (ms) per step": 250}  # fmt: skip
    for name, value in expected.items():
        assert points(tmp_path, f"tiers/{name}") == [(2, pytest.approx(value))], name
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (histogram,) = events.Histograms("recall/distance (chunks)")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (2, 3, 8)


def test_no_mfu_without_a_known_peak(tmp_path) -> None:
    books = monitor(tmp_path, peak_flops=None)
    books.step(record(1))
    log(books, 1)
    books.close()
    with pytest.raises(KeyError):
        points(tmp_path, "mfu(%)")


def test_a_resumed_curve_has_no_double_points(tmp_path) -> None:
    books = monitor(tmp_path)
    for step in range(1, 5):
        books.step(record(step, float(step)))
        log(books, step)
    books.close()
    books = monitor(tmp_path, resumed_step=2)
    books.step(record(3, 30.0))
    log(books, 3)
    books.close()
    assert points(tmp_path, "lm loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_json_is_valid_and_replaced_whole(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": math.inf, "b": [1.5, math.nan], "c": {"d": (1, 2)}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": {"d": [1, 2]}}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1.5, None]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.json"]


def test_gate_means_are_over_layers() -> None:
    scalars = gate_scalars([((1.0, 0.0), 0.0), ((0.5, 0.5), 0.6)])
    assert scalars["gate/mean l1 share"] == 0.75
    assert scalars["gate/mean entropy"] == 0.3
    assert gate_scalars([]) == {}


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(math.log(5.0)) == pytest.approx(5.0)
    assert perplexity(1e4) == math.inf
