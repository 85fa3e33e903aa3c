"""Training step time of FastMKA and GQA on this stack, and of a plain loop over Hugging Face's Qwen2, in one run.

    python tools/bench_step.py [--steps 15] [--json out.json] [configs/run/tiny.yaml key=value ...]

The three take a step in turn on the same tokens, so that drift of the machine's speed hits them alike;
the figures are medians, the ratios medians of the ratios turn by turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch
from mka_megatron.data.loader import Prefetcher, train_batches
from mka_megatron.data.prepare import Prepared, prepare
from mka_megatron.model.build import build_model, padded_vocab_size
from mka_megatron.parallel import groups
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.host import use_cores

RATIOS = (("fastmka", "gqa"), ("gqa", "huggingface"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("config", nargs="*", default=["configs/run/tiny.yaml"], help="configuration and overrides")
    arguments = parser.parse_args()
    threads = use_cores(1)
    figures = measure(arguments.config, arguments.steps, arguments.warmup) | {"threads": threads}
    print(f"{threads} threads, median of {arguments.steps} steps each")
    for name, seconds in figures["seconds"].items():
        print(f"  {name:12} {1000 * seconds:8.1f} ms   {figures['parameters'][name]:,} parameters")
    for name, ratio in figures["ratios"].items():
        print(f"  {name:20} {ratio:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(arguments: list[str], steps: int, warmup: int) -> dict:
    """Seconds per step of each contender and their ratios."""
    paths = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    configs = {name: load_config(paths, [*overrides, f"attention.variant={name}"], world_size=1) for name in ("gqa", "fastmka")}
    config = configs["gqa"]
    topology = groups.initialize(config.parallel)
    data = prepare(config.data, vocab_size=config.model.vocab_size)
    contenders: dict[str, Callable[[Sequence[Batch]], object]] = {}
    parameters: dict[str, int] = {}
    for name, variant in configs.items():
        model = build_model(variant, topology, data.vocab_size, construction_context(variant, topology))
        parameters[name] = sum(p.numel() for p in model.parameters())
        contenders[name] = Engine(variant, model, topology).train_step
    plain = huggingface_model(config, data.vocab_size)
    parameters["huggingface"] = sum(p.numel() for p in plain.parameters())
    contenders["huggingface"] = huggingface_step(plain, config)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with batches_of(config, data) as stream:
        for turn, batches in zip(range(warmup + steps), stream, strict=False):
            for name, step in contenders.items():
                began = time.perf_counter()
                step(batches)
                if turn >= warmup:
                    seconds[name].append(time.perf_counter() - began)
    groups.destroy()
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratios": {
            f"{a}/{b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)) for a, b in RATIOS
        },
        "parameters": parameters,
        "all_seconds": seconds,
    }


def batches_of(config: Config, data: Prepared) -> Prefetcher[tuple[Batch, ...]]:
    """The training batches that a run of `config` on one rank would see."""
    return train_batches(
        data.train, data.weights, config.data, chunk_size=config.memory_hierarchy.l1.chunk_size,
        seed=config.training.seed, consumed_samples=0, global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size, dp_rank=0, dp_size=1,
    )


def huggingface_model(config: Config, vocab_size: int) -> Qwen2ForCausalLM:
    """transformers' Qwen2 of the same size as the configuration's gqa model."""
    model = config.model
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=padded_vocab_size(vocab_size, model.vocab_multiple),
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=model.max_position_embeddings,
            tie_word_embeddings=model.tie_embeddings,
            rms_norm_eps=model.norm_eps,
        )
    )


def huggingface_step(model: Qwen2ForCausalLM, config: Config) -> Callable[[Sequence[Batch]], float]:
    """One step of the loop that transformers' Trainer runs: loss, backward, clip, AdamW, schedule."""
    training = config.training
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, (training.adam_beta1, training.adam_beta2), training.adam_eps,
        training.weight_decay, fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, training.warmup_steps, training.steps)

    def step(batches: Sequence[Batch]) -> float:
        total = 0.0
        for batch in batches:
            # labels are shifted already: `shift_labels` keeps transformers from shifting them again
            loss = model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels, use_cache=False).loss
            (loss / len(batches)).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return total

    return step


if __name__ == "__main__":
    sys.exit(main())
