"""Runs the kernels on a GPU: correct, reproducible, clean, fast? Needs nvcc, PyTorch and NumPy, nothing else of the project's.

    python kernels/verify.py --ops block_attention
    python kernels/verify.py --ops decode layer recall route_fuse
    python kernels/verify.py --ops recall --quick

Each in under 9 minutes; without --ops everything, as far as the 9 minutes go.

Builds the library; compares every op with its reference (in fp64, or bit for bit where it is exact) on outputs that
were poisoned; runs every kernel twice and compares the bits; runs it under compute-sanitizer (memcheck and racecheck,
where it is installed); measures against a copy and PyTorch versions of the same op. Prints one table last and writes
kernels/results/<device>.json as it goes, which is tied to the sources by their hash; what a run of the same sources found
of other ops stays in it. Exits with 1 when anything fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from verify_common import Check, Clock, same_bits  # noqa: E402

from mka_megatron.ops.library import build_script  # noqa: E402

build = build_script()

RESULTS = HERE / "results"
LENGTHS = (1, 127, 128, 129, 4096, 32768, 131072)
BENCHMARKED = (4096, 16384, 32768, 131072, 262144)
BUDGET_S = 9 * 60
"""Of everything, the build included."""
CHECKS_S = 5 * 60
"""Of them, until the last check; what is left then fails."""
SANITIZERS = ("memcheck", "racecheck")


def sections() -> list[str]:
    """The ops that have a section."""
    names = (path.stem.removeprefix("verify_") for path in sorted(HERE.glob("verify_*.py")))
    return [name for name in names if not name.startswith("common")]


def section(op: str) -> ModuleType:
    """The module verify_<op>."""
    return importlib.import_module(f"verify_{op}")


def correctness(op: ModuleType, device: torch.device, lengths: tuple[int, ...]) -> Iterator[Check]:
    """The op's checks, with poisoned outputs, and that two runs give the same bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield from op.checks(device, lengths)
        for name, launch in op.launches(device):
            yield same_bits(f"{name}, two runs", [x.clone() for x in launch()], launch())
    finally:
        torch.use_deterministic_algorithms(False)


def sanitized(ops: list[str], tool: str, limit_s: float) -> str:
    """ "clean", "failed: ..." or "not run: ..." of the ops' launches under one of compute-sanitizer's tools."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return "not run: compute-sanitizer is not installed"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        str(HERE / "verify.py"),
        "--launch",
        *ops,
    ]
    # without PyTorch's cache of freed blocks, so that an access past a tensor's end is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return f"not run: longer than {limit_s:.0f} s"
    if run.returncode == 0:
        return "clean"
    lines = [
        line for line in (run.stdout + run.stderr).splitlines() if "=========" in line or "Error" in line
    ]
    return f"failed: {' '.join(lines[:3]) or run.returncode}"


def broken(phase: str, error: Exception) -> dict[str, Any]:
    """A failed check for a phase that raised: what was found before it is still written."""
    told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {"case": f"{phase}: {told}", "error": math.inf, "bound": 0.0, "passed": False}


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the driver and the versions."""
    about = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    tool = shutil.which(query[0])
    driver = (
        subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() if tool else ""
    )
    return {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "driver": driver,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }


def table(record: dict[str, Any]) -> str:
    """The result for a reader's terminal: checks by op, then times."""
    lines = [
        f"{record['device']['device']}, driver {record['device']['driver']}, torch {record['device']['torch']}"
    ]
    lines.append(f"sources {record['source_hash'][:12]}, copy {record['copy_gbps']:.0f} GB/s")
    for op, found in record["ops"].items():
        failed = [c for c in found["checks"] if not c["passed"]]
        lines.append(f"{op}: {len(found['checks']) - len(failed)} of {len(found['checks'])} checks passed")
        lines += [f"  FAILED {c['case']}: error {c['error']:.3g}, allowed {c['bound']:.3g}" for c in failed]
        for t in found["timings"]:
            share = "" if t["copy_share"] is None else f"{t['copy_share']:7.0%} of copy"
            if t["flops"]:
                share = f"{t['flops'] / (t['ms'] * 1e9):7.1f} TFLOP/s"
            peers = ", ".join(f"{name} {ms / t['ms']:.1f}x" for name, ms in t["peers"].items())
            lines.append(
                f"  {t['case']:<32} S={t['slots']:<7} {t['ms']:9.4f} ms {share:<16} {peers} {t['goal']}".rstrip()
            )
        if found["skipped"]:
            lines.append(f"  not measured, time was up: {', '.join(found['skipped'])}")
    lines += [f"compute-sanitizer {tool}: {result}" for tool, result in record["sanitizer"].items()]
    return "\n".join(lines)


