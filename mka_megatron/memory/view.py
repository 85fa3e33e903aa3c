"""What the tokens at hand see of the tokens before them: nothing, earlier segments, or other ranks' shards.

Shapes: B batch, S slots at hand, G KV heads, d head channels, C chunk size, n chunks at hand, N chunks before and
at hand, R recalled chunks, M pages, Q = 16 queries that select.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector

Carry = Tensor | tuple[Tensor, Tensor]
"""[B, G, d] state of the moving average; or of the prefix mean: sum [B, G, d] and count [B]."""


@dataclass(frozen=True)
class Summaries:
    """One entry per chunk, of consecutive chunks from the row's first (or, not yet joined, those at hand)."""

    k: Tensor
    """[B, N, G, d] mean keys, rotated at the chunk's last position (block core) or raw (dense core)."""
    v: Tensor
    """[B, N, G, d] mean values."""
    signature: Tensor | None
    """[B, N, G, W] int64 codes, or fp64 centred mean keys where selection is exact; None without recall."""

    def then(self, late: Summaries) -> Summaries:
        """Those of these chunks, then those of the `late` ones."""
        signature = None
        if self.signature is not None and late.signature is not None:
            signature = torch.cat((self.signature, late.signature), dim=1)
        return Summaries(torch.cat((self.k, late.k), dim=1), torch.cat((self.v, late.v), dim=1), signature)


@dataclass(frozen=True)
class Pages:
    """Recalled chunks that do not lie in the keys at hand or in the halo."""

    k: Tensor
    """[B, G, M, C, d] rotated keys; M may be 0."""
    v: Tensor
    """[B, G, M, C, d] values."""
    lengths: Tensor
    """[B, G, M] int64 tokens of each."""
    index: Tensor
    """[B, n, G, R] int64 into (halo chunks, chunks at hand, pages), -1 = none: what to attend to instead of
    chunk numbers."""

    @cached_property
    def tokens(self) -> Tensor:
        """[B, G, M*C] bool: slots that hold a token."""
        slots = torch.arange(self.k.shape[3], device=self.k.device)
        return (slots < self.lengths[..., None]).flatten(2)


@dataclass(frozen=True)
class Update:
    """What later tokens need of these, detached; a segment's is committed after its backward."""

    k: Tensor | None
    """[B, S, G, d] rotated keys; None with the dense core, whose view has them."""
    v: Tensor | None
    """[B, S, G, d] values."""
    summaries: Summaries | None
    """Of the chunks at hand; None with the dense core without recall."""
    queries: Tensor | None
    """[B, Q, G, d] fp64 integers: the last queries, as `View.queries` gives them; None without recall."""
    carry_k: Carry | None
    """State of the keys' L2 after the last slot; None without one."""
    carry_v: Carry | None
    """The same of the values."""
    recalled: Tensor | None = None
    """[B, n, G, R] int64 numbers in the row of the recalled chunks, -1 = none; None without recalled tokens."""


Choose = Callable[[Tensor, Tensor, Chunks], Tensor]
"""(queries before open chunks, as `View.queries` gives them; signatures of the chunks before [B, N, G, W]; chunks, of
which the open ones are at hand) -> the chunks that they recall [B, 1, G, R]."""


class OpenChunks(Protocol):
    """Open chunks of rows that are generated: the slots at hand are their next ones, and they stay open."""

    @property
    def summaries(self) -> Summaries | None:
        """Those of the chunks before, [B, N, G, ...]; None: there are none. An open chunk has no summary yet."""

    def selected(self, choose: Choose) -> Tensor | None:
        """[B, 1, G, R] what they recall, asked once for an open chunk. None: no chunk lies before."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The block core's halo and open chunk so far, [B, h*C + S', G, d] each, given the rotated keys and the values
        at hand [B, S, G, d], which are kept."""


class View(Protocol):
    """Every method but those of `open` is pure: a recomputed forward gets the same answers."""

    @property
    def open(self) -> OpenChunks | None:
        """Where the slots at hand are the next ones of open chunks, those."""

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Carry | None:
        """L2's state before slot 0 of `x` [B, S, G, d] (name: "k" or "v"), to be passed to summary.ema, or without a
        decay to summary.prefix_mean. Of an EMA, x[:, 0] in rows whose document begins at slot 0. None: every row
        begins afresh."""

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """The h = min(chunks, first) chunks directly before those at hand: [B, h*C, G, d] of each, given the rotated
        keys and the values at hand [B, S, G, d]."""

    def queries(self, local: Tensor) -> Tensor | None:
        """[B, Q, G, d] fp64 integers: the fixed-point selecting queries of the last Q tokens before slot 0 (whatever
        their document), oldest first, given `local`: the same of the last Q tokens at hand. None: there are none."""

    def summaries(self, local: Summaries) -> Summaries:
        """Those of all chunks from the row's first to at least the last at hand, given those at hand."""

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """The chunks `recalled` [B, n, G, R] by number in the row (-1: none), given halo chunks held and the rotated
        keys and values at hand [B, S, G, d]."""

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """Dense core: keys and values [B, T, G, d] of the row's slots up to at least the last at hand, of a level of
        the mixture (0: the tokens)."""


@dataclass(frozen=True)
class Alone:
    """The slots at hand are the whole rows."""

    @property
    def open(self) -> None:
        """All chunks are whole."""
        return None

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> None:
        """No state comes in."""
        return None

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """Nothing lies before."""
        return k[:, :0], v[:, :0]

    def queries(self, local: Tensor) -> None:
        """Nothing lies before."""
        return None

    def summaries(self, local: Summaries) -> Summaries:
        """Those at hand are all."""
        return local

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """Every chunk is at hand: no page."""
        batch, _, groups, channels = k.shape
        none = k.new_empty(batch, groups, 0, 1, channels)
        return Pages(none, none, recalled.new_empty(batch, groups, 0), recalled)

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """Those at hand are all."""
        return k, v


class History(Protocol):
    """The views of all layers."""

    def view(self, layer: int) -> View:
        """The view of `layer`, counted from 0."""

    def stage(self, layer: int, update: Update) -> None:
        """Keep what `layer` leaves for later slots; the same again where a forward is recomputed."""


class NoHistory:
    """The slots at hand are the whole rows, and nothing follows."""

    def view(self, layer: int) -> View:
        """Nothing lies before."""
        return Alone()

    def stage(self, layer: int, update: Update) -> None:
        """Nothing follows."""


@dataclass(frozen=True)
class Memory:
    """The memory that a variant attends with, beside its route."""

    view: View = Alone()
    """Tokens before those at hand."""
    chunks: Chunks | None = None
    """Chunks of the rows; None where neither the block core nor L3 needs any."""
    selector: Selector | None = None
    """How chunks are recalled; None without L3."""
    backend: str = "reference"
    """Implementation of the block core, as ops.block_attention.choose gives it."""
    fuse_backend: str = "reference"
    """Implementation of the fusion, as ops.library.choose gives it."""
    recall_backend: str = "reference"
    """Implementation of pooling and recall, as ops.library.choose gives it."""


NO_MEMORY = Memory()
"""Whole rows, without chunks or recall."""
