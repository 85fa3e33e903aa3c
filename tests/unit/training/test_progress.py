"""Plain lines where stdout is no terminal, and a summary that leaves out what is unknown."""

from __future__ import annotations

import io
import math

from mka_megatron.training.progress import Display
from mka_megatron.training.records import Evaluation

MEANS = {
    "loss": math.log(10.0),
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "seconds": 0.25,
    "data_seconds": 0.0,
    "tokens_per_second": 12345.0,
    "flops_per_second": 1e9,
    "skipped": 0.0,
}


def test_a_log_file_gets_lines_without_control_codes() -> None:
    stream = io.StringIO()
    display = Display(100, bar=True, stream=stream)
    display.start(0)
    for step in range(1, 21):
        display.advance(step, 3.0)
    display.train(20, MEANS)
    display.evaluation(Evaluation(20, 1.0, 2.718, 1000, 160, 0.5))
    display.close()
    train, evaluation = stream.getvalue().splitlines()
    assert "step 20/100 | loss 2.3026 | ppl 10.00 | 12,345 tok/s" in train
    assert "ETA 0:04:00" in train
    assert "validation loss 1.0000 | validation ppl 2.72 | 1,000 tokens" in evaluation
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_skipped_steps_are_named() -> None:
    stream = io.StringIO()
    display = Display(100, bar=False, stream=stream)
    display.train(20, {**MEANS, "skipped": 2.0})
    assert "skipped 2" in stream.getvalue()


def test_the_summary_leaves_out_what_is_unknown() -> None:
    stream = io.StringIO()
    Display(100, bar=False, stream=stream).table("run", [("held-out loss", "2.5"), ("MFU", None)])
    assert "held-out loss" in stream.getvalue() and "MFU" not in stream.getvalue()
