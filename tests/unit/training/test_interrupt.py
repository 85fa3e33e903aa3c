"""Signals become one request to stop; a later second signal meets the default again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from mka_megatron.training import interrupt
from mka_megatron.training.interrupt import SIGNALS, Interrupt, hold


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop(number: signal.Signals) -> None:
    with Interrupt(group=None) as request:
        assert request.agreed() is None
        os.kill(os.getpid(), number)
        assert request.agreed() is number
        assert request.agreed() is number


def test_the_same_request_sent_twice_at_once_is_one_request() -> None:
    with Interrupt(group=None) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed() is signal.SIGTERM


def test_a_later_second_signal_meets_the_previous_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "REPEAT_SECONDS", -1.0)
    # a process that a shell started in the background inherits "ignore" for SIGINT
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupt(group=None), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_what_came_before_is_held_until_then() -> None:
    """Beside another thread, which does not block it."""
    ended, before = threading.Event(), signal.signal(signal.SIGUSR1, hold)
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        with Interrupt(group=None) as request:
            assert request.agreed() is signal.SIGUSR1
    finally:
        signal.signal(signal.SIGUSR1, before)
        ended.set()


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt(group=None):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


_RANK = """
import gc, os, signal, sys
import torch.distributed as dist
from mka_megatron.training.interrupt import Interrupt
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
with Interrupt(dist.group.WORLD) as request:
    for step in range(5):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        number = request.agreed()
        if number is not None:
            print(step, number.name, flush=True)
            break
del request
dist.destroy_process_group()
gc.collect()  # gloo aborts a process that keeps a group until the interpreter ends
"""


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["3 SIGUSR1"] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]
