"""The whole model looks neither ahead nor into other documents: not one bit of a logit changes."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.config.load import load_config
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model

VOCAB, SEQUENCE, BOUNDARY = 192, 48, 20  # the boundary is one of chunks of 4
TINY = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.init_std=0.2", "data.sequence_length=48",
    "attention.mla.kv_lora_rank=16", "attention.mla.qk_rope_head_dim=8", "routing.gate_hidden_size=16",
]  # fmt: skip
L3 = ["data.pad_documents_to_chunks=true", "memory_hierarchy.l1.chunk_size=4", "memory_hierarchy.l3.enabled=true",
      "memory_hierarchy.l3.recalled_chunks=2"]  # fmt: skip
BLOCK = [*L3, "memory_hierarchy.l1.window=8"]
CASES = {
    "mha": ["attention.variant=mha"],
    "mqa": ["attention.variant=mqa"],
    "gqa": ["attention.variant=gqa"],
    "mla": ["attention.variant=mla"],
    "mka-output": ["attention.variant=mka"],
    "mka-score": ["attention.variant=mka", "attention.mixture=score"],
    "fastmka": ["attention.variant=fastmka"],
    "blockmka": ["attention.variant=blockmka", *BLOCK],
    "blockmka-exact-group": ["attention.variant=blockmka", *BLOCK, "memory_hierarchy.l3.selection=exact",
                             "routing.scope=group"],
    "blockmka-local": ["attention.variant=blockmka", *BLOCK, "memory_hierarchy.l3.enabled=false"],
    "fastmka-block": ["attention.variant=fastmka", "attention.core=block", *BLOCK],
    "fastmka-l3": ["attention.variant=fastmka", *L3],
    "mka-output-l3": ["attention.variant=mka", *L3],
    "mka-score-l3": ["attention.variant=mka", "attention.mixture=score", *L3, "memory_hierarchy.l2.enabled=false"],
    "fastmka-x-mean": ["attention.variant=fastmka", "routing.gate_input=x", "memory_hierarchy.l2.summary=mean"],
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def model(request, topology):
    return build_model(load_config([], [*TINY, *CASES[request.param]]), topology, VOCAB).eval()


def logits(model, tokens):
    starts = torch.zeros(1, SEQUENCE, dtype=torch.bool)
    starts[0, [0, BOUNDARY]] = True
    with torch.no_grad():
        return model(tokens, Documents.from_starts(starts))


TOKENS = torch.randint(0, VOCAB, (1, SEQUENCE), generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("changed", [1, BOUNDARY - 1, BOUNDARY + 1, 33, SEQUENCE - 1])
def test_a_token_changes_no_earlier_logit(model, changed):
    other = TOKENS.clone()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    before, after = logits(model, TOKENS), logits(model, other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_a_document_changes_no_other_document(model):
    first, second = TOKENS.clone(), TOKENS.clone()
    first[0, :BOUNDARY] = TOKENS[0, :BOUNDARY].flip(0)
    second[0, BOUNDARY:] = TOKENS[0, BOUNDARY:].flip(0)
    plain = logits(model, TOKENS)
    assert torch.equal(plain[:, BOUNDARY:], logits(model, first)[:, BOUNDARY:])
    assert torch.equal(plain[:, :BOUNDARY], logits(model, second)[:, :BOUNDARY])
