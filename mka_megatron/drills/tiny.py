"""The run that the drills strike: about fifty thousand parameters on two gloo ranks, and its processes and files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
RANKS = 2
_AGENT = ("-m", "mka_megatron.drills.elastic")


def overrides(folder: Path, name: str, steps: int, save_interval: int) -> list[str]:
    """The run's configuration; runs of the same `folder` share the prepared data, `name` is the output's folder."""
    text = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return [
        f"data.train=[{{path: '{text}/*.py'}}]", "data.tokenizer_vocab_size=384", "data.valid_fraction=0.2",
        f"data.cache_dir={folder / 'cache'}", "data.sequence_length=64", "data.workers=1",
        "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4",
        "model.num_kv_heads=2", "model.head_dim=16", "routing.gate_hidden_size=16", "engine.zero_stage=1",
        "training.micro_batch_size=2", "training.global_batch_size=4", "training.warmup_steps=5",
        f"training.steps={steps}", f"training.save_interval={save_interval}", "training.eval_interval=20",
        "training.eval_batches=2", f"training.output_dir={folder / name}", "logging.interval=5",
    ]  # fmt: skip


class Run:
    """The training command under an elastic agent, as a context: what is left of it is killed on exit."""

    def __init__(
        self, folder: Path, name: str, arguments: list[str], max_restarts: int = 0, agent: Sequence[str] = _AGENT
    ) -> None:
        self.out, self.pids, self.log = folder / name, folder / f"{name}.pids", folder / f"{name}.log"
        self.cache = folder / "cache"
        command = [sys.executable, *agent, str(RANKS), str(max_restarts), str(self.pids)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "configs" / "run" / "tiny.yaml"), *arguments],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def workers(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that have started."""
        found = {}
        for rank in range(RANKS):
            try:
                found[rank] = int((self.pids / f"rank-{rank}").read_text())
            except (OSError, ValueError):
                continue
        return found

    def steps(self) -> int:
        """Lines of losses.jsonl."""
        try:
            return (self.out / "losses.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def losses_inode(self) -> int | None:
        """Of losses.jsonl, which every start of the ranks writes anew before its first step."""
        try:
            return (self.out / "losses.jsonl").stat().st_ino
        except OSError:
            return None

    def prepared(self) -> bool:
        """Whether the tokenised text is there."""
        return any((self.cache / "datasets").glob("[!.]*"))

    def unpublished(self) -> set[tuple[str, int]]:
        """(name, inode) of the checkpoint folders that are being written, replaced or removed; each is used again."""
        found = set()
        try:
            with os.scandir(self.out / "checkpoints") as entries:
                for entry in entries:
                    if entry.name.startswith(".tmp-"):
                        found.add((entry.name, entry.inode()))
        except OSError:
            pass
        return found

    def end_of_log(self) -> str:
        """The last lines that the run and its agent printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


def losses(out: Path) -> list[tuple[int, str, str]]:
    """(step, loss, gradient norm) of every step in losses.jsonl, in hexadecimal."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_hex"], line["grad_norm_hex"]) for line in lines]


def finished(out: Path) -> bool:
    """Whether the run in `out` took all its steps."""
    try:
        return bool(json.loads((out / "metrics.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def evaluations(out: Path) -> list[tuple[int, float, int]]:
    """(step, loss, tokens) of every evaluation."""
    content = json.loads((out / "metrics.json").read_text())
    return [(item["step"], item["loss"], item["tokens"]) for item in content["evaluations"]]
