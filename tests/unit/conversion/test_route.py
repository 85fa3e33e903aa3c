"""What an import adds is what the Megatron model has."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.config.load import load_attention, load_config
from mka_megatron.conversion.families import is_added
from mka_megatron.conversion.importing import import_model
from mka_megatron.conversion.route import route_tensors
from mka_megatron.memory.documents import Documents
from tests.helpers.hf_checkpoints import SHAPE, TOKENS, random_model, save

L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l1.chunk_size=8"]
CASES = {
    "fastmka": ["attention.variant=fastmka"],
    "one decay per head": ["attention.variant=fastmka", "memory_hierarchy.l2.decay=head"],
    "fixed decays, gate on x": ["attention.variant=fastmka", "memory_hierarchy.l2.decay=fixed", "routing.gate_input=x"],
    "means, a route per group": ["attention.variant=mka", "memory_hierarchy.l2.summary=mean", "routing.scope=group", *L3],
    "group routes of x": ["attention.variant=mka", "routing.scope=group", "routing.gate_input=x", *L3],
    "block core": ["attention.variant=blockmka", "memory_hierarchy.l1.window=96", *L3, "memory_hierarchy.l3.hash_tables=2"],
    "fused block core": ["attention.variant=fastmka", "attention.core=block", "memory_hierarchy.l1.window=96", *L3],
    "no levels": ["attention.variant=fastmka", "memory_hierarchy.l2.enabled=false"],
}
RUN = ["data.sequence_length=96", "data.pad_documents_to_chunks=true", "memory_hierarchy.l1.chunk_size=8"]


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_first_values_are_megatron_s(case, tmp_path, topology):
    from mka_megatron.model.build import build_model

    save(random_model("qwen2"), tmp_path / "x")
    config = load_attention(tmp_path / "x", [], CASES[case])
    model = build_model(load_config([], [f"model.init_from={tmp_path / 'x'}", *CASES[case], *RUN]), topology, SHAPE["vocab_size"])
    for layer in range(SHAPE["num_hidden_layers"]):
        found = route_tensors(config, layer, torch.Generator().manual_seed(0))
        core = f"decoder.layers.{layer}.self_attention.core_attention."
        theirs = {name.removeprefix(core): tensor for name, tensor in model.state_dict().items()
                  if name.startswith(core) and tensor is not None}
        assert all(is_added(name) for name in found)
        ours = {name.removeprefix(f"model.layers.{layer}.self_attn."): tensor for name, tensor in found.items()}
        assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}
        for name, tensor in ours.items():
            if name.endswith((".fc1", "gate.fc2")) and theirs[name].any():
                ratio = (tensor.std() / theirs[name].std()).item()  # drawn alike, from another stream
                assert 0.5 < ratio < 2
            else:
                assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_an_import_trains_from_the_original_s_function(tmp_path, topology):
    """Imported directory -> Megatron: the logits are those of the plain model, and every blend has a gradient."""
    from mka_megatron.model.build import build_model

    save(random_model("qwen2"), tmp_path / "x")
    import_model(tmp_path / "x", tmp_path / "ours", seed=5)

    def model(directory, *overrides):
        return build_model(load_config([], [f"model.init_from={directory}", *overrides, *RUN[:1]]), topology, SHAPE["vocab_size"])

    ours, plain = model(tmp_path / "ours"), model(tmp_path / "x", "attention.variant=gqa")
    documents = Documents.unpacked(*TOKENS.shape)
    with torch.no_grad():
        assert torch.equal(ours.eval()(TOKENS, documents), plain.eval()(TOKENS, documents))
    gate = next(tensor for name, tensor in ours.named_parameters() if name.endswith("layers.1.self_attention.core_attention.route.gate.fc1"))
    generator = torch.Generator().manual_seed(5)
    config = load_attention(tmp_path / "x")
    drawn = [route_tensors(config, layer, generator) for layer in range(2)]
    assert torch.equal(gate, drawn[1]["model.layers.1.self_attn.route.gate.fc1"])
    ours.train()(TOKENS, documents, TOKENS.roll(-1, 1)).sum().backward()
    betas = [parameter for name, parameter in ours.named_parameters() if name.endswith("route.beta")]
    assert len(betas) == SHAPE["num_hidden_layers"] and all(beta.grad.abs().item() > 0 for beta in betas)