def verify(
    ops: list[str],
    device: torch.device,
    lengths: tuple[int, ...],
    benchmarked: tuple[int, ...],
    sanitize: bool,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
    begin: float | None = None,
) -> dict[str, Any]:
    """Everything but the build, as the record that is written.

    `save` is given what there is so far, whose `complete` is false until the end. `begin`: when the time started.
    """
    begin = time.monotonic() if begin is None else begin
    record: dict[str, Any] = {
        "source_hash": build.source_hash(), "complete": False, "copy_gbps": 0.0, "ops": {}, "sanitizer": {},
    }  # fmt: skip
    for name in ops:
        found = record["ops"][name] = {"checks": [], "timings": [], "skipped": []}
        try:
            for check in correctness(section(name), device, lengths):
                found["checks"].append({**asdict(check), "passed": check.passed})
                if time.monotonic() - begin > CHECKS_S:
                    raise TimeoutError(f"time was up after {check.case}")
        except Exception as error:
            found["checks"].append(broken("checks", error))
        print(f"{name}: {len(found['checks'])} checks, {time.monotonic() - begin:.0f} s", flush=True)
        save(record)
    if sanitize:
        for tool in SANITIZERS:
            left = BUDGET_S - (time.monotonic() - begin)
            record["sanitizer"][tool] = sanitized(ops, tool, max(10.0, left / 3))
            save(record)
    clock = Clock(device)
    record["copy_gbps"] = clock.copy_gbps
    for slots in benchmarked:
        for name, found in record["ops"].items():
            if time.monotonic() - begin > BUDGET_S:
                found["skipped"].append(f"S={slots}")
                continue
            try:
                found["timings"] += [asdict(t) for t in section(name).benchmarks(clock, (slots,))]
            except Exception as error:
                found["checks"].append(broken(f"benchmark S={slots}", error))
            save(record)
    record["complete"] = True
    record["seconds"] = round(time.monotonic() - begin, 1)
    return record


def joined(record: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """`record`, and what a run of the same sources in the same way has found of other ops."""
    alike = ("source_hash", "quick", "device")
    if earlier is None or any(earlier.get(key) != record.get(key) for key in alike):
        return record
    others = {op: found for op, found in earlier["ops"].items() if op not in record["ops"]}
    if not others:
        return record
    sanitizer = dict(record["sanitizer"])
    for tool, result in earlier["sanitizer"].items():
        if sanitizer.get(tool, "clean") == "clean":
            sanitizer[tool] = result
    complete = record["complete"] and earlier["complete"]
    return {**record, "ops": {**others, **record["ops"]}, "sanitizer": sanitizer, "complete": complete}


def passed(record: dict[str, Any]) -> bool:
    """Every check passed, and what the sanitizer ran is clean."""
    checks = [c["passed"] for op in record["ops"].values() for c in op["checks"]]
    return all(checks) and not any(r.startswith("failed") for r in record["sanitizer"].values())


def main() -> int:
    """0: everything passed; 1: something failed; 2: it cannot run here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=sections(), choices=sections(), help="default: all")
    parser.add_argument("--quick", action="store_true", help="lengths up to 4096, no sanitizer")
    parser.add_argument(
        "--launch", nargs="+", choices=sections(), help="only run these ops' kernels once (for the sanitizer)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "verify.py: PyTorch sees no CUDA device: run it on a machine with a GPU (sm_80 to sm_90).",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if args.launch:
        for name in args.launch:
            for _, launch in section(name).launches(device):
                launch()
        torch.cuda.synchronize()
        return 0
    begin = time.monotonic()
    try:
        kernels = build.build()
    except build.BuildError as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2
    about = {"device": describe(device), "functions": len(kernels), "quick": args.quick}
    name = re.sub(r"[^a-z0-9]+", "-", about["device"]["device"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    at = RESULTS / f"{name}.json"
    earlier = json.loads(at.read_text(encoding="utf-8")) if at.exists() else None

    def save(record: dict[str, Any]) -> None:
        at.write_text(json.dumps(joined({**about, **record}, earlier), indent=1) + "\n", encoding="utf-8")

    longest = 4096 if args.quick else max(BENCHMARKED)
    checked, timed = (tuple(n for n in each if n <= longest) for each in (LENGTHS, BENCHMARKED))
    record = {**about, **verify(args.ops, device, checked, timed, not args.quick, save, begin)}
    save(record)
    print(f"{table(record)}\nwritten to {at}")
    return 0 if passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
