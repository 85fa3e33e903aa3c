"""Evaluate a model: perplexity, passkey, RULER, LongBench.

    python tools/evaluate.py perplexity --out out/ppl configs/run/tiny.yaml
    python tools/evaluate.py passkey --out out/passkey --hf Qwen/Qwen2.5-0.5B --lengths 1024,4096
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.batch import DataError
from mka_megatron.evaluation import passkey, perplexity
from mka_megatron.evaluation.results import Record, Results
from mka_megatron.evaluation.tables import Report, markdown, write
from tools.evaluated_model import Evaluated, add_arguments, opened

_LENGTHS = "1024,2048,4096"


def main() -> int:
    arguments = parsed()
    rank = int(os.environ.get("RANK", 0))
    for ours_to_ignore in (".*[Aa]pex.*", ".*Transformer Engine.*", "full scope is deprecated.*"):
        warnings.filterwarnings("ignore", message=ours_to_ignore)  # Megatron, of what it does not find or need
    from mka_megatron.memory.tiers.pages import TierError
    from mka_megatron.training.manifest import CheckpointError

    try:
        if arguments.batch < 1:
            raise ConfigError(f"--batch is {arguments.batch}; give at least 1.")
        arguments.before(arguments)
        with opened(arguments) as evaluated:
            report = arguments.run(arguments, evaluated, rank)
        if rank == 0:
            written = write(report, arguments.out)
    except (ConfigError, DataError, CheckpointError, TierError) as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    if rank == 0:
        print(markdown(report))
        print(f"\n{', '.join(map(str, written))}", file=sys.stderr)
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="perplexity|passkey|ruler|longbench")

    command = _command(commands, "perplexity", _perplexity, "of documents")
    command.add_argument("--text", metavar="SOURCE", help="file, directory, glob or hf:<name> (default: the embedded corpus's "
                         "held-out files)")  # fmt: skip
    command.add_argument("--text-key", default="text", help="field of JSONL, Parquet and Hugging Face data")
    command.add_argument("--length", type=int, help="inputs of a window (default: the model's positions)")
    command.add_argument("--stride", type=int, help="tokens that a window adds (default: --length, full windows)")
    command.add_argument("--min-tokens", type=int, default=2, help="leave out documents of fewer")

    command = _command(commands, "passkey", _passkey, "Mohtashami & Jaggi's, by length and depth")
    command.add_argument("--lengths", type=_integers, default=_LENGTHS, help="tokens of a prompt")
    command.add_argument("--depths", type=_numbers, default="0,0.25,0.5,0.75,1", help="shares of the filler before the key")
    command.add_argument("--trials", type=int, default=10, help="of every length and depth")
    command.add_argument("--max-new-tokens", type=int, default=12)
    command.add_argument("--protocol", choices=("paper",), help="one new token and, of a model that recalls, 8 chunks")
    return parser.parse_args()


def _command(commands: Any, name: str, run: Callable[..., Report], what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{name}: {what}.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results; the same one resumes")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn")
    parser.set_defaults(run=run, before=lambda arguments: None, command=name)
    add_arguments(parser)
    return parser


def _perplexity(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    from mka_megatron.evaluation import documents

    length = evaluated.model.positions if arguments.length is None else arguments.length
    stride = length if arguments.stride is None else arguments.stride
    if not 1 <= length <= evaluated.model.positions:
        raise ConfigError(f"--length is {length}: the model has {evaluated.model.positions} positions; give 1 to as many.")
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride is {stride}: give 1 to --length ({length}).")
    fingerprint, texts = documents.documents(arguments.text, arguments.text_key, 0.02)
    results = _results(arguments, evaluated, rank, length=length, stride=stride, min_tokens=arguments.min_tokens,
                       text=arguments.text or documents.EMBEDDED, text_key=arguments.text_key, content=fingerprint)  # fmt: skip
    perplexity.evaluate(
        evaluated.model, evaluated.tokenizer, texts, results, length=length, stride=stride, batch=arguments.batch,
        min_tokens=arguments.min_tokens, progress=_progress("documents", None, rank),
    )  # fmt: skip
    return perplexity.report(results, evaluated.name)


def _passkey(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    lengths, depths, new = arguments.lengths, arguments.depths, arguments.max_new_tokens
    settings = {"lengths": lengths, "depths": depths, "trials": arguments.trials, "max_new_tokens": new}
    results = _results(arguments, evaluated, rank, **settings)
    passkey.evaluate(
        evaluated.model, evaluated.tokenizer, results, lengths=lengths, depths=depths, trials=arguments.trials,
        max_new_tokens=new, seed=arguments.seed, batch=arguments.batch,
        progress=_progress("trials", len(lengths) * len(depths) * arguments.trials, rank),
    )  # fmt: skip
    return passkey.report(results, evaluated.name, lengths, depths)


def _results(arguments: argparse.Namespace, evaluated: Evaluated, rank: int, **settings: Any) -> Results:
    known: Record = {"command": arguments.command, "model": evaluated.identity, "seed": arguments.seed, **settings}
    return Results(arguments.out, known, write=rank == 0)


def _progress(what: str, total: int | None, rank: int) -> Callable[[int], None] | None:
    if rank:
        return None
    from tqdm import tqdm

    return tqdm(total=total, unit=what, disable=None, leave=False).update


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
