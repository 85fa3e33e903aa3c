"""A Megatron model whose layers were told to use the kernels, their threads on the host: whole rows and segments."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from mka_megatron.attention.backends import Backends
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.ops import block_attention
from mka_megatron.training.segments import Segments
from tests.helpers.host_block_attention import run_on_host as run_blocks_on_host
from tests.helpers.host_kernels import register_recall
from tests.helpers.host_route_fuse import run_on_host
from tests.helpers.numerics import assert_as_accurate, assert_same
from tests.unit.kernels.test_wiring import BLOCKS, FUSION, RECALL, Recorded, eager

VOCAB, BATCH, CHUNK, CHUNKS = 96, 2, 64, 6
SHAPE = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=64", f"model.max_position_embeddings={CHUNK * CHUNKS}", "model.init_std=0.3",
    f"data.sequence_length={CHUNK * CHUNKS}", "data.pad_documents_to_chunks=true", "training.micro_batch_size=2",
    "training.global_batch_size=2", f"memory_hierarchy.l1.chunk_size={CHUNK}", f"memory_hierarchy.l1.window={CHUNK}",
    "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=2", "routing.gate_hidden_size=8",
    "attention.variant=fastmka",
]  # fmt: skip


def in_segments(model: torch.nn.Module, config: Config, rows: Batch, topology) -> torch.Tensor:
    """The losses of rows that go through the model segment by segment."""
    training = dataclasses.replace(config.training, segment_length=2 * CHUNK)
    segments = Segments(dataclasses.replace(config, training=training), topology)
    parts = []
    with torch.no_grad():
        for part, session in segments.whole(rows):
            parts.append(model(part.tokens, part.documents, part.labels, session))
            session.commit()
    segments.close()
    return torch.cat(parts, dim=1)


def random_rows() -> Batch:
    tokens = torch.randint(0, VOCAB, (BATCH, CHUNK * CHUNKS), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens.roll(-1, 1), Documents.unpacked(BATCH, CHUNK * CHUNKS))


@pytest.mark.parametrize("core", ["dense", "block"])
def test_a_model_over_the_kernels(core: str, library: ctypes.CDLL, topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients are those of the reference; over the block core also in segments, by states that go on."""
    window = f"memory_hierarchy.l1.window={CHUNK if core == 'block' else 'null'}"
    config = load_config([], [*SHAPE, window, f"attention.core={core}"])
    rows = random_rows()
    recorded = Recorded(library)
    register_recall(recorded)  # type: ignore[arg-type]
    run_on_host(recorded, monkeypatch)  # type: ignore[arg-type]

    def run(backends: Backends) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        monkeypatch.setattr(Backends, "choose", staticmethod(lambda *_: backends))
        torch.manual_seed(0)
        model = build_model(config, topology, VOCAB)
        for parameter in model.parameters():  # biases and blends that are zero at the start hide errors
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        loss = model(rows.tokens, rows.documents, rows.labels)
        grads = list(torch.autograd.grad(loss.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True))
        if core == "dense":
            return loss.detach(), grads, None
        return loss.detach(), grads, in_segments(model, config, rows, topology)

    exact = run(Backends())
    assert recorded.called == set()
    found = run(Backends("reference", "cuda", "cuda"))
    assert recorded.called == FUSION | RECALL
    terms = 64 * CHUNK * CHUNKS
    assert_same(found[0], exact[0], terms)
    for one, other in zip(found[1], exact[1], strict=True):
        if other is not None:
            assert_same(one, other, terms, torch.stack([other.abs().max(), torch.ones(())]))
    if exact[2] is not None and found[2] is not None:
        assert_same(found[2], exact[2], terms)
        assert_same(found[2], exact[0], terms)


def test_a_bf16_model_over_all_kernels(library: ctypes.CDLL, topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block core's as well, whole rows and segments, against fp32; the peer's core is PyTorch's own in bf16.

    Every chunk that can be is recalled, so that rounding selects no others.
    """
    rows, recorded = random_rows(), Recorded(library)
    register_recall(recorded)  # type: ignore[arg-type]
    run_on_host(recorded, monkeypatch)  # type: ignore[arg-type]
    run_blocks_on_host(recorded, monkeypatch)  # type: ignore[arg-type]
    monkeypatch.setitem(block_attention.BACKENDS, "eager", eager)
    values: dict[str, torch.Tensor] = {}

    def run(precision: str, backends: Backends) -> list[torch.Tensor]:
        """Losses of the rows and of their segments, and the gradients of all parameters."""
        monkeypatch.setattr(Backends, "choose", staticmethod(lambda *_: backends))
        window, recalled = f"memory_hierarchy.l1.window={CHUNK}", f"memory_hierarchy.l3.recalled_chunks={CHUNKS}"
        config = load_config([], [*SHAPE, window, recalled, "attention.core=block", f"training.precision={precision}"])
        model = build_model(config, topology, VOCAB)
        for name, parameter in model.named_parameters():
            if name not in values:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(values)))
                values[name] = (parameter.detach() + 0.02 * noise).bfloat16()
            parameter.data.copy_(values[name])
        loss = model(rows.tokens, rows.documents, rows.labels)
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss.sum(), trained, allow_unused=True, materialize_grads=True)
        return [loss.detach().float(), in_segments(model, config, rows, topology).float(), *(g.float() for g in grads)]

    exact = run("fp32", Backends())
    peer = run("bf16", Backends("eager"))
    assert recorded.called == set()
    found = run("bf16", Backends("cuda", "cuda", "cuda"))
    assert recorded.called == FUSION | RECALL | BLOCKS
    for one, other, right in zip(found, peer, exact, strict=True):
        if right.numel() >= 512:  # the largest of a few errors is chance
            assert_as_accurate(one, other, right)
    largest = [right.abs().max() for right in exact]
    together = (
        torch.cat([(x / by).flatten() for x, by in zip(each, largest, strict=True)]) for each in (found, peer, exact)
    )
    assert_as_accurate(*together)
