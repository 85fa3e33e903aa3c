"""Worker: the perplexity of every case's directory and some greedy tokens through each back end, one process, in JSON.

python evaluate_worker.py DIRECTORY OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import mka_megatron.hf as hf
from mka_megatron.config.load import load_config
from mka_megatron.data.tokenizer import load_tokenizer
from mka_megatron.evaluation import perplexity
from mka_megatron.evaluation.results import Results
from mka_megatron.hf.language_model import HFModel
from mka_megatron.inference.language_model import MegatronModel
from mka_megatron.memory.generation import open_pages
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from tests.helpers.evaluated import Plain

BLOCK = ["data.pad_documents_to_chunks=true", "memory_hierarchy.l1.chunk_size=8", "memory_hierarchy.l1.window=16",
         "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2"]  # fmt: skip
CASES = {
    "gqa": ["attention.variant=gqa"],
    "fastmka": ["attention.variant=fastmka"],
    "blockmka": ["attention.variant=blockmka", *BLOCK],
}
TEXTS = ["The grass is green. The sky is blue. There and back again. " * 9, "Here we go. Short.", "VAR ABC = 12345 " * 20]
PROMPTS = ["The grass is green. The sky", "What is the pass key? The pass key is", "x"]
LENGTH, STRIDE, SLOTS = 96, 64, 40


def figures(model: Any, directory: str, out: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(directory)
    results = Results(Path(out), {})
    documents = [perplexity.Document(str(i), text) for i, text in enumerate(TEXTS)]
    perplexity.evaluate(model, tokenizer, documents, results, length=LENGTH, stride=STRIDE, batch=2)
    prompts = tokenizer.encode(PROMPTS)
    greedy = model.greedy(prompts, 12)
    stop = [greedy[0][4]]
    return {
        "nats": [record["nats"] for record in results.records.values()],
        "tokens": sum(record["scored"] for record in results.records.values()),
        "greedy": greedy, "stopped": model.greedy(prompts, 12, stop=stop),
        "later": model.greedy(prompts, 12, stop=[row[0] for row in greedy], at_least=3),
    }  # fmt: skip


def main(directory: str, out: str) -> None:
    found: dict[str, dict[str, Any]] = {}
    topology = groups.initialize(load_config([]).parallel)
    for name, case in CASES.items():
        config = load_config((), [f"model.init_from={directory}", *case])
        model = build_model(config, topology, config.model.vocab_size).double().eval()
        store = open_pages(config, torch.float64, topology.device, run=f"test-{name}")
        back_ends: dict[str, Any] = {"megatron": MegatronModel(model, config, topology, store, SLOTS)}
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        back_ends["patched"] = HFModel(hf.patch_model(loaded, config), SLOTS)
        if name == "gqa":
            plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
            back_ends["transformers"] = HFModel(plain, SLOTS)
            back_ends["whole"] = Plain(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64))
        found[name] = {
            end: figures(each, directory, f"{out}.{name}.{end}") for end, each in back_ends.items()
        }
        if store is not None:
            store.close()
    groups.destroy()
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
