"""Train every attention variant from one configuration and tabulate held-out perplexities.

    python tools/compare_variants.py --steps 200 --output runs/variants [configs/run/tiny.yaml key=value ...]

Each row is one run of `python -m mka_megatron.training` with the row's overrides; a finished row is not
run again. Rows on chunks pad every document to a multiple of them. The table is printed and written to OUTPUT/variants.md, the figures to OUTPUT/variants.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHUNKS = ["memory_hierarchy.l1.chunk_size=64", "data.pad_documents_to_chunks=true"]
L3 = [*CHUNKS, "memory_hierarchy.l3={enabled: true, recalled_chunks: 2}"]
BLOCK = [*L3, "memory_hierarchy.l1.window=128"]
ROWS = {
    "mha": ["attention.variant=mha"],
    "mqa": ["attention.variant=mqa"],
    "gqa": ["attention.variant=gqa"],
    "mla": ["attention.variant=mla"],
    "mka (output)": ["attention={variant: mka, mixture: output}"],
    "mka (score)": ["attention={variant: mka, mixture: score}"],
    "fastmka": ["attention.variant=fastmka"],
    "fastmka (L1-L3)": ["attention.variant=fastmka", *L3],
    "fastmka (block core)": ["attention={variant: fastmka, core: block}", *BLOCK],
    "blockmka": ["attention.variant=blockmka", *BLOCK],
    "blockmka (local)": ["attention.variant=blockmka", *BLOCK, "memory_hierarchy.l3.enabled=false"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=Path("runs/variants"), help="directory of the runs and the table")
    parser.add_argument("--variants", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("config", nargs="*", default=["configs/run/tiny.yaml"], help="configuration and overrides")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in arguments.variants:
        rows[name] = run(name, arguments)
        (arguments.output / "variants.json").write_text(json.dumps(rows, indent=2) + "\n")
    table = markdown(rows)
    (arguments.output / "variants.md").write_text(table)
    print(table)
    return 0


def run(name: str, arguments: argparse.Namespace) -> dict:
    """metrics.json of the variant's run, training it first where it is not there."""
    directory = arguments.output / name.replace(" ", "-").strip(")").replace("(", "")
    metrics = directory / "metrics.json"
    if not metrics.is_file():
        command = [
            sys.executable, "-m", "mka_megatron.training", *arguments.config, *ROWS[name],
            f"training.steps={arguments.steps}", f"training.output_dir={directory}",
        ]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads(metrics.read_text())


def markdown(rows: dict[str, dict]) -> str:
    """One line per variant: what was trained, and the held-out figures at its end."""
    lines = [
        "| variant | parameters | train loss | held-out loss | held-out perplexity |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, run_metrics in rows.items():
        final = run_metrics["final"]
        lines.append(
            f"| {name} | {run_metrics['parameters']:,} | {final['train_loss']:.3f} | {final['valid_loss']:.3f} "
            f"| {final['valid_perplexity']:.2f} |"
        )
    bigram = next(iter(rows.values()))["final"]["bigram_perplexity"]
    return "\n".join(lines) + f"\n\nBigram model on the same held-out tokens: perplexity {bigram:.2f}.\n"


if __name__ == "__main__":
    sys.exit(main())
