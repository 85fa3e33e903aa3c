"""Evaluate a model: perplexity, passkey, RULER, LongBench.

    python tools/evaluate.py perplexity --out out/ppl configs/run/tiny.yaml
    python tools/evaluate.py passkey --out out/passkey --hf Qwen/Qwen2.5-0.5B --lengths 1024,4096
    python tools/evaluate.py ruler --out out/ruler --data ruler-files --lengths 4096,8192 --hf DIR
    python tools/evaluate.py longbench --out out/longbench --data data.zip model.init_from=DIR
    python tools/evaluate.py perplexity --out out/patched --hf DIR --patch configs/attention/fastmka.yaml
    torchrun --nproc_per_node=2 tools/evaluate.py passkey --out DIR model.init_from=DIR parallel.tensor_parallel=2

The model is that of a configuration (as for tools/generate.py: model.init_from's directory, or the newest checkpoint of
training.output_dir), or with --hf one of transformers, as it is or with the configuration's attention. The directory
--out gets examples.jsonl while it goes on, so that the same command resumes, and then results.json, .csv, .md and PNGs.
docs/evaluation.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.batch import DataError
from mka_megatron.evaluation.longbench import tasks as longbench
from mka_megatron.evaluation.ruler import tasks as ruler
from mka_megatron.evaluation.tables import markdown, write
from tools import evaluations
from tools.evaluated_model import add_arguments, opened


def main() -> int:
    arguments = parsed()
    rank = int(os.environ.get("RANK", 0))
    for ours_to_ignore in (".*[Aa]pex.*", ".*Transformer Engine.*", "full scope is deprecated.*"):
        warnings.filterwarnings("ignore", message=ours_to_ignore)  # Megatron, of what it does not find or need
    from mka_megatron.memory.tiers.pages import TierError
    from mka_megatron.training.manifest import CheckpointError

    try:
        arguments.check(arguments)
        with opened(arguments) as evaluated:
            report = arguments.evaluate(arguments, evaluated, rank)
        written = write(report, arguments.out) if rank == 0 else []
    except (ConfigError, DataError, CheckpointError, TierError) as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    if rank == 0:
        print(markdown(report))
        print(f"\n{', '.join(map(str, written))}", file=sys.stderr)
        if len(written) < 3 + len(report.maps):
            print("No heat maps: pip install 'mka-megatron[plots]', and give the command again.", file=sys.stderr)
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="perplexity|passkey|ruler|longbench")

    command = _command(commands, "perplexity", "of documents", evaluations.perplexity_of, evaluations.check)
    command.add_argument("--text", metavar="SOURCE", help="file, directory, glob or hf:<name> (default: the embedded corpus's "
                         "held-out files)")  # fmt: skip
    command.add_argument("--text-key", default="text", help="field of JSONL, Parquet and Hugging Face data")
    command.add_argument("--length", type=int, help="inputs of a window (default: the model's positions)")
    command.add_argument("--stride", type=int, help="tokens that a window adds (default: --length, full windows)")
    command.add_argument("--min-tokens", type=int, default=2, help="leave out documents of fewer")

    command = _command(
        commands, "passkey", "Mohtashami & Jaggi's, by length and depth", evaluations.passkey_of, evaluations.check_passkey
    )
    command.add_argument("--lengths", type=_integers, default="1024,2048,4096", help="tokens of a prompt")
    command.add_argument("--depths", type=_numbers, default="0,0.25,0.5,0.75,1", help="shares of the filler before the key")
    command.add_argument("--trials", type=int, default=10, help="of every length and depth")
    command.add_argument("--max-new-tokens", type=int, default=12)
    command.add_argument("--protocol", choices=("paper",), help="one new token and, of a model that recalls, 8 chunks")

    command = _command(commands, "ruler", "RULER v1, by task and length", evaluations.ruler_of, evaluations.check_ruler)
    command.add_argument("--lengths", type=_integers, default="4096", help="tokens of a prompt and its generation budget")
    command.add_argument(
        "--tasks", type=_names, default="all", help=f"all, generated (no questions), or of {', '.join(ruler.TASKS)}"
    )
    command.add_argument("--samples", type=int, default=500, help="of every task and length")
    command.add_argument("--data", type=Path, help="folder of PaulGrahamEssays.json, squad.json, hotpotqa.json, english_words.json")
    command.add_argument("--official", type=Path, help="folder of RULER's own samples (<length>/data/<task>/validation.jsonl)")

    command = _command(commands, "longbench", "LongBench v1, E and v2", evaluations.longbench_of, evaluations.check_longbench)
    command.add_argument("--data", type=Path, default=Path("data.zip"), help="data.zip or its folder; for --v2 data.json")
    edition = command.add_mutually_exclusive_group()
    edition.add_argument("--e", action="store_true", help="LongBench-E, by length too")
    edition.add_argument("--v2", action="store_true", help="the multiple-choice questions of v2")
    edition.add_argument("--protocol", choices=("paper",), help="QA, Summarization, Code and Avg with 128 new tokens")
    command.add_argument("--tasks", type=_names, default="all", help=f"all, or of {', '.join(longbench.TASKS)}")
    command.add_argument("--limit", type=int, help="lines of a task, questions of v2")
    command.add_argument(
        "--max-length", type=int, help="tokens of a prompt, more are cut in the middle (default: what the model has room for)"
    )
    arguments, more = parser.parse_known_args()
    unknown = [each for each in more if each.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.config += more  # overrides may stand between options
    return arguments


def _command(commands: Any, name: str, what: str, evaluate: Any, check: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{name}: {what}.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results; the same one resumes")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn")
    parser.set_defaults(command=name, evaluate=evaluate, check=check, recalled_by_protocol=None)
    add_arguments(parser)
    return parser


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
