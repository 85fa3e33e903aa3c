"""Training in segments with most of the memory on the SSD: peak memory, time lost to it, and the same numbers.

    python tools/bench_segments.py --work DIR [--steps 2] [--short 16384] [--json out.json] \\
        [configs/run/tiny-256k.yaml key=value ...]

Three runs of one configuration, each a process of its own: as it is; with samples of `--short` tokens; and with
everything in DRAM. The first must stay within its DRAM budget plus the peak of the short run, and give the third's
losses, gradient norms and held-out loss bit for bit. The pages of the first lie in DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mka_megatron.config.load import load_config

CONFIG = "configs/run/tiny-256k.yaml"
IN_DRAM = ["memory_hierarchy.l3.placement=dram", "memory_hierarchy.l3.dram_pool_gib=null",
           "memory_hierarchy.ssd_spill_path=null"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs, on the disk to measure")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each run")
    parser.add_argument("--short", type=int, default=16384, help="tokens of a sample of the short run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("config", nargs="*", default=[CONFIG], help="configuration and overrides")
    arguments = parser.parse_args()
    common = [*arguments.config, f"training.steps={arguments.steps}", "logging.interval=1", "logging.progress=false",
              f"memory_hierarchy.ssd_spill_path={arguments.work / 'pages'}"]  # fmt: skip
    runs = {
        "ssd": common,
        "short": [*common, f"data.sequence_length={arguments.short}"],
        "dram": [*common, *IN_DRAM],
    }
    figures = {name: run(overrides, arguments.work / name) for name, overrides in runs.items()}
    budget = load_config([c for c in common if "=" not in c], [c for c in common if "=" in c]).memory_hierarchy.l3.dram_pool_gib
    result = figures | {
        "dram_pool_gib": budget,
        "limit_gib": budget + figures["short"]["peak_gib"],
        "within_limit": figures["ssd"]["peak_gib"] <= budget + figures["short"]["peak_gib"],
        "equal_to_dram": all(figures["ssd"][what] == figures["dram"][what] for what in ("losses", "held_out")),
    }
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["within_limit"] and result["equal_to_dram"] else 1


def run(arguments: list[str], output: Path) -> dict:
    """One training run in a process of its own: peak GiB, seconds a step, stall share, pages and losses (hex)."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "mka_megatron.training", *arguments, f"training.output_dir={output}"]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()

    def mean(tag: str) -> float:
        return statistics.mean(event.value for event in events.Scalars(tag))

    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "peak_gib": metrics["peak_memory_gib"],
        "seconds_per_step": mean("iteration-time"),
        "stall_share": mean("tiers/stall (ms) per step") / 1000 / mean("iteration-time"),
        "written_gib_per_step": mean("tiers/written bytes per step") / 2**30,
        "read_gib_per_step": mean("tiers/read bytes per step") / 2**30,
        "losses": [(line["loss_hex"], line["grad_norm_hex"]) for line in lines],
        "held_out": [item["loss"].hex() for item in metrics["evaluations"]],
    }


def table(result: dict) -> str:
    """The figures as text."""
    lines = [f"{'run':8}{'peak GiB':>10}{'s/step':>10}{'stall':>8}{'written GiB/step':>18}{'read GiB/step':>15}"]
    for name in ("ssd", "short", "dram"):
        each = result[name]
        lines.append(
            f"{name:8}{each['peak_gib']:10.3f}{each['seconds_per_step']:10.1f}{each['stall_share']:8.1%}"
            f"{each['written_gib_per_step']:18.3f}{each['read_gib_per_step']:15.3f}"
        )
    verdict = "within" if result["within_limit"] else "ABOVE"
    same = "equal bit for bit" if result["equal_to_dram"] else "DIFFERENT"
    lines.append(f"peak of ssd {verdict} the limit of {result['limit_gib']:.3f} GiB; losses of ssd and dram {same}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
