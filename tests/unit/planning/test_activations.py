"""What the planner says a layer keeps for its backward pass is what autograd saves in a real model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mka_megatron.config.load import load_config
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.planning.activations import LayerBytes, layer_bytes
from mka_megatron.planning.steps import Layout

BATCH, SEQUENCE, VOCAB = 2, 128, 96
SHAPE = ["model.hidden_size=48", "model.ffn_hidden_size=112", "model.num_attention_heads=6", "model.num_kv_heads=2",
         "model.head_dim=16", "model.max_position_embeddings=128", "memory_hierarchy.l1.chunk_size=32",
         "routing.gate_hidden_size=24", "data.pad_documents_to_chunks=true", f"data.sequence_length={SEQUENCE}",
         f"training.micro_batch_size={BATCH}", f"training.global_batch_size={BATCH}"]  # fmt: skip
L3 = ["memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2"]
BLOCK = ["memory_hierarchy.l1.window=32", *L3]
CASES = {
    "gqa": ["attention.variant=gqa"],
    "gqa, q/k-norm": ["attention.variant=gqa", "model.qk_norm=true"],
    "gqa bf16": ["attention.variant=gqa", "training.precision=bf16"],
    "mla": ["attention.variant=mla"],
    "mka output": ["attention.variant=mka"],
    "mka score": ["attention.variant=mka", "attention.mixture=score"],
    "fastmka": [],
    "fastmka bf16": ["training.precision=bf16"],
    "fastmka, gate per head": ["routing.scope=group"],
    "fastmka, gate of the input": ["routing.gate_input=x"],
    "fastmka, L3": L3,
    "fastmka over blocks": ["attention.core=block", *BLOCK],
    "blockmka": ["attention.variant=blockmka", *BLOCK],
    "fastmka, selective": ["training.recompute=selective"],
    "fastmka, full": ["training.recompute=full"],
    "gqa, MLP by tiles": ["attention.variant=gqa", "training.mlp_tile=64"],
    "gqa, MLP in one tile": ["attention.variant=gqa", "training.mlp_tile=256"],
}
# statistics per head, indices of what is recalled, decays and small weights in fp32: nothing that grows with the model
BOUND = 0.012


def saved(overrides: Sequence[str], layers: int, topology) -> int:
    """Bytes of the tensors that a forward pass keeps, parameters aside."""
    config = load_config([], [*SHAPE, f"model.num_layers={layers}", *overrides])
    model = build_model(config, topology, VOCAB)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in parameters:
            kept[address] = tensor
        return tensor

    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, Documents.unpacked(BATCH, SEQUENCE), tokens)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return size


def planned(layer: LayerBytes, overrides: Sequence[str]) -> float:
    if "training.recompute=full" in overrides:
        return layer.boundary
    return layer.selective if "training.recompute=selective" in overrides else layer.whole


@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_is_planned(case: str, topology) -> None:
    overrides = CASES[case]
    measured = (saved(overrides, 3, topology) - saved(overrides, 1, topology)) / 2 / (BATCH * SEQUENCE)
    layer = layer_bytes(load_config([], [*SHAPE, *overrides]), Layout(1, 1, 1), "cpu")
    assert planned(layer, overrides) == pytest.approx(measured, rel=BOUND)


def test_tensor_and_sequence_parallel_ranks_share_a_layer() -> None:
    """gqa in bf16 on a GPU, by hand: h=48, f=112, H=6, G=2, d=16, two ranks."""
    half = ["attention.variant=gqa", "training.precision=bf16", "parallel.tensor_parallel=2"]
    config = load_config([], [*SHAPE, *half], world_size=2)
    # two norms of 2 x 48 bf16 and an fp32 statistic; 3 x 56 of the MLP; (48 + 2 x 16) projected
    outside = 2 * (2 * 48 * 2 + 4) + 3 * 56 * 2 + (48 + 2 * 16) * 2
    # rotated queries, keys, outputs, logsumexps, rotary tables in bf16 for both
    core = 48 * 2 + 16 * 2 + 48 * 2 + 3 * 4 + 2 * 16 * 4
    assert layer_bytes(config, Layout(2, 1, 1), "cuda").whole == outside + core
    shared = load_config([], [*SHAPE, *half, "parallel.sequence_parallel=true"], world_size=2)
    assert layer_bytes(shared, Layout(2, 1, 1), "cuda").whole == outside + core - (2 * 48 * 2 + 4)
    assert layer_bytes(shared, Layout(2, 1, 1), "cuda").boundary == 48
