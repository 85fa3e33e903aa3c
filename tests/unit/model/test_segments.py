"""A model that goes over its rows in segments computes what it computes over the whole rows."""

from __future__ import annotations

import dataclasses
from itertools import islice

import pytest
import torch

from mka_megatron.config.load import load_config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import DTYPES, build_model
from mka_megatron.training.segments import Segments
from tests.helpers.numerics import assert_bitwise, assert_same

VOCAB, BATCH, SEQUENCE, CHUNK = 96, 2, 256, 16
SHAPE = [
    "model.num_layers=2", "model.hidden_size=48", "model.ffn_hidden_size=64", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.max_position_embeddings=256", "model.init_std=0.3",
    f"data.sequence_length={SEQUENCE}", "data.pad_documents_to_chunks=true", "training.micro_batch_size=2",
    "training.global_batch_size=2", f"memory_hierarchy.l1.chunk_size={CHUNK}", "memory_hierarchy.l1.window=48",
    "memory_hierarchy.l3.enabled=true", "memory_hierarchy.l3.recalled_chunks=3", "routing.gate_hidden_size=8",
]  # fmt: skip
CASES = {
    "blockmka": ["attention.variant=blockmka"],
    "blockmka group": ["attention.variant=blockmka", "routing.scope=group"],
    "blockmka exact": ["attention.variant=blockmka", "memory_hierarchy.l3.selection=exact"],
    "blockmka qk-norm": ["attention.variant=blockmka", "model.qk_norm=true"],
    "local": ["attention.variant=blockmka", "memory_hierarchy.l3.enabled=false"],
    "fastmka": ["attention.variant=fastmka", "attention.core=block"],
    "fastmka top2": ["attention.variant=fastmka", "attention.core=block", "routing.mode=top2"],
}


def batch(packed: bool) -> Batch:
    """Random rows: one document each, or several with early-closed chunks and a padded tail."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator)
    if not packed:
        return Batch(tokens, labels, Documents.unpacked(BATCH, SEQUENCE))
    starts, padding = torch.zeros(2, BATCH, SEQUENCE, dtype=torch.bool).unbind(0)
    starts[:, 0] = starts[0, 5 * CHUNK] = starts[1, 6 * CHUNK] = starts[1, 8 * CHUNK] = True
    for row, chunk, tokens_left in ((0, 1, 3), (0, 9, 11), (1, 5, 1), (1, 11, 5)):
        padding[row, chunk * CHUNK + tokens_left : (chunk + 1) * CHUNK] = True
    padding[1, -3 * CHUNK :] = True
    return Batch(tokens, labels.masked_fill(padding, IGNORE), Documents.from_starts(starts, padding))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_segments_compute_what_whole_rows_compute(case: str, packed: bool, topology, monkeypatch) -> None:
    """fp64, so that the same selections are made; the losses agree to roundoff."""
    config = load_config([], [*SHAPE, *CASES[case]])
    model = build_model(config, topology, VOCAB).double()
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)  # of the pages
    for parameter in model.parameters():  # biases and blends that are zero at the start hide errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    rows = batch(packed)
    with torch.no_grad():
        exact = model(rows.tokens, rows.documents, rows.labels)
        for length in (CHUNK, 4 * CHUNK):
            training = dataclasses.replace(config.training, segment_length=length)
            segments = Segments(dataclasses.replace(config, training=training), topology)
            parts = []
            for part, session in segments.whole(rows):
                parts.append(model(part.tokens, part.documents, part.labels, session))
                session.commit()
            segments.close()
            assert_same(torch.cat(parts, dim=1), exact, terms=SEQUENCE)


def test_the_memory_goes_through_a_checkpoint_bit_for_bit(tmp_path, topology) -> None:
    config = load_config([], [*SHAPE, *CASES["fastmka"], f"training.segment_length={4 * CHUNK}",
                              "training.segments_per_step=1"])  # fmt: skip
    model, rows = build_model(config, topology, VOCAB), batch(packed=True)

    def run(segments: Segments, steps: int) -> list[torch.Tensor]:
        losses = []
        for _ in range(steps):
            for part, session in segments.step([rows]):
                losses.append(model(part.tokens, part.documents, part.labels, session).detach())
                session.commit()
            segments.advance()
        return losses

    unbroken = Segments(config, topology)
    exact = run(unbroken, 4)
    unbroken.close()
    first = Segments(config, topology)
    found = run(first, 2)
    first.save(lambda content, name: torch.save(content, tmp_path / name))
    run(first, 1)  # what a run that goes back must not see
    first.close()
    second = Segments(config, topology)
    second.load(tmp_path)
    found += run(second, 2)
    assert second.next == 0
    second.close()
    for one, other in zip(found, exact, strict=True):
        assert_bitwise(one, other)


def test_a_session_ends_with_its_sample(topology) -> None:
    config = load_config([], [*SHAPE, *CASES["blockmka"], f"training.segment_length={CHUNK}"])
    model, rows = build_model(config, topology, VOCAB), batch(packed=False)
    segments = Segments(config, topology)
    with torch.no_grad():
        evaluation = segments.whole(rows)
        for part, session in islice(evaluation, 4):
            model(part.tokens, part.documents, part.labels, session)
            session.commit()
        assert segments.statistics().pages == 2 * 2 * 2 * 4  # rows, layers, heads, chunks
        evaluation.close()
        for part, session in segments.step([rows]):
            model(part.tokens, part.documents, part.labels, session)
            session.commit()
    segments.advance()
    assert segments.statistics().pages == 0
    segments.close()
