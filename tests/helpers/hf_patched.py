"""Tiny Hugging Face models with our attention, and the configurations that they are tested in."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import mka_megatron.hf as hf
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from tests.helpers.hf_checkpoints import random_model

CHUNK = 8
_CHUNKS = ["data.pad_documents_to_chunks=true", f"memory_hierarchy.l1.chunk_size={CHUNK}"]
_L3 = [*_CHUNKS, "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2"]
_BLOCK = ["attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.window=16"]
VARIANTS = {
    "gqa": ["attention.variant=gqa"],
    "mka": ["attention.variant=mka"],
    "mka by score": ["attention.variant=mka", "attention.mixture=score"],
    "mka with L3": ["attention.variant=mka", *_L3],
    "fastmka": ["attention.variant=fastmka", "routing.scope=group"],
    "fastmka of the mean": ["attention.variant=fastmka", "memory_hierarchy.l2.summary=mean", "routing.gate_input=x"],
    "fastmka with L3": ["attention.variant=fastmka", "memory_hierarchy.l2.decay=fixed", *_L3],
    "fastmka over blocks": [*_BLOCK, *_L3],
    "blockmka": ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", *_L3],
    "blockmka without L3": ["attention.variant=blockmka", "memory_hierarchy.l1.window=8", *_CHUNKS],
    "blockmka, exact selection": ["attention.variant=blockmka", "memory_hierarchy.l1.window=8", *_L3,
                                  "memory_hierarchy.l3.selection=exact"],
}  # fmt: skip
"""Name -> overrides, far from the models' exact modes."""
EXACT = {
    "gqa": VARIANTS["gqa"],
    "mka": VARIANTS["mka"],
    "mka with L3": VARIANTS["mka with L3"],
    "fastmka": VARIANTS["fastmka"],
    "fastmka with L3": VARIANTS["fastmka with L3"],
    "fastmka over blocks": [*_BLOCK[:2], "memory_hierarchy.l1.window=128", *_L3],
    "blockmka": ["attention.variant=blockmka", "memory_hierarchy.l1.window=128", *_L3],
}
"""Those whose outputs right after the patch are the unpatched model's."""


def config(overrides: list[str]) -> Config:
    return load_config([], ["data.sequence_length=96", *overrides])


def patched(family: str, overrides: list[str], stirred: bool = True) -> PreTrainedModel:
    """A random model with our attention, its routes far from their function-preserving start where `stirred`."""
    model = hf.patch_model(random_model(family), config(overrides))
    return stir(model) if stirred else model


def stir(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".route." in name:
                center = 0.7 if name.endswith("beta") else 1.0 if "decay" in name else 0.0
                parameter.copy_(center + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model
