"""The README's section on the CUDA kernels, from what kernels/verify.py wrote; nothing in it comes from elsewhere.

    python tools/kernel_report.py                       # print it
    python tools/kernel_report.py --readme README.md    # between its lines <!-- kernels: begin --> and <!-- kernels: end -->

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

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
COMMAND = "python kernels/verify.py"


def current() -> str:
    """The section for the results and the sources of this checkout."""
    found = sorted((HERE / "kernels" / "results").glob("*.json"))
    return section([json.loads(path.read_text(encoding="utf-8")) for path in found], expected_hash())


def section(records: list[dict[str, Any]], sources: str) -> str:
    """Markdown for the records whose source hash is `sources`."""
    current = [r for r in records if r["source_hash"] == sources and not r["quick"]]
    if not current:
        older = ", ".join(sorted(r["device"]["device"] for r in records))
        was = f" (an earlier version: {older})" if older else ""
        return f"The CUDA kernels were not yet run on a GPU at this version{was}: `{COMMAND}` does it and writes the results.\n"
    return "\n".join(_device(r) for r in sorted(current, key=lambda r: r["device"]["device"]))


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
        "| op | S | ms | of copy bandwidth | faster than |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for op, found in record["ops"].items():
        for t in found["timings"]:
            share = "" if t["copy_share"] is None else f"{t['copy_share']:.0%}"
            peers = ", ".join(f"{name} {ms / t['ms']:.1f}×" for name, ms in t["peers"].items())
            lines.append(f"| {op}: {t['case']} | {t['slots']:,} | {t['ms']:.4f} | {share} | {peers} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """0, or 1 when the README has no place for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, help="the file to write into (default: print)")
    args = parser.parse_args()
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
