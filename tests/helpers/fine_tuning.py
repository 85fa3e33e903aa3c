"""A tiny Hugging Face model with its own tokenizer, and text to fine-tune it on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mka_megatron.data.tokenizer import train_bpe

SHAPE = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}


class FineTuning:
    """A folder with a model, a text file of several documents and a configuration over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sources = sorted((Path(sysconfig.get_paths()["stdlib"]) / "asyncio").glob("*.py"))
        text = [path.read_text() for path in sources]
        self.model = folder / "model"
        self.model.mkdir()
        train_bpe(text, SHAPE["vocab_size"], str(self.model))
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).save_pretrained(self.model)
        for name, part in (("train", text[:-4]), ("valid", text[-4:])):
            (folder / name).mkdir()
            for number, document in enumerate(part):
                (folder / name / f"{number:02d}.txt").write_text(document[:3000])
        (folder / "valid" / "short.txt").write_text("import asyncio\n")
        self.config = folder / "config.yaml"
        self.config.write_text(f"""
model: {{init_from: {self.model}}}
attention: {{variant: fastmka}}
routing: {{gate_hidden_size: 8}}
data: {{train: {folder / "train"}, valid: {folder / "valid"}, sequence_length: 64, cache_dir: {folder / "cache"}, workers: 1}}
precision: fp32
batch_size: 2
gradient_accumulation: 2
max_steps: 6
warmup_steps: 2
learning_rate: 3e-3
log_steps: 2
""")
