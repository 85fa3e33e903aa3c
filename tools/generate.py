"""Continue a text with a model that this repository trained or imported.

    python tools/generate.py configs/run/tiny.yaml --prompt "def main(" --max-new-tokens 100
    python tools/generate.py model.init_from=qwen-mka training.precision=bf16 --prompt-file question.txt
    torchrun --nproc_per_node=2 tools/generate.py CONFIG... parallel.tensor_parallel=2 --prompt "..."

With model.init_from the weights are that Hugging Face directory's, else those of the newest intact checkpoint under
training.output_dir, which also says what the model is; it may have been written at another tensor-parallel size. Where the
model recalls tokens, memory_hierarchy.l3's placement and budgets and ssd_spill_path say where they are kept: the context
is as long as the slowest tier allows. The text goes to stdout, figures and progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from tools.megatron_model import built, for_inference, name_of, newest, of_checkpoint, tokenizer_path

if TYPE_CHECKING:
    from mka_megatron.inference.generate import Generated


def main() -> int:
    arguments = parsed()
    rank = int(os.environ.get("RANK", 0))
    from mka_megatron.training.host import quiet

    quiet()
    from mka_megatron.memory.tiers.pages import TierError
    from mka_megatron.training.manifest import CheckpointError

    try:
        text, made = run(arguments, rank)
    except (ConfigError, CheckpointError, TierError) as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return 2
    if rank == 0:
        print(text)
        rates = (
            made.prompt_tokens / made.prompt_seconds,
            made.new_tokens / made.new_seconds if made.new_tokens else 0.0,
        )
        print(
            f"prompt: {made.prompt_tokens} tokens, {rates[0]:.1f} tokens/s; new: {made.new_tokens} tokens, "
            f"{rates[1]:.1f} tokens/s",
            file=sys.stderr,
        )
    return 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="UTF-8 file with it")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="choose among so many of the likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this much probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--prefill-slots", type=int, default=1024, help="prompt tokens of a forward pass")
    parser.add_argument("config", nargs="*", help="configuration files and section.key=value overrides")
    return parser.parse_intermixed_args()


def run(arguments: argparse.Namespace, rank: int) -> tuple[str, Generated]:
    """The continuation, and figures."""
    for name in ("max_new_tokens", "prefill_slots"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; give at least 1.")
    text = prompt_text(arguments)
    # nothing is packed here: how training lays out documents is not asked for
    overrides = ["data.reset_at_documents=false", *(a for a in arguments.config if "=" in a)]
    config = for_inference(load_config([a for a in arguments.config if "=" not in a], overrides))
    from mka_megatron.data.tokenizer import load_tokenizer
    from mka_megatron.inference.generate import generate, remember
    from mka_megatron.inference.sampling import Sampling
    from mka_megatron.memory.generation import open_pages
    from mka_megatron.model.build import DTYPES
    from mka_megatron.parallel import groups
    from mka_megatron.training.host import use_cores

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    topology = groups.initialize(config.parallel, config.engine.timeout_seconds)
    store = None
    try:
        checkpoint = None if config.model.init_from else newest(config)
        if checkpoint is not None:
            config = of_checkpoint(config, checkpoint)
        tokenizer = load_tokenizer(str(tokenizer_path(config, checkpoint)))
        [ids] = tokenizer.encode([text])
        if not ids:
            raise ConfigError("the prompt is empty; give some text.")
        model = built(config, topology, tokenizer, checkpoint)
        store = open_pages(
            config, DTYPES[config.training.precision], topology.device, run=name_of(topology), rank=rank
        )
        made = generate(
            model, remember(model, config, topology, 1, store), [ids], max_new_tokens=arguments.max_new_tokens,
            eos_id=tokenizer.eos_id, positions=config.model.max_position_embeddings, sampling=sampling,
            prefill_slots=arguments.prefill_slots, progress=progress_bar(len(ids)) if rank == 0 else None,
        )  # fmt: skip
        return tokenizer.decode(made.tokens[0]), made
    finally:
        if store is not None:
            store.close()
        groups.destroy()


def prompt_text(arguments: argparse.Namespace) -> str:
    """What to continue."""
    if arguments.prompt is not None:
        return str(arguments.prompt)
    path: Path = arguments.prompt_file
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file: {path} cannot be read as UTF-8 text ({error}).") from None


def progress_bar(tokens: int) -> Callable[[int, int], None]:
    """Shows how far a long prompt is, on stderr."""
    from tqdm import tqdm

    bar = tqdm(total=tokens, unit="token", desc="prompt", disable=None, leave=False)

    def show(done: int, total: int) -> None:
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


if __name__ == "__main__":
    sys.exit(main())
