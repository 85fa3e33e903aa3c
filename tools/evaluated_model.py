"""The model that is evaluated, behind any of the three back ends, and its tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, refuse
from mka_megatron.config.load import load_attention, load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mka_megatron.evaluation.language_model import Begun, LanguageModel
from tools.megatron_model import built, for_inference, name_of, newest, of_checkpoint, tokenizer_path

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Evaluated:
    """A model to ask."""

    model: LanguageModel
    tokenizer: Tokenizer
    name: str
    """For tables."""
    identity: dict[str, Any]
    """What its answers depend on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that name the model."""
    group = parser.add_argument_group("model")
    group.add_argument("--hf", metavar="DIR", help="evaluate a Hugging Face directory or name in transformers")
    group.add_argument(
        "--patch", action="store_true", help="give the model of --hf the attention of the configuration"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, help="of --hf (default: as saved); else training.precision"
    )
    group.add_argument("--recalled", type=int, metavar="R", help="chunks that L3 recalls (default: the model's own)")
    group.add_argument(
        "--no-beginning", action="store_true", help="leave out the tokens that the model's tokenizer puts before a text (Llama's)"
    )
    group.add_argument("--prefill-slots", type=int, default=1024, help="slots of a forward pass, all rows together")
    group.add_argument("config", nargs="*", help="configuration files and section.key=value overrides")


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Evaluated]:
    """The model that the arguments name, for as long as the context lasts. Raises ConfigError and its kind."""
    files = [a for a in arguments.config if "=" not in a]
    overrides = [a for a in arguments.config if "=" in a]
    if arguments.prefill_slots < 1:
        raise ConfigError(f"--prefill-slots is {arguments.prefill_slots}; give at least 1.")
    if arguments.recalled is not None and arguments.recalled < 1:
        raise ConfigError(f"--recalled is {arguments.recalled}; give at least 1.")
    if arguments.hf is None:
        if arguments.patch or arguments.precision:
            raise ConfigError("--patch and --precision go with --hf: name the Hugging Face directory there.")
        with _megatron(arguments, files, overrides) as found:
            yield found
    elif (files or overrides) and not arguments.patch:
        raise ConfigError(f"{(files + overrides)[0]} is given with --hf: add --patch to give the model that configuration's "
                          "attention, or leave it out.")  # fmt: skip
    else:
        yield _transformers(arguments, files, overrides)


@contextmanager
def _megatron(arguments: argparse.Namespace, files: list[str], overrides: list[str]) -> Iterator[Evaluated]:
    # nothing is packed here: how training lays out documents is not asked for
    config = for_inference(load_config(files, ["data.reset_at_documents=false", *overrides]))
    from mka_megatron.inference.language_model import MegatronModel
    from mka_megatron.memory.generation import open_pages
    from mka_megatron.model.build import DTYPES
    from mka_megatron.parallel import groups
    from mka_megatron.training.host import use_cores

    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    topology = groups.initialize(config.parallel, config.engine.timeout_seconds)
    store = None
    try:
        checkpoint = None if config.model.init_from else newest(config)
        if checkpoint is not None:
            config = of_checkpoint(config, checkpoint)
        config = _recalling(config, arguments)
        tokenizer = load_tokenizer(str(tokenizer_path(config, checkpoint)))
        model = built(config, topology, tokenizer, checkpoint)
        dtype = DTYPES[config.training.precision]
        store = open_pages(config, dtype, topology.device, run=name_of(topology), rank=topology.rank)
        directory = str(config.model.init_from) if checkpoint is None else str(checkpoint.path)
        identity = {
            "weights": directory, "of": _print_of(Path(directory)), "precision": config.training.precision,
            "attention": _sections(config), "tokenizer": tokenizer.fingerprint, "back_end": "megatron",
        }  # fmt: skip
        named = Path(directory).name if checkpoint is None else f"{checkpoint.path.parent.parent.name} at step {checkpoint.step}"
        name = f"{named} ({config.attention.variant})"
        asked = MegatronModel(model, config, topology, store, arguments.prefill_slots)
        yield _begun(asked, arguments, tokenizer, name, identity)
    finally:
        if store is not None:
            store.close()
        groups.destroy()


def _transformers(arguments: argparse.Namespace, files: list[str], overrides: list[str]) -> Evaluated:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from mka_megatron.hf import patch_model
    from mka_megatron.hf.language_model import HFModel
    from mka_megatron.hf.training_model import locate

    logging.disable_progress_bar()
    directory = locate(arguments.hf)
    dtype: Any = "auto" if arguments.precision is None else getattr(torch, PRECISIONS[arguments.precision])
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if not arguments.patch:
            _recall_in_place(config, arguments)
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise refuse("--hf", arguments.hf, f"transformers cannot load it ({reason}); copy the model again") from None
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        raise refuse("--hf", arguments.hf, f"its files have no usable tensor {lacking[0]}; copy the model again")
    name, attention = Path(arguments.hf).name, getattr(config, "mka", None)
    if arguments.patch:
        wanted = _recalling(load_attention(directory, files, overrides), arguments)
        model, attention = patch_model(model, wanted), _sections(wanted)
        name = f"{name}, patched ({wanted.attention.variant})"
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(directory, "--hf")
    identity = {"weights": arguments.hf, "of": _print_of(Path(directory)), "precision": str(model.dtype).removeprefix("torch."),
                "attention": attention, "tokenizer": tokenizer.fingerprint, "back_end": "transformers"}  # fmt: skip
    return _begun(HFModel(model, arguments.prefill_slots), arguments, tokenizer, name, identity)


def _begun(
    model: LanguageModel, arguments: argparse.Namespace, tokenizer: Tokenizer, name: str, identity: dict[str, Any]
) -> Evaluated:
    first = [] if arguments.no_beginning else beginning(tokenizer.name)
    return Evaluated(Begun(model, first) if first else model, tokenizer, name, identity | {"beginning": first})


def beginning(tokenizer: str) -> list[int]:
    """The ids that the tokenizer of a directory puts before every text by itself; none for SentencePiece's files."""
    if tokenizer.endswith(".model"):
        return []
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    whole, bare = loaded("a")["input_ids"], loaded("a", add_special_tokens=False)["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _recalling(config: Config, arguments: argparse.Namespace) -> Config:
    memory = config.memory_hierarchy
    recalled = _recalled(arguments, memory.l3.enabled)
    if recalled is None:
        return config
    memory = dataclasses.replace(memory, l3=dataclasses.replace(memory.l3, recalled_chunks=recalled))
    return dataclasses.replace(config, memory_hierarchy=memory)


def _recall_in_place(config: Any, arguments: argparse.Namespace) -> None:
    """The same for a configuration of transformers."""
    l3 = (getattr(config, "mka", None) or {}).get("memory_hierarchy", {}).get("l3", {})
    recalled = _recalled(arguments, bool(l3.get("enabled")))
    if recalled is not None:
        l3["recalled_chunks"] = recalled


def _recalled(arguments: argparse.Namespace, recalls: bool) -> int | None:
    """Chunks that L3 is to recall; None: as many as the model says."""
    if recalls:
        return arguments.recalled or arguments.recalled_by_protocol
    if arguments.recalled is not None:
        raise refuse("--recalled", arguments.recalled, "the model recalls nothing (memory_hierarchy.l3.enabled is false); "
                     "leave it out")  # fmt: skip
    return None


def _sections(config: Config) -> dict[str, Any]:
    from mka_megatron.config.hf_sections import to_json

    return to_json(config)


def _print_of(directory: Path) -> str:
    """Changes when a file of `directory` does."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    described = [(str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
