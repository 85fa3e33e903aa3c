"""Rows in segments: a session's views give what the whole rows hold, bit for bit (the ema to its roundoff).

One attention layer is played through up to what it would attend to: fused keys, window, summaries, selection and
the keys and values of recalled chunks. B = 2 rows, G = 2 KV heads, H = 4, d = 8, C = 4, window 2 chunks, R = 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector
from mka_megatron.memory.hierarchy import Session
from mka_megatron.memory.summary import ema
from mka_megatron.memory.tiers.pages import PageShape
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Alone, Summaries, Update, View
from tests.helpers.numerics import assert_same
from tests.helpers.tier_pages import store

B, S, G, H, D, C, W, R = 2, 96, 2, 4, 8, 4, 2, 3
LAYERS = 2
SHAPE = PageShape(C, D, torch.float32, signature_words=1)
SELECTOR = Selector("hash", R, hashing.planes(0, 1, 64, D), None)
DECAY = torch.linspace(0.3, 0.9, G * D).view(G, D)


def rows() -> Documents:
    """A long document each, with chunks closed early (at slots 6-7 and 30-31), a second one, and padding at the end."""
    starts = torch.zeros(B, S, dtype=torch.bool)
    starts[:, 0] = starts[0, 72] = starts[1, 20] = True
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 6:8] = padding[:, 30:32] = padding[1, 90:] = True
    return Documents.from_starts(starts, padding)


@dataclass(frozen=True)
class Seen:
    """What a layer's queries at hand would attend to."""

    fused: Tensor
    halo: Tensor
    summaries: Summaries
    selected: Tensor
    recalled: Tensor
    """[B, n, G, R, C, 2d] keys and values of recalled chunks, 0 for none and on padding."""


def layer(x: Tensor, documents: Documents, view: View) -> tuple[Seen, Update]:
    """`x` [B, S, (2 G + H) d]: raw keys, values and queries at hand."""
    k, v = (part.unflatten(2, (G, D)) for part in x[..., : 2 * G * D].chunk(2, dim=2))
    q = x[..., 2 * G * D :].unflatten(2, (H, D))
    if documents.padding is not None:
        # what a real layer has there is never read
        k, v = (part.masked_fill(documents.padding[:, :, None, None], 0) for part in (k, v))
    chunks = Chunks.of(documents, C)
    fused, carry_k = ema(k, DECAY, documents, view.carry("k", k, DECAY, documents))
    _, carry_v = ema(v, DECAY, documents, view.carry("v", v, DECAY, documents))
    halo_k, halo_v = view.halo(k, v, W - 1)
    summaries = view.summaries(
        Summaries(hashing.chunk_means(k, chunks), hashing.chunk_means(v, chunks), SELECTOR.signature(k, chunks))
    )
    fixed = SELECTOR.queries(q, G)
    last = hashing.last_queries(fixed, documents)
    means = hashing.recent(fixed, view.queries(last), documents, chunks)
    assert summaries.signature is not None
    selected = SELECTOR.select(means, summaries.signature, chunks, W)
    held = halo_k.shape[1] // C
    pages = view.pages(selected, held, k, v)
    update = Update(
        k, v, Summaries(*(t[:, chunks.first : chunks.first + chunks.count] for t in (
            summaries.k, summaries.v, summaries.signature))), last, carry_k, carry_v, selected,
    )  # fmt: skip
    # [B, (h + n) C, G, d] -> [B, G, h + n, C, 2d], then the pages behind
    near = torch.cat((torch.cat((halo_k, k), 1), torch.cat((halo_v, v), 1)), 3).unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4)
    there = torch.cat((near, torch.cat((pages.k, pages.v), 4)), 2) if pages.k.shape[2] else near
    index = pages.index.permute(0, 2, 1, 3)  # [B, G, n, R]
    batch, heads = torch.arange(B)[:, None, None, None], torch.arange(G)[None, :, None, None]
    found = there[batch, heads, index.clamp_min(0)] * (index >= 0)[..., None, None]
    return Seen(fused, halo_k, summaries, selected, found.transpose(1, 2)), update


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, (2 * G + H) * D, generator=generator) for _ in range(LAYERS)]


def session(pages: TierStore, generation: int = 0, first: int = 0) -> Session:
    return Session(pages, generation, range(first, first + B), range(2, 2 + G), C, W)


def segments(
    current: Session, length: int, begin: int = 0, end: int = S, before_commit: Callable[[], None] = lambda: None
) -> list[list[Seen]]:
    """Per segment and layer what it saw."""
    found = []
    for start in range(begin, end, length):
        part = rows().part(start, start + length)
        current.begin(part)
        seen = []
        for number, x in enumerate(inputs()):
            each, update = layer(x[:, start : start + length], part, current.view(number))
            current.stage(number, update)
            seen.append(each)
        before_commit()
        current.commit()
        found.append(seen)
    return found


