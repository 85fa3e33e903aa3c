"""From transformers' masks and position ids to documents, and documents on chunk boundaries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config
from transformers.masking_utils import create_causal_mask

from mka_megatron.hf.layout import documents_of, in_chunks
from mka_megatron.memory.chunks import Chunks


def mask_of(*rows):
    return torch.tensor([[int(column) for column in row] for row in rows])


def test_no_mask_is_one_document_per_row():
    assert documents_of(None, None, 2, 5).whole_rows
    assert documents_of(torch.ones(2, 5), torch.arange(5)[None] + 7, 2, 5).whole_rows


def test_padding_on_either_side_and_inside():
    documents = documents_of(mask_of("0011", "1100", "1011"), None, 3, 4)
    assert documents.spans == ((0, 2, 4), (1, 0, 2), (2, 0, 4))
    assert documents.positions.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 2]]


def test_positions_that_begin_again_are_packed_documents():
    documents = documents_of(None, torch.tensor([[0, 1, 2, 0, 1, 0]]), 1, 6)
    assert documents.spans == ((0, 0, 3), (0, 3, 5), (0, 5, 6))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_square_masks_of_transformers_say_the_same(implementation):
    rows = mask_of("0011", "1100", "1111")
    config = Qwen2Config(attn_implementation=implementation)
    square = create_causal_mask(config=config, inputs_embeds=torch.zeros(3, 4, 8), attention_mask=rows,
                                past_key_values=None, position_ids=None)  # fmt: skip
    assert square.dim() == 4
    assert documents_of(square, None, 3, 4).spans == documents_of(rows, None, 3, 4).spans


def test_what_is_neither_causal_nor_padding_is_refused():
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    seen[0, 0, 3, 1] = False
    with pytest.raises(ValueError, match="more than causal"):
        documents_of(seen, None, 1, 4)
    with pytest.raises(ValueError, match=r"give \[1, 4\]"):
        documents_of(torch.ones(1, 3), None, 1, 4)
    with pytest.raises(ValueError, match="position_ids do not count"):
        documents_of(mask_of("0111"), torch.tensor([[0, 0, 1, 0]]), 1, 4)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_document_and_what_follows_a_prompt_lie_on_chunk_boundaries(data):
    batch, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    size = data.draw(st.sampled_from([2, 4, 8]))
    prompt = data.draw(st.none() | st.integers(1, columns))
    if data.draw(st.booleans()):
        tokens = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns),
                                                 min_size=batch, max_size=batch)))  # fmt: skip
        documents = documents_of(tokens, None, batch, columns)
    else:
        lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=columns))
        positions = torch.cat([torch.arange(length) for length in lengths])[None, :columns]
        columns = positions.shape[1]
        documents = documents_of(None, positions.expand(batch, -1), batch, columns)
    layout = in_chunks(documents, size, prompt)
    tokens = torch.ones(batch, columns, dtype=torch.bool) if documents.padding is None else ~documents.padding
    numbers = torch.arange(1, batch * columns + 1, dtype=torch.float64).view(batch, columns, 1).requires_grad_()
    slots = layout.take(numbers)
    back = layout.put(slots)
    assert torch.equal(back[tokens], numbers[tokens])
    if layout.compaction is not None:
        assert not back[~tokens].any()
    Chunks.of(layout.documents, size)  # refuses what is off a boundary
    assert torch.equal(layout.put(layout.documents.positions[..., None])[tokens], documents.positions[..., None][tokens])
    for row in range(batch):
        here = slots[row, :, 0].detach()
        column = (here.long() - 1) % columns
        held = here > 0 if layout.compaction is not None else tokens[row]
        place = {int(column[slot]): slot for slot in held.nonzero()[:, 0].tolist()}
        assert list(place) == sorted(place) and len(place) == int(tokens[row].sum())
        if prompt is not None:
            before = [slot // size for col, slot in place.items() if col < prompt]
            after = [slot // size for col, slot in place.items() if col >= prompt]
            assert not set(before) & set(after)
    (back * numbers.detach()).sum().backward()
    assert torch.equal(numbers.grad[tokens], numbers.detach()[tokens])
