"""One fuzzed configuration: the files, overrides and ranks that a seed stands for."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.config.hf_sections import add
from mka_megatron.config.schema import Config
from mka_megatron.training.deepspeed_config import build
from tests.fuzz import mutations
from tests.fuzz.mutations import KEYS, SCALARS, VALUES, Tree

CONFIGS = Path(__file__).parents[2] / "configs"
FINE_TUNING = sorted(CONFIGS.glob("*_fastmka.yaml"))
RUNS = sorted(set(CONFIGS.rglob("*.yaml")) - set(FINE_TUNING))

PLAIN_MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 192,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
}  # fmt: skip

ARGUMENTS = [
    "training", "=3", "=", "", ".=1", "training..steps=3", "training.=3", "a.b.c=1", "training.steps=1=2", " training.steps = 3 ",
    "training.steps:3", "--steps=3", "-x", "steps", "é=1", "\x00=1", "training.steps=\n3", "training=", "training=3", "model={num_layers: 2}",
    "data.train=x", "data.train[0].path=x", "data.train.0.path=x", "data.train=[x, {path: y, weight: 2}]", "model.rope.theta.x=1",
    "base=base.yaml", "training.steps=3 # c", "training.steps='3'", "Training.Steps=3", "training/steps=3", "a" * 20000 + "=1",
    ".".join(["a"] * 3000) + "=1", ".".join(["model", "rope"] * 600) + "=1", "training.output_dir=" + "d" * 3000,
    "training.output_dir=~", "training.output_dir=\u202ex", "training.steps=\t3", "memory_hierarchy.dram_staging=4",
    "memory_hierarchy.hbm_enabled=maybe", "data.sequence_length=2147483647", "model.max_position_embeddings=2147483647",
    "memory_hierarchy.l1.chunk_size=1", "training.steps=[" + "[]," * 30000 + "]",
]  # fmt: skip
"""Overrides with odd syntax."""


@dataclass
class Case:
    """What a loader is given."""

    loader: str
    """run, command, fine_tune, train_hf or attention: see `before_start.read`."""
    files: list[str] = field(default_factory=list)
    """Names in the case's folder."""
    overrides: list[str] = field(default_factory=list)
    world_size: int | None = None
    names: set[str] = field(default_factory=set)
    """What a message may name beside keys: files of the case."""


def make(rng: random.Random, folder: Path) -> Case:
    """A case, its files written into `folder`."""
    loader = rng.choices(["run", "command", "fine_tune", "train_hf", "attention"], [6, 2, 2, 1, 1])[0]
    fine = loader in ("fine_tune", "train_hf")
    root = FineTuneConfig if fine else Config
    case = Case(loader, names={"Configuration file "}, world_size=rng.choice([None, None, None, 1, 1, 1, 2, 8, 8, 512, 10**6]))
    sources = rng.choices(FINE_TUNING if fine else RUNS, k=1 if rng.random() < 0.9 else 2)
    for source in sources:
        closure = _closure(source)
        victim = rng.choice(list(closure)) if rng.random() < 0.2 else source
        for path in closure:
            relative = path.relative_to(CONFIGS)
            _write(case, folder / relative, mutated(path, rng, root) if path == victim else path.read_bytes())
        case.files.append(str(source.relative_to(CONFIGS)))
    if loader == "attention":
        _model(case, folder, rng)
    for add_one in (_bases, _model, _deepspeed, _long):
        if rng.random() < 0.05:
            add_one(case, folder, rng)
    if rng.random() < 0.3:
        case.overrides += [override(rng, root) for _ in range(rng.choice([1, 1, 2, 3]))]
    if rng.random() < 0.02:
        case.files.append(rng.choice(["none.yaml", ".", "run", "a\nb.yaml", "\ud800.yaml", "x" * 300, "a\x00b"]))
    return case


def mutated(path: Path, rng: random.Random, root: type) -> bytes:
    """A shipped file of a `root` after one to three edits."""
    text = path.read_text(encoding="utf-8")
    if (kind := rng.random()) < 0.8:
        tree, donor = shipped(path), shipped(rng.choice(RUNS + FINE_TUNING))
        for _ in range(rng.choice([1, 1, 2, 3])):
            if kind < 0.4:
                mutations.retune(tree, rng, root)
            else:
                mutations.edit_tree(tree, rng, donor)
        text = mutations.written(tree, rng)
        if rng.random() < 0.95:
            return text.encode("utf-8", "surrogatepass")
    for _ in range(rng.randint(1, 2)):
        text = rng.choice(mutations.TEXT_EDITS)(text, rng)
    return mutations.encoded(text, rng)


def override(rng: random.Random, root: type) -> str:
    """`key=value`, right or wrong."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(ARGUMENTS)
    if kind < 0.35:
        return f"{rng.choice(KEYS)}={rng.choice(SCALARS)}"
    key, value = mutations.plausible(root, rng)
    return f"{key}={json.dumps(value)}"


def shipped(path: Path) -> Tree:
    """The values of a shipped file."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) or {}