def same(found: list[list[Seen]], length: int, begin: int = 0) -> None:
    """Assert that segments saw what the whole rows show, bit for bit."""
    documents = rows()
    for number, x in enumerate(inputs()):
        whole, update = layer(x, documents, Alone())
        for place, seen in enumerate(each[number] for each in found):
            start = begin + place * length
            slots, chunks = slice(start, start + length), slice(start // C, (start + length) // C)
            # the scan's order depends on the length: the one thing that is not the same arithmetic
            assert_same(seen.fused, whole.fused[:, slots], terms=S)
            halo = update.k[:, max(0, start - (W - 1) * C) : start]
            assert seen.halo.equal(halo)
            for name in ("k", "v", "signature"):
                assert getattr(seen.summaries, name).equal(getattr(whole.summaries, name)[:, : chunks.stop]), name
            assert seen.selected.equal(whole.selected[:, chunks])
            assert seen.recalled.equal(whole.recalled[:, chunks])


@pytest.mark.parametrize("length", [4, 8, 16, 32, 48])
@pytest.mark.parametrize("on_disk", [False, True])
def test_segments_see_what_the_rows_hold(tmp_path: Path, length: int, on_disk: bool) -> None:
    with store(tmp_path if on_disk else None, rows=6 if on_disk else None, shape=SHAPE) as pages:
        found = segments(session(pages), length)
        same(found, length)
        held = pages.statistics()
        assert held.pages == LAYERS * G * int((Chunks.of(rows(), C).lengths > 0).sum())
        assert held.misses > 0 if on_disk else held.misses == 0


def test_something_is_recalled_from_long_ago() -> None:
    """Else the comparison above shows nothing."""
    with store(None, rows=None, shape=SHAPE) as pages:
        found = segments(session(pages), 16)
    recalled = found[-2][0].selected
    assert int((recalled >= 0).sum()) > 20 and int(recalled.min()) == -1
    assert any(0 <= chunk < 8 for chunk in recalled.flatten().tolist())


def test_nothing_changes_before_the_commit(tmp_path: Path) -> None:
    """A recomputed forward sees what the first one saw."""
    with store(tmp_path, rows=6, shape=SHAPE) as pages:
        current = session(pages)
        segments(current, 16, end=48)
        part, x = rows().part(48, 64), inputs()[0][:, 48:64]
        current.begin(part)
        first, update = layer(x, part, current.view(0))
        current.stage(0, update)
        again, _ = layer(x, part, current.view(0))
        assert first.recalled.equal(again.recalled) and first.summaries.k.equal(again.summaries.k)
        assert first.halo.equal(again.halo) and first.fused.equal(again.fused)


def test_rows_that_end_leave_nothing(tmp_path: Path) -> None:
    with store(tmp_path, rows=6, shape=SHAPE) as pages:
        one, two = session(pages), session(pages, first=B)
        segments(one, 16)
        segments(two, 16, end=48)
        one.close()
        same(segments(two, 16, begin=48), 16, begin=48)
        two.close()
        held = pages.statistics()
    assert held.pages == 0


def test_a_session_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    with store(tmp_path / "before", rows=6, shape=SHAPE) as pages:
        current = session(pages)
        segments(current, 16, end=48)
        torch.save({"state": current.state(), "blocks": list(current.blocks())}, tmp_path / "saved.pt")
        # goes on beyond the checkpoint, as a run does before it crashes
        segments(current, 16, begin=48, end=64)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    with store(tmp_path / "after", rows=6, shape=SHAPE) as pages:
        resumed = session(pages, generation=1, first=10)
        resumed.restore(saved["state"], iter(saved["blocks"]), torch.device("cpu"))
        assert {key.generation for key in pages.keys()} == {1}
        assert max(key.chunk for key in pages.keys()) == 48 // C - 1
        same(segments(resumed, 16, begin=48), 16, begin=48)


def test_forgotten_pages_are_not_recalled() -> None:
    """Room for the newest 40 pages of 92: recalled chunks are right or masked, and the window is whole."""
    with store(None, rows=40, shape=SHAPE, when_full="evict") as pages:
        found = segments(session(pages), 16)
        assert pages.statistics().forgotten > 0
    documents, masked = rows(), 0
    for number, x in enumerate(inputs()):
        whole, _ = layer(x, documents, Alone())
        for place, seen in enumerate(each[number] for each in found):
            wanted = whole.recalled[:, place * 4 : place * 4 + 4]
            assert seen.selected.equal(whole.selected[:, place * 4 : place * 4 + 4])
            right = (seen.recalled == wanted).flatten(4).all(4)
            nothing = (seen.recalled == 0).flatten(4).all(4)
            assert bool((right | nothing).all())
            masked += int((nothing & ~right).sum())
    assert masked > 0
