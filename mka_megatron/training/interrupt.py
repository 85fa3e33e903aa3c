"""Stop at a step boundary when a signal asks for it, on all ranks or on none.

The handler only sets a flag; the loop asks `Interrupt.agreed` once per step, which is a one-integer
all-reduce over the host group, so it works when a single rank was signalled. torchrun forwards
SIGTERM and SIGINT to every worker and kills them 30 s later; SIGUSR1 is not forwarded, and kills a
torchrun that does not ignore it (`trap '' USR1` before torchrun keeps it alive, and the workers,
which install their own handler, still hear the signal: how Slurm's `--signal=USR1@300` reaches them).
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# scancel signals torchrun and its workers, and torchrun forwards what it got: the same request, twice.
REPEAT_SECONDS = 2.0


def hold(number: int, frame: FrameType | None) -> None:
    """Handler that keeps a signal, which would end a process that only starts, until an :class:`Interrupt` is entered."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    signal.pthread_kill(threading.get_ident(), number)  # pending here; other threads do not block it


class Interrupt:
    """Context manager that turns SIGTERM, SIGINT and SIGUSR1 into a request to stop.

    A second signal more than REPEAT_SECONDS after the first meets the handlers that were there
    before, whose default is to end the process. They are restored on exit.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """`group`: a CPU (gloo) group over all ranks; None for a single process."""
        self._group = group
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what was held is met now
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), now
        elif now - self._received_at > REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def agreed(self) -> signal.Signals | None:
        """The signal that any rank received, the same answer on every rank; None when no rank did.

        Collective: every rank of the group calls it at the same step.
        """
        if self._group is None:
            return self._received
        flag = torch.tensor([int(self._received or 0)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(flag)) if int(flag) else None