@cache
def _closure(path: Path) -> tuple[Path, ...]:
    """The file and its bases."""
    bases = shipped(path).get("base", [])
    found = [path]
    for base in [bases] if isinstance(bases, str) else bases:
        found += _closure((path.parent / base).resolve())
    return tuple(dict.fromkeys(found))


def _write(case: Case, path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    case.names.add(path.name[-60:])  # the end of a long name


def _bases(case: Case, folder: Path, rng: random.Random) -> None:
    """Bases that circle, are missing, multiply, or are not files."""
    kind = rng.choice(["circle", "self", "missing", "many", "chain", "odd", "name"])
    first = f"{kind}.yaml"
    if kind == "circle":
        for at in range(12):
            _write(case, folder / f"circle{at or ''}.yaml", f"base: circle{(at + 1) % 12 or ''}.yaml".encode())
    elif kind == "many":
        for at in range(30):
            _write(case, folder / f"many{at or ''}.yaml", f"base: [many{at + 1}.yaml, many{at + 1}.yaml]".encode())
        _write(case, folder / "many30.yaml", b"training: {steps: 400}")
    elif kind == "chain":
        for at in range(110):
            _write(case, folder / f"chain{at or ''}.yaml", f"base: chain{at + 1}.yaml".encode())
        _write(case, folder / "chain110.yaml", b"")
    elif kind == "name":
        first = rng.choice(["ü.yaml", "a b.yaml", "new\nline.yaml", "tab\t.yaml", "l" * 200 + ".yaml", "dot.", "-x.yaml", "ctrl\x07"])
        _write(case, folder / first, rng.choice([b"", b"- 1", b"training: {stepz: 1}", b"a: [", b"base: x"]))
    else:
        base = {"self": first, "missing": "nowhere.yaml"}.get(kind) or rng.choice(VALUES)
        _write(case, folder / first, yaml.safe_dump({"base": base}).encode("utf-8", "surrogatepass"))
    case.files.append(first)
    case.names.add(repr(first)[1:-1])


def _model(case: Case, folder: Path, rng: random.Random) -> None:
    """A Hugging Face directory, plain or ours, whole or not, in the place of the model section."""
    config = add(PLAIN_MODEL, Config()) if rng.random() < 0.5 else dict(PLAIN_MODEL)
    text = json.dumps(_edited(config, rng))
    _write(case, folder / "model" / "config.json", _damaged(text, rng))
    case.overrides.append(f"model.init_from={folder / 'model'}")
    if rng.random() < 0.7 and case.loader in ("run", "command"):
        _write(case, folder / "empty.yaml", b"training: {steps: 100}\n")
        case.files = ["empty.yaml"]


def _deepspeed(case: Case, folder: Path, rng: random.Random) -> None:
    """A DeepSpeed JSON of the user's."""
    _write(case, folder / "ds.json", _damaged(json.dumps(_edited(build(Config(), 1, False), rng)), rng))
    case.overrides.append(f"engine.deepspeed_config={folder / 'ds.json'}")


def _long(case: Case, folder: Path, rng: random.Random) -> None:
    """The longest row in the shortest chunks: whatever counts them one by one never ends."""
    case.overrides += ["attention.variant=blockmka", "data.reset_at_documents=false", "data.pad_documents_to_chunks=false",
                       "data.sequence_length=2147483640", "model.max_position_embeddings=2147483640",
                       f"memory_hierarchy.l1.chunk_size={rng.choice([1, 8])}", "memory_hierarchy.l1.window=8"]  # fmt: skip


def _edited(tree: Tree, rng: random.Random) -> Tree:
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(0, 2)):
        node: Any = tree
        while isinstance(node, dict) and node:
            key = rng.choice(list(node))
            if not isinstance(node[key], dict) or rng.random() < 0.3:
                edit: Callable[[], Any] = rng.choice([lambda k=key, n=node: n.pop(k), lambda k=key, n=node: n.update({k: rng.choice(VALUES[:80])}),
                                                      lambda n=node: n.update({rng.choice(["zzz", "fp16", "a.b"]): rng.choice(VALUES)})])  # fmt: skip
                edit()
                break
            node = node[key]
    return {str(key): value for key, value in tree.items()}


def _damaged(text: str, rng: random.Random) -> bytes:
    kind = rng.randrange(12)
    if kind == 0:
        text = text[: rng.randrange(len(text))]
    elif kind == 1:
        text = rng.choice(["", "[]", "3", "null", "NaN", "[" * 100000, '{"a":' * 500 + "1" + "}" * 500, '{"zero_optimization":' + '{"a":' * 900 + "1" + "}" * 901,
                           '{"zero_optimization": 3}', '{"bf16": true}', '{"zero_optimization": {"stage": {"a": 1}}}', '{"": {}}', '{"a": 1, "a": 2}'])  # fmt: skip
    elif kind == 2:
        return b"\xff\xfe" + text.encode()
    return text.encode("utf-8", "surrogatepass")
