"""The routes are those of the Megatron model: names, shapes, values; and so are the logits."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.attention.registry import VARIANTS as REGISTRY
from mka_megatron.config.load import load_config
from mka_megatron.hf.configuration import run_config
from mka_megatron.hf.route import Route
from mka_megatron.memory.documents import Documents
from tests.helpers.hf_checkpoints import SHAPE, TOKENS
from tests.helpers.hf_patched import VARIANTS, patched
from tests.helpers.numerics import assert_same

GATES = [["routing.scope=token"], ["routing.scope=group"], ["routing.gate_input=x"],
         ["routing.gate_input=x", "routing.scope=group"]]  # fmt: skip
DECAYS = [["memory_hierarchy.l2.decay=fixed"], ["memory_hierarchy.l2.decay=head"], ["memory_hierarchy.l2.summary=mean"], []]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("variant", ["mka", "fastmka over blocks"])
def test_routes_equal_megatron_s(variant, decay, gate, topology):
    from mka_megatron.model.core_attention import Route as MegatronRoute

    model = patched("qwen2", [*(o for o in VARIANTS[variant] if "decay" not in o), *gate, *decay])
    ours = model.model.layers[0].self_attn.route
    config = run_config(model.config)
    entry = REGISTRY[config.attention.variant]
    theirs = MegatronRoute(config, entry.levels(config), entry.core_levels(config), topology.tp_group, torch.float32)
    assert isinstance(ours, Route)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    theirs.load_state_dict(ours.state_dict())
    q, x = torch.randn(2, 5, 8, 8), torch.randn(2, 5, SHAPE["hidden_size"])
    for one, other in zip(ours(q, x), theirs(q.transpose(0, 1), x.transpose(0, 1)), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            # the products are the same, in another order of rows
            assert_same(one.detach(), other.detach(), SHAPE["hidden_size"])


@pytest.mark.parametrize(("variant", "family"), [*((name, "qwen2") for name in VARIANTS), ("mka with L3", "qwen3"),
                                                 ("fastmka over blocks", "llama-tied")])  # fmt: skip
def test_logits_equal_megatron_s(variant, family, tmp_path, topology):
    from mka_megatron.model.build import build_model

    model = patched(family, VARIANTS[variant])
    model.save_pretrained(tmp_path)
    config = load_config([], [f"model.init_from={tmp_path}", "data.sequence_length=128",
                              "data.pad_documents_to_chunks=true"])  # fmt: skip
    theirs = build_model(config, topology, config.model.vocab_size).eval()
    with torch.no_grad():
        assert_same(model(TOKENS).logits, theirs(TOKENS, Documents.unpacked(*TOKENS.shape)), 4 * SHAPE["hidden_size"])
