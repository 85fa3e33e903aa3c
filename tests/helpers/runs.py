"""Whole runs of the real command, small enough to repeat: started, watched through their files, and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.launch import ROOT, end_tree, free_port

CONFIG = ROOT / "configs" / "run" / "tiny.yaml"
MODULE = "mka_megatron.training"
POLL_SECONDS = 0.002


class Workplace:
    """A folder for the runs of one test module: the same text, tokenizer and model for all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
        self.overrides = [
            f"data.train=[{{path: '{text}/*.py'}}]", "data.tokenizer_vocab_size=384", "data.valid_fraction=0.2",
            f"data.cache_dir={folder / 'cache'}", "data.sequence_length=64", "data.workers=1",
            "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=128",
            "model.num_attention_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
            "routing.gate_hidden_size=16", "training.micro_batch_size=2", "training.global_batch_size=4",
            "training.steps=60", "training.warmup_steps=5", "training.learning_rate=5e-3",
            "training.min_learning_rate=2e-4",
            "training.eval_interval=15", "training.eval_batches=8", "training.save_interval=8",
            "logging.interval=5",
        ]

    def start(self, name: str, *overrides: str, ranks: int = 1) -> Run:
        """Start the command with output_dir `name`: alone for one rank, under torchrun for more."""
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        out = self.folder / name
        command = [*launcher, "-m", MODULE, str(CONFIG), *self.overrides, f"training.output_dir={out}", *overrides]
        return Run(command, out, self.folder / f"{name}.log")


def losses(out: Path) -> list[tuple[int, str, str]]:
    """`Run.losses` of the run whose output_dir is `out`."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_hex"], line["grad_norm_hex"]) for line in lines]


class Run:
    """One started command."""

    def __init__(self, command: list[str], out: Path, log: Path) -> None:
        self.out, self.log = out, log
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, timeout: float = 170) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.end()

    def finish(self) -> Run:
        """Wait for an exit with 0; AssertionError shows the log otherwise."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.text()[-6000:]}"
        return self

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Until losses.jsonl, written anew by this process, holds `step` steps or more."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended before step {step}:\n{self.text()[-6000:]}"
            if "training tokens" in self.text() and self.steps() >= step:
                return
            time.sleep(POLL_SECONDS)
        self.end()
        raise AssertionError(f"step {step} was not reached:\n{self.text()[-6000:]}")

    def workers(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        main = psutil.Process(self.process.pid)
        found = [child for child in main.children() if MODULE in child.cmdline()]
        return sorted(found or [main], key=lambda worker: int(worker.environ().get("RANK", 0)))

    def end(self) -> None:
        """Kill what is left of it."""
        end_tree(self.process)

    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def steps(self) -> int:
        """Steps in losses.jsonl."""
        path = self.out / "losses.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def losses(self) -> list[tuple[int, str, str]]:
        """(step, loss, gradient norm) of every step, in hexadecimal: every bit."""
        return losses(self.out)

    def metrics(self) -> dict[str, Any]:
        """metrics.json."""
        return json.loads((self.out / "metrics.json").read_text())

    def evaluations(self) -> list[tuple[int, float, int]]:
        """(step, loss, tokens) of every evaluation."""
        return [(item["step"], item["loss"], item["tokens"]) for item in self.metrics()["evaluations"]]
