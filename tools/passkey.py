"""Train a tiny Block-MKA model on the passkey task and say what L3 is worth to it, and the hash to L3.

    python tools/passkey.py [--trials 200] [--json out.json] [configs/run/passkey.yaml key=value ...]

Prompts grow from stage to stage up to the row's length. The model then answers trials of another seed, with the key at
least four windows back: with L3; with the same weights and shorter codes, exact selection or L3 hidden; and so does a
model trained alike without L3. A trial counts where every token of the answer and its end is the model's first
choice given the ones before, which is when greedy decoding gives the key. A finished training is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import torch

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config, DataConfig, L3Config, SourceConfig
from mka_megatron.data.batch import IGNORE
from mka_megatron.data.loader import collate, train_batches
from mka_megatron.data.packing import Packing
from mka_megatron.data.prepare import Prepared, prepare
from mka_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from mka_megatron.evaluation.passkey import FILLER, LINE, QUESTION, TASK, Passkey, Trial, found
from mka_megatron.evaluation.recall import LayerInputs, hash_recall
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import planes
from mka_megatron.model.build import build_model
from mka_megatron.model.core_attention import VariantCore
from mka_megatron.model.gpt import GPT
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training import checkpoint
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.start import resume

SHORTEST = 96
"""Tokens of the first stage's prompts: little more than the fixed text."""
LAST_STAGE = 0.5
"""Share of the steps at the full length; the stages before it are equally long."""
WINDOWS_BACK = 4
RECALLED, CANDIDATES = 8, 64
OTHER_BITS = (64, 128, 256)
"""Code lengths that the trained model is tried with beside its own."""
CODES = ((64, 1), (128, 1), (256, 1), (512, 1), (64, 2), (64, 4), (128, 4))
"""(bits, tables) of the recall table."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="prompts that are answered")
    parser.add_argument("--trial-seed", type=int, default=0, help="seed of these prompts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("config", nargs="*", default=["configs/run/passkey.yaml"], help="configuration and overrides")
    arguments = parser.parse_args()
    paths = [a for a in arguments.config if "=" not in a]
    overrides = [a for a in arguments.config if "=" in a]
    torch.set_num_threads(1)
    config = load_config(paths, overrides, world_size=1)
    topology = groups.initialize(config.parallel)
    try:
        figures = measure(config, arguments.trials, arguments.trial_seed, topology)
    finally:
        groups.destroy()
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(config: Config, count: int, seed: int, topology: Topology) -> dict:
    """All figures; trains what has not been trained yet in training.output_dir."""
    output = Path(config.training.output_dir)
    tokenizer = passkey_tokenizer(output / "tokenizer")
    trials, sources = write_data(config, tokenizer, count, seed, output / "data")
    stages = [prepare(stage_data(config, source, tokenizer, output), progress=False) for source in sources]
    window, l3 = config.memory_hierarchy.l1.window or 1, config.memory_hierarchy.l3
    figures: dict = {"trials": count, "trial_seed": seed, "accuracy": {}, "by_windows_back": {}, "training_core_seconds": {}}

    def book(name: str, model: GPT) -> None:
        right = answers(model, config, stages[-1], trials)
        figures["accuracy"][name] = sum(right) / count
        figures["by_windows_back"][name] = by_distance(right, trials, window)
        print(f"{name}: {sum(right)} of {count}", flush=True)

    model, figures["training_core_seconds"]["with L3"] = trained(config, stages, topology, output / "with-l3")
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    book("with L3", model)
    for bits in OTHER_BITS:
        with recall_by(model, dataclasses.replace(l3, hash_bits=bits)):
            book(f"with L3, {bits}-bit codes", model)
    with recall_by(model, dataclasses.replace(l3, selection="exact")):
        book("with L3, exact selection", model)
    with recall_by(model, None):
        book("the same weights, L3 hidden", model)
    figures["recall"] = {
        "passkey prompts": recall_table(model, config, passkey_rows(config, tokenizer)),
        "Python sources": recall_table(model, config, text_rows(config, tokenizer)),
    }
    local = with_l3(config, dataclasses.replace(l3, enabled=False))
    model, figures["training_core_seconds"]["without L3"] = trained(local, stages, topology, output / "without-l3")
    book("trained without L3", model)
    return figures


# --- data


def passkey_tokenizer(directory: Path) -> Tokenizer:
    """A BPE of the published text without a key: its words are tokens, digits stay single."""
    if not directory.is_dir():
        directory.mkdir(parents=True)
        train_bpe([TASK, FILLER, LINE.format(key=""), QUESTION] * 2, 4096, str(directory))
    return load_tokenizer(str(directory))


def write_data(
    config: Config, tokenizer: Tokenizer, count: int, seed: int, directory: Path
) -> tuple[list[Trial], list[Path]]:
    """The `count` trials of `seed` to answer, and a JSONL file of prompts and responses per stage; theirs is valid.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)

    def tokens(text: str) -> int:
        return len(tokenizer.encode([text])[0])

    chunk, row = config.memory_hierarchy.l1.chunk_size, config.data.sequence_length
    longest = row - chunk
    task = Passkey(tokens, longest, WINDOWS_BACK * (config.memory_hierarchy.l1.window or chunk))
    asked = Random(f"trials {seed}")  # noqa: S311
    trials = [task.trial(asked) for _ in range(count)]
    write(directory / "valid.jsonl", trials)

    lengths = [min(SHORTEST, longest)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    rng, sources = Random(config.training.seed), list[Path]()  # noqa: S311
    for length, (first, last) in zip(lengths, bounds(len(lengths), config.training.steps), strict=True):
        task = Passkey(tokens, length)
        slots = (last - first) * config.training.global_batch_size * row
        prompts: list[Trial] = []
        while slots > 0 or not prompts:
            prompts.append(task.trial(rng))
            slots -= tokens(prompts[-1].prompt) + 2 * chunk
        sources.append(directory / f"stage-{len(sources)}.jsonl")
        write(sources[-1], prompts)
    return trials, sources


def bounds(stages: int, steps: int) -> list[tuple[int, int]]:
    """(first step, past the last) of every stage."""
    early = round((1 - LAST_STAGE) * steps) if stages > 1 else 0
    edges = [early * stage // max(1, stages - 1) for stage in range(stages)] + [steps]
    return list(pairwise(edges))


def write(path: Path, trials: list[Trial]) -> None:
    lines = [json.dumps({"prompt": trial.prompt, "response": trial.response}) for trial in trials]
    path.write_text("\n".join(lines) + "\n")


def stage_data(config: Config, source: Path, tokenizer: Tokenizer, output: Path) -> DataConfig:
    return dataclasses.replace(
        config.data, train=(SourceConfig(str(source)),), valid=(SourceConfig(str(source.parent / "valid.jsonl")),),
        tokenizer=tokenizer.name, cache_dir=str(output / "cache"), workers=1,
    )  # fmt: skip


# --- training and answers


def trained(config: Config, stages: list[Prepared], topology: Topology, output: Path) -> tuple[GPT, float]:
    """The model after all stages, and the core-seconds it took; the checkpoint in `output` where there is one."""
    training = dataclasses.replace(config.training, output_dir=str(output))
    config = dataclasses.replace(config, training=training)
    model = build_model(config, topology, stages[0].vocab_size, construction_context(config, topology))
    engine = Engine(config, model, topology)
    state = resume(engine, training)[1]
    if not state:
        began = time.process_time()
        for data, (first, last) in zip(stages, bounds(len(stages), training.steps), strict=True):
            fit(engine, config, data, last - first)
        state = {"seconds": time.process_time() - began}
        checkpoint.save(engine, output, engine.step, state, keep_last=1)
    engine.close()
    return model, state["seconds"]


def fit(engine: Engine, config: Config, data: Prepared, steps: int) -> None:
    training, losses = config.training, []
    with train_batches(
        data.train, data.weights, config.data, chunk_size=config.memory_hierarchy.l1.chunk_size, seed=training.seed,
        consumed_samples=0, global_batch_size=training.global_batch_size, micro_batch_size=training.micro_batch_size,
        dp_rank=0, dp_size=1,
    ) as batches:  # fmt: skip
        for _ in range(steps):
            losses.append(engine.train_step(next(batches)).loss)
            if engine.step % config.logging.interval == 0 or engine.step == training.steps:
                mean = np.mean(losses[-config.logging.interval :])
                print(f"step {engine.step}/{training.steps} | loss {mean:.3f} nats per token", flush=True)


@torch.no_grad()
def answers(model: GPT, config: Config, data: Prepared, trials: list[Trial]) -> list[bool]:
    """Whether each trial, one per row and in order, is answered."""
    model.eval()
    corpus, tokenizer = data.valid[0], data.tokenizer
    assert tokenizer is not None
    packing = Packing(
        corpus, sequence_length=config.data.sequence_length, chunk_size=config.memory_hierarchy.l1.chunk_size,
        split_documents=False, seed=None,
    )  # fmt: skip
    right = []
    for number, trial in enumerate(trials):
        batch = collate([packing.row(number)])
        asked = batch.labels != IGNORE
        choice = model(batch.tokens, batch.documents)[asked].argmax(dim=-1)
        # past a wrong token the choices are given the right ones, and the answer is wrong all the same
        right.append(bool((choice == batch.labels[asked]).all()) and found(tokenizer.decode(choice.tolist()), trial.key))
    return right


def by_distance(right: list[bool], trials: list[Trial], window: int) -> dict[str, list[int]]:
    """Windows back -> [answered, trials]."""
    out: dict[str, list[int]] = {}
    for answered, trial in sorted(zip(right, trials, strict=True), key=lambda pair: pair[1].distance):
        first = trial.distance // window // WINDOWS_BACK * WINDOWS_BACK
        cell = out.setdefault(f"{first} to {first + WINDOWS_BACK}", [0, 0])
        cell[0] += answered
        cell[1] += 1
    return out


def with_l3(config: Config, l3: L3Config) -> Config:
    return dataclasses.replace(config, memory_hierarchy=dataclasses.replace(config.memory_hierarchy, l3=l3))


@contextmanager
def recall_by(model: GPT, l3: L3Config | None) -> Iterator[None]:
    """The same weights with another selection; None: L3 holds nothing, so that the gate masks it."""
    cores = [module for module in model.modules() if isinstance(module, VariantCore)]
    before = [(core.config, core.recalls, core.planes) for core in cores]
    for core in cores:
        core.recalls = l3 is not None
        if l3 is not None:
            core.config = with_l3(core.config, l3)
            core.planes = planes(l3.hash_seed, l3.hash_tables, l3.hash_bits, core.config.model.head_dim)
    yield
    for core, kept in zip(cores, before, strict=True):
        core.config, core.recalls, core.planes = kept


# --- recall of the hash


def passkey_rows(config: Config, tokenizer: Tokenizer) -> torch.Tensor:
    """[4, S] prompts long enough to choose among CANDIDATES chunks."""
    slots = recall_slots(config)
    task = Passkey(lambda text: len(tokenizer.encode([text])[0]), slots + 16)
    rng = Random(config.training.seed + 1)  # noqa: S311
    ids = tokenizer.encode([task.trial(rng).prompt for _ in range(4)])
    return torch.tensor([row[:slots] for row in ids])


def text_rows(config: Config, tokenizer: Tokenizer) -> torch.Tensor:
    """[4, S] tokens of Python's own sources."""
    slots = recall_slots(config)
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "shutil.py", "typing.py")
    ids = tokenizer.encode([(folder / name).read_text(encoding="utf-8")[: 8 * slots] for name in names])
    return torch.tensor([row[:slots] for row in ids])


def recall_slots(config: Config) -> int:
    l1 = config.memory_hierarchy.l1
    return min(2 * CANDIDATES * l1.chunk_size, config.model.max_position_embeddings)


@torch.no_grad()
def recall_table(model: GPT, config: Config, tokens: torch.Tensor) -> dict[str, float]:
    """recall@RECALLED of the hash against exact selection, by code, over the model's own queries and keys."""
    layers: list[LayerInputs] = []

    def keep(core: torch.nn.Module, inputs: tuple) -> None:
        q, k, _, _, _, q_norm, k_norm, key_bias = inputs
        q, k = (x if norm is None else norm(x) for x, norm in ((q, q_norm), (k, k_norm)))
        layers.append(LayerInputs(q.transpose(0, 1), k.transpose(0, 1), key_bias))

    model.eval()
    hooks = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, VariantCore)]
    documents = Documents.unpacked(*tokens.shape)
    model(tokens, documents)
    for hook in hooks:
        hook.remove()
    l1 = config.memory_hierarchy.l1
    recalls = hash_recall(
        layers, documents, Chunks.of(documents, l1.chunk_size), window_chunks=(l1.window or 0) // l1.chunk_size,
        recalled=RECALLED, candidates=CANDIDATES, codes=CODES, seed=config.memory_hierarchy.l3.hash_seed,
    )  # fmt: skip
    return {f"{bits} bits x {tables}": value for (bits, tables), value in zip(CODES, recalls, strict=True)}


def table(figures: dict) -> str:
    """Both tables in Markdown."""
    places = list(next(iter(figures["by_windows_back"].values())))
    lines = ["", "| passkey | all | " + " | ".join(f"{place} windows back" for place in places) + " |"]
    lines.append("| --- |" + " --: |" * (len(places) + 1))
    for name, cells in figures["by_windows_back"].items():
        parts = [f"{cells[place][0]}/{cells[place][1]}" for place in places]
        lines.append(f"| {name} | {100 * figures['accuracy'][name]:.1f}% | " + " | ".join(parts) + " |")
    lines += ["", f"| hash recall@{RECALLED} | " + " | ".join(figures["recall"]) + " |"]
    lines.append("| --- |" + " --: |" * len(figures["recall"]))
    for code in next(iter(figures["recall"].values())):
        lines.append(f"| {code} | " + " | ".join(f"{rows[code]:.3f}" for rows in figures["recall"].values()) + " |")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in figures["training_core_seconds"].items())
    return "\n".join([*lines, "", f"{figures['parameters']:,} parameters; training on one core: {seconds}"])


if __name__ == "__main__":
    sys.exit(main())
