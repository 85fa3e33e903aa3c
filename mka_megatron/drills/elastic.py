"""torchrun's elastic agent around the training command, with its ranks forked from a process that has imported all of it.

`python -m mka_megatron.drills.elastic RANKS MAX_RESTARTS PIDS CONFIG.yaml key=value ...`, where PIDS is a folder that gets
each rank's process id. The agent is torchrun's own, and so is what it does when a rank dies; only the import of Megatron
and DeepSpeed, ten seconds a rank, is paid once and not at every restart.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_IMPORTED = ("mka_megatron.training.__main__", "mka_megatron.training.loop", "torch.utils.tensorboard")


def work(pids: str, arguments: list[str]) -> None:
    """One rank: the training command."""
    from mka_megatron.training.__main__ import main

    path = Path(pids, f"rank-{os.environ['RANK']}")
    partial = path.with_suffix(".new")
    partial.write_text(str(os.getpid()))
    os.replace(partial, path)
    code = main(arguments)
    if code:
        raise SystemExit(code)


def launch(
    ranks: int, max_restarts: int, pids: Path, arguments: list[str], entry: Callable[[str, list[str]], None] = work
) -> None:
    """Run `entry` on `ranks` ranks of this machine, started anew up to `max_restarts` times after one of them failed.

    Raises:
        ChildFailedError: torch's, after the last of them.
    """
    pids.mkdir(parents=True, exist_ok=True)
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    # As in launch/ranks.sh: ranks that started anew would meet the addresses of those before them.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="drill",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    elastic_launch(config, entry)(str(pids), arguments)


if __name__ == "__main__":
    launch(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
