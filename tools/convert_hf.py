"""Hugging Face directories: add MKA to a model, take it out again, export a training checkpoint, compare logits.

    python tools/convert_hf.py import Qwen/Qwen2.5-7B out configs/attention/fastmka.yaml
    python tools/convert_hf.py verify Qwen/Qwen2.5-7B out
    python tools/convert_hf.py strip out plain
    python tools/convert_hf.py export runs/x/checkpoints/step-00001000 trained

A model is a directory or a name on the hub. Weights are moved as bytes, on the CPU, with memory that does not depend on
the model's size; verify alone loads its two models, one after the other. The output appears complete, or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from mka_megatron.config.errors import ConfigError
from mka_megatron.conversion.hub import local
from mka_megatron.conversion.stream import Report
from mka_megatron.files import manifest
from mka_megatron.files.source import CONFIG, LARGEST_CONFIG, Source, open_source

FASTMKA = Path(__file__).parents[1] / "configs" / "attention" / "fastmka.yaml"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float64": 1e-10}
"""Of the largest difference, as a share of the largest logit."""
_EXIT = """
Exit codes: 0 done (verify: equal within the tolerance); 1 not equal, or the machine failed; 2 wrong model, configuration or
output, which one sentence says. After any failure nothing is left of the output.
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=_EXIT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|strip|verify")
    add = commands.add_parser("import", help="Hugging Face model -> the same with MKA",
                              description="Add MKA's tensors to a Qwen2/2.5, Qwen3 or Llama 3 model. Until it is trained, dense "
                              "fastmka and mka (mixture output) compute what the model did, and the block core as far as its "
                              "window reaches.")
    add.add_argument("model", help="directory or hub name (owner/model) with safetensors")
    add.add_argument("output", type=Path, help="directory that does not exist yet or is empty")
    add.add_argument("config", nargs="*", metavar="CONFIG", help="YAML files and section.key=value overrides, as for training; "
                     "attention, routing and memory_hierarchy count (default: configs/attention/fastmka.yaml)")
    add.add_argument("--seed", type=int, default=0, metavar="N", help="of the gates' first weights (default 0)")
    out = commands.add_parser("export", help="training checkpoint (any ZeRO stage, any layout) -> Hugging Face model with MKA",
                              description="Write the model of a training checkpoint, from the files alone: no GPU, no ranks, one "
                              "tensor in memory at a time.")
    out.add_argument("checkpoint", type=Path, help="directory step-... of a training's output_dir")
    out.add_argument("output", type=Path, help="directory that does not exist yet or is empty")
    out.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: the training's precision); fp32 "
                     "takes the optimizer's master weights")
    out.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory of the tokenizer (default: the training's own)")
    out.add_argument("--shard-gb", type=float, default=5.0, metavar="X", help="largest file in GB (default 5)")
    take = commands.add_parser("strip", help="model with MKA -> plain model; of an import, the original's files bit for bit",
                               description="Take MKA's tensors out of a model.")
    take.add_argument("model", help="directory or hub name that import or export wrote")
    take.add_argument("output", type=Path, help="directory that does not exist yet or is empty")
    check = commands.add_parser("verify", help="compare the logits of two models",
                                description="Compare two models' logits on the same prompts, on the CPU, one model in memory at a time.")
    check.add_argument("model", help="directory or hub name; its tokenizer is used")
    check.add_argument("other", help="directory or hub name")
    check.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated (default: built-in texts, or random "
                       "tokens where there is no tokenizer)")
    check.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the arithmetic (default float32)")
    check.add_argument("--tolerance", type=float, metavar="X", help="largest difference allowed, as a share of the largest "
                       f"logit (default {', '.join(f'{value:g} in {name}' for name, value in TOLERANCE.items())})")
    check.add_argument("--exact", action="store_true", help="let models with MKA attend to the plain tokens only, whatever their "
                       "routes have learned: must give the base model's logits")
    check.add_argument("--json", action="store_true", help="print the figures as JSON")
    args, rest = parser.parse_known_args(argv)  # argparse wants all of CONFIG before the options
    if rest and (args.command != "import" or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.config += rest
    return args


def _import(args: argparse.Namespace) -> int:
    from mka_megatron.conversion.importing import import_model
    from mka_megatron.hf.remote import write_remote_code

    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed is {args.seed}: it must be at least 0 and less than 2**63.")
    overrides = [argument for argument in args.config if "=" in argument]
    paths = [argument for argument in args.config if "=" not in argument]
    source = import_model(local(args.model), args.output, paths or [FASTMKA], overrides, seed=args.seed,
                          remote_code=write_remote_code, progress=_bar)
    _done(source, args.output)
    return 0


def _export(args: argparse.Namespace) -> int:
    from mka_megatron.conversion.exporting import export
    from mka_megatron.hf.remote import write_remote_code

    if not 0 < args.shard_gb < 1000:
        raise ConfigError(f"--shard-gb is {args.shard_gb:g}: it must be greater than 0 and less than 1000.")
    done = export(args.checkpoint, args.output, dtype=args.dtype, shard_bytes=int(args.shard_gb * 1e9),
                  tokenizer=args.tokenizer, remote_code=write_remote_code, progress=_bar)
    print(f"wrote {args.output}: step {done.step}, {done.tensors} tensors, {done.bytes / 1e9:.2f} GB in {done.dtype}")
    if done.tokenizer is None:
        print("no tokenizer was found; give it with --tokenizer")
    return 0


def _strip(args: argparse.Namespace) -> int:
    from mka_megatron.conversion.stripping import strip_model

    source = strip_model(local(args.model), args.output, progress=_bar)
    _done(source, args.output)
    return 0


def _verify(args: argparse.Namespace) -> int:
    import torch
    import transformers

    import mka_megatron.hf  # noqa: F401 - registers our models
    from mka_megatron.conversion import verification
    from mka_megatron.files.jsonfile import read_object

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    directories = [local(args.model), local(args.other)]
    for directory in directories:
        open_source(directory)
        manifest.verify(directory)
    config = read_object(directories[0] / CONFIG, LARGEST_CONFIG)
    vocabulary = config.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ConfigError(f"vocab_size is {vocabulary} in {directories[0] / CONFIG}: it must be a positive integer; copy the model again.")
    prompts = verification.prompts_of(directories[0], args.prompt, vocabulary)
    dtype = getattr(torch, args.dtype)
    parity = verification.compare(*(verification.logits_of(each, prompts, dtype, args.exact) for each in directories))
    tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    equal = parity.within(tolerance)
    if args.json:
        print(json.dumps({**vars(parity), "tolerance": tolerance, "equal": equal}))
    else:
        print(f"{parity.positions} positions of {len(prompts)} prompts: max error {parity.max_error:.3g} (largest logit "
              f"{parity.largest:.3g}), KL {parity.mean_kl:.3g} mean and {parity.max_kl:.3g} max, top-1 agreement "
              f"{parity.top1:.2%}: {'equal' if equal else 'NOT equal'} within {tolerance:g}")
    return 0 if equal else 1


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Report]:
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as bar:
        yield bar.update


def _done(source: Source, output: Path) -> None:
    print(f"wrote {output}")
    if source.left_out and "mka" not in source.config:
        print(f"left out of {source.path}: {', '.join(source.left_out)}")


def _stop(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


_COMMANDS = {"import": _import, "export": _export, "strip": _strip, "verify": _verify}


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status. Errors are one sentence on stderr."""
    args = _arguments(argv)
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        return _COMMANDS[args.command](args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.", file=sys.stderr)
        return 1
    except SystemExit as stop:
        print("Interrupted: nothing was written.", file=sys.stderr)
        return int(stop.code or 1)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
