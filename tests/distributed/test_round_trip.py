"""The whole way by the commands that users type: a Hugging Face model, MKA put in, trained on two tensor-parallel ranks
under ZeRO-3, exported, and generating elsewhere what it generates here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import hf_checkpoints, tokenizers
from tests.helpers.launch import ROOT, free_port

WORDS = [f"w{number}" for number in range(190)]
PROMPT = " ".join(WORDS[(7 * place * place) % 150 + 3] for place in range(45))
NEW = 24
ATTENTION = [
    "attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.chunk_size=8", "memory_hierarchy.l1.window=16",
    "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2", "routing.gate_hidden_size=16",
]  # fmt: skip
TRAINING = [
    *ATTENTION, "data.format=pretrain", "data.sequence_length=64", "data.pad_documents_to_chunks=true", "data.workers=1",
    "data.valid_fraction=0.2", "parallel.tensor_parallel=2", "engine.zero_stage=3", "training.steps=20",
    "training.warmup_steps=2", "training.micro_batch_size=2", "training.global_batch_size=2", "training.learning_rate=1e-2",
    "training.min_learning_rate=1e-3", "training.eval_interval=0", "training.eval_batches=1", "training.save_interval=0",
]  # fmt: skip
ELSEWHERE = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mka_megatron":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer(sys.argv[2], return_tensors="pt", add_special_tokens=False)
made = model.generate(**ids, max_new_tokens=int(sys.argv[3]), do_sample=False, pad_token_id=0)
print(tokenizer.decode(made[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def run(*command: object, ranks: int = 0, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """Run Python with `command`, under torchrun for `ranks`; its standard output."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=cwd, env=environment or variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.parametrize("family", ["qwen2-tied"])
def test_a_model_comes_back_and_says_the_same(family: str, tmp_path: Path) -> None:
    plain, ours, exported, tokenizer = (tmp_path / name for name in ("plain", "ours", "exported", "tokenizer"))
    hf_checkpoints.save(hf_checkpoints.random_model(family), plain)
    tokenizers.words(tokenizer, WORDS)
    texts = tmp_path / "texts.jsonl"
    with texts.open("w") as file:
        for number in range(60):
            words = [WORDS[(number + 3 * place * (number % 5 + 1)) % 150 + 3] for place in range(40 + number)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")

    convert = ROOT / "tools" / "convert_hf.py"
    run(convert, "import", plain, ours, *ATTENTION)
    out = tmp_path / "run"
    run(
        "-m", "mka_megatron.training", f"model.init_from={ours}", f"data.tokenizer={tokenizer}", f"data.train=[{texts}]",
        f"data.cache_dir={tmp_path / 'cache'}", f"training.output_dir={out}", *TRAINING, ranks=2,
    )  # fmt: skip
    [checkpoint] = (out / "checkpoints").glob("step-*")
    run(convert, "export", checkpoint, exported)

    generate = ROOT / "tools" / "generate.py"
    said = run(
        generate, f"training.output_dir={out}", "parallel.tensor_parallel=2", "--prompt", PROMPT, "--max-new-tokens", NEW,
        ranks=2,
    ).strip()  # fmt: skip
    assert len(said.split()) > 5
    for directory, same in ((exported, True), (ours, False)):
        here = run(
            generate, f"model.init_from={directory}", f"data.tokenizer={tokenizer}", "data.sequence_length=64",
            "--prompt", PROMPT, "--max-new-tokens", NEW,
        )  # fmt: skip
        assert (here.strip() == said) == same, "training changes what the model says, the export does not"

    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    bare |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    elsewhere = run("-I", "-c", ELSEWHERE, exported, PROMPT, NEW, cwd=tmp_path, environment=bare)
    assert elsewhere.strip() == said
