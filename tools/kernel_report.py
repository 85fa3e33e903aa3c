"""The README's section on the CUDA kernels, from what kernels/verify.py wrote; nothing in it comes from elsewhere.

    python tools/kernel_report.py                       # print it
    python tools/kernel_report.py --readme README.md    # between its lines <!-- kernels: begin --> and <!-- kernels: end -->
    python tools/kernel_report.py --plots docs/kernels  # PNGs of time, bandwidth, TFLOP/s against S (the extra `plots`)

Results of other sources than these, by their hash, are named but their numbers are not shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from mka_megatron.ops.library import expected_hash  # noqa: E402
from tools import kernel_plots  # noqa: E402

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
COMMAND = "python kernels/verify.py"


def results(folder: Path = HERE / "kernels" / "results") -> list[dict[str, Any]]:
    """The records of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def of_sources(records: list[dict[str, Any]], sources: str) -> list[dict[str, Any]]:
    """The records whose source hash is `sources`, of runs that came to their end, by device."""
    current = [r for r in records if r["source_hash"] == sources and r["complete"] and not r["quick"]]
    return sorted(current, key=lambda r: r["device"]["device"])


def current() -> str:
    """The section for the results and the sources of this checkout."""
    return section(results(), expected_hash())


def section(records: list[dict[str, Any]], sources: str) -> str:
    """Markdown for the records whose source hash is `sources`."""
    current = of_sources(records, sources)
    if not current:
        older = ", ".join(sorted(r["device"]["device"] for r in records))
        was = f" (an earlier version: {older})" if older else ""
        return f"The CUDA kernels were not yet run on a GPU at this version{was}: `{COMMAND}` does it and writes the results.\n"
    return "\n".join(map(_device, current))


def replaced(readme: str, text: str) -> str:
    """`readme` with `text` between its markers.

    Raises ValueError when it does not have both, once and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the file needs the lines {BEGIN} and {END}, once and in this order.")
    return f"{readme[: readme.index(BEGIN)]}{BEGIN}\n{text}{readme[readme.index(END) :]}"


def _device(record: dict[str, Any]) -> str:
    about, checks = record["device"], [c for op in record["ops"].values() for c in op["checks"]]
    sanitizer = "; ".join(f"{tool} {result}" for tool, result in record["sanitizer"].items())
    lines = [
        f"**{about['device']}**, driver {about['driver']}, PyTorch {about['torch']}, copy {record['copy_gbps']:.0f} GB/s;"
        f" {sum(c['passed'] for c in checks)} of {len(checks)} checks passed; compute-sanitizer: {sanitizer or 'not run'}"
        f" (`{COMMAND}`):",
        "",
        "| op | S | ms | of copy bandwidth or TFLOP/s | faster than | goal |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for op, found in record["ops"].items():
        for t in found["timings"]:
            share = "" if t["copy_share"] is None else f"{t['copy_share']:.0%}"
            if t["flops"]:
                share = f"{t['flops'] / (t['ms'] * 1e9):.1f} TFLOP/s"
            peers = ", ".join(f"{name} {ms / t['ms']:.1f}×" for name, ms in t["peers"].items())
            lines.append(f"| {op}: {t['case']} | {t['slots']:,} | {t['ms']:.4f} | {share} | {peers} | {t['goal']} |")
    return "\n".join(lines) + "\n"


def _plot(to: Path) -> int:
    try:
        written = kernel_plots.write(of_sources(results(), expected_hash()), to)
    except kernel_plots.NoPlots as error:
        print(f"kernel_report.py: {error}", file=sys.stderr)
        return 1
    if not written:
        print(f"kernel_report.py: there are no results of these sources: run {COMMAND} on a GPU.", file=sys.stderr)
        return 1
    print(*written, sep="\n")
    return 0


def main() -> int:
    """0, or 1 when the README has no place for it or there are no plots to make."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, help="the file to write into (default: print)")
    parser.add_argument("--plots", type=Path, help="the folder to write plots into, instead of the section")
    args = parser.parse_args()
    if args.plots is not None:
        return _plot(args.plots)
    text = current()
    if args.readme is None:
        print(text, end="")
        return 0
    try:
        args.readme.write_text(replaced(args.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    except ValueError as error:
        print(f"kernel_report.py: {args.readme}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
