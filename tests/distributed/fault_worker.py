"""The drills' elastic agent around ranks that wait at a batch, as for a dead disk, while a file says so."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mka_megatron.drills import elastic


def work(pids: str, arguments: list[str]) -> None:
    from mka_megatron.data.loader import Prefetcher

    blocked, read = Path(pids, f"block-{os.environ['RANK']}"), Prefetcher.__next__

    def waits_for_a_disk(self):  # type: ignore[no-untyped-def]
        while blocked.exists():
            time.sleep(0.05)
        return read(self)

    Prefetcher.__next__ = waits_for_a_disk  # type: ignore[method-assign]
    elastic.work(pids, arguments)


if __name__ == "__main__":
    elastic.launch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:], work)
