"""What a model remembers of the rows that it is generating, for Megatron's layers and Hugging Face's alike.

Every layer attends to the slots at hand. Whole chunks are taken in as in training, over a segment that begins at the
first of them: the raw inputs of an open chunk's tokens are kept until it is complete. They are known from then on through
their summaries and codes; their keys and values lie in a page store, of which beams share the pages. Of a chunk that
stays open only the new tokens are at hand: what it recalls is selected once, nothing of it is pooled. So prefill, chunked
prefill and decode are one thing. The dense core without L3 works on no chunks, its keys and values stay on the device.

One forward pass is `begin`, then `attend` in every layer. Nothing remembered has a gradient. After a pass that an error
ended (a full page store, say) some layers have taken in what others have not: the rows cannot go on.

Shapes: B rows, T new slots, S slots at hand, G KV heads of this rank, d head channels, C chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, needs_chunks, recalls
from mka_megatron.memory.generation_view import GenerationView
from mka_megatron.memory.remembered import Remembered
from mka_megatron.memory.rows import Joining, Piece, Rows, padded
from mka_megatron.memory.tiers.opening import open_store
from mka_megatron.memory.tiers.pages import PageKey, PageShape, TierError
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Update


def open_pages(
    config: Config, dtype: torch.dtype, device: torch.device, *, run: str, rank: int = 0
) -> TierStore | None:
    """The page store that a :class:`Generation` needs; None where it needs none.

    Args:
        config: reads memory_hierarchy: l3's placement and budgets, which are this rank's, and the spill path.
        dtype: of keys and values. device: where they are attended to.
        run: the same on all ranks, another for every store: letters, digits, '.', '_' and '-'.
        rank: of this process among those of the run.

    Raises ConfigError where the tiers cannot be used as configured.
    """
    if not Generation.needs_store(config):
        return None
    memory, l3 = config.memory_hierarchy, config.memory_hierarchy.l3
    words, kind = l3.hash_tables * l3.hash_bits // 64, torch.int64
    if l3.selection == "exact":
        words, kind = config.model.head_dim, torch.float64
    shape = PageShape(memory.l1.chunk_size, config.model.head_dim, dtype, words, kind)
    try:
        return open_store(memory, shape, run, rank, device)
    except TierError as error:
        raise ConfigError(str(error)) from error


Core = Callable[..., tuple[Tensor, Update | None]]
"""(piece, view, the layer's tensors at hand) -> output of the slots at hand [B, S, ...], and the memory's update."""


class Generation:
    """The memory of rows that begin empty.

    Args:
        config: reads attention, and memory_hierarchy's chunk size, window and l3.
        layers: of the model.
        heads: the model's numbers of this rank's KV heads.
        batch: B.
        device: of the new tokens.
        store: keeps the pages; needed by the block core with L3, else not used. It is the caller's to close.
    """

    def __init__(
        self,
        config: Config,
        *,
        layers: int,
        heads: range,
        batch: int,
        device: torch.device,
        store: TierStore | None = None,
    ) -> None:
        l1 = config.memory_hierarchy.l1
        if self.needs_store(config) and store is None:
            raise ValueError("the block core with memory_hierarchy.l3.enabled keeps pages: pass a store.")
        self._store = store if self.needs_store(config) else None
        self._heads, self._size = heads, l1.chunk_size
        self._halo = max(0, (l1.window or 0) // l1.chunk_size - 1)
        self._rows = Rows(batch, l1.chunk_size if needs_chunks(config) else None, device)
        self._layers = [Remembered() for _ in range(layers)]
        self._pieces: list[Piece] = []
        self._cores: dict[int, Core] = {}  # of the layers, to close open chunks with
        self._late: set[int] = set()  # layers that have not taken in what the others have

    @staticmethod
    def needs_store(config: Config) -> bool:
        """Tokens of complete chunks are attended to again, so that their keys and values are kept in pages."""
        return block_core(config) and recalls(config)

    @property
    def tokens(self) -> list[int]:
        """Tokens of each row so far."""
        return [known + mine for known, mine in zip(self._rows.known, self._rows.open, strict=True)]

    @property
    def layers(self) -> Sequence[Remembered]:
        """What each layer remembers outside the page store, to be looked at only."""
        return self._layers

    @property
    def pieces(self) -> list[Piece]:
        """What :meth:`attend` goes over in the pass that has begun: `piece.documents.positions` has the positions."""
        return self._pieces

    def begin(self, slots: int, valid: Tensor | None = None) -> list[Piece]:
        """The next forward pass gives every row `slots` new slots.

        Args:
            valid: [B, slots] bool, which of them hold tokens (left padding, rows of different lengths, rows that have
                ended); None: all.

        Returns:
            :attr:`pieces`; none where there is no new token. Raises RuntimeError after a pass that an error ended.
        """
        self._check()
        self._pieces = self._rows.advance(slots, valid)
        if any(piece.opens for piece in self._pieces):
            for memory in self._layers:
                memory.selected = memory.recalled = None
        if self._pieces:
            self._late = set(range(len(self._layers)))
        return self._pieces

    def attend(self, layer: int, core: Core, *tensors: Tensor | None) -> Tensor:
        """A layer's attention over the new tokens, and what it leaves.

        Args:
            layer: from 0.
            core: the variant, called for each piece in order.
            tensors: [B, slots, ...] raw queries, keys, values and gate logits of the new slots, in the core's order.

        Returns:
            [B, slots, ...] the cores' outputs; 0 in slots without a token.
        """
        memory = self._layers[layer]
        result = None
        self._prefetch(layer + 1)
        for piece in self._pieces:
            old = memory.kept or (None,) * len(tensors)
            given = tuple(
                None if new is None else piece.gather(before, new)
                for before, new in zip(old, tensors, strict=True)
            )
            out = self._run(layer, core, piece, given)
            if result is None:
                result = out.new_zeros(len(out), self._slots(tensors), *out.shape[2:])
            piece.scatter(out, result)
            if piece.joining is None and self._rows.chunked:
                memory.keep(given, piece, self._size)
                self._cores[layer] = core
        if result is None:
            raise ValueError("there is no new token: call begin first, with one.")
        self._late.discard(layer)
        return result

    def close_chunks(self, rows: Sequence[int] | None = None) -> None:
        """Close the open chunks of `rows` (None: of all), as at the end of a prompt or turn; does nothing where none
        is open or the layers work on no chunks. Raises RuntimeError after a pass that an error ended."""
        self._check()
        piece = self._rows.close(rows)
        if piece is None:
            return
        self._late = set(range(len(self._layers)))
        for layer, memory in enumerate(self._layers):
            assert memory.kept is not None
            self._run(layer, self._cores[layer], piece, [x if x is None else x[:, : piece.slots] for x in memory.kept])
            self._late.discard(layer)

    def select(self, index: Sequence[int]) -> None:
        """Row i goes on from what row index[i] was, for any number of rows: beams are reordered, rows repeated or
        given up. Raises RuntimeError after a pass that an error ended, but where all rows are given up."""
        if index:
            self._check()
        before = len(self._rows)
        for name in self._rows.select(index):
            if self._store is not None:
                self._store.drop(name)
        self._pieces = []
        if list(index) == list(range(len(index))) and len(index) == before:
            return
        for memory in self._layers:
            memory.map(lambda x: x.index_select(0, torch.tensor(index, dtype=torch.int64, device=x.device)))

    def close(self) -> None:
        """Forget the rows."""
        self.select([])

    def _check(self) -> None:
        if self._late:
            raise RuntimeError(
                "an error ended the last pass over these rows, so that layers remember different tokens: begin a new "
                "generation (of transformers: with a new MKACache)."
            )

    @torch.no_grad()
    def _run(self, layer: int, core: Core, piece: Piece, given: Sequence[Tensor | None]) -> Tensor:
        """The core's output, and what it leaves is remembered."""
        memory = self._layers[layer]
        out, update = core(piece, self._view(layer, piece), *given)
        if update is not None and self._rows.chunked:
            memory.pass_by(update, piece.continued.tokens)
        elif update is not None:
            memory.carry_k, memory.carry_v = update.carry_k, update.carry_v
        if piece.joining is not None:
            assert update is not None
            if self._store is not None:
                self._put(layer, update, piece.joining)
            memory.join(update, piece.joining, self._size, self._halo)
        return out

    def _view(self, layer: int, piece: Piece) -> GenerationView:
        return GenerationView(self._layers[layer], piece, self._store, self._key(layer, piece), self._halo)

    def _prefetch(self, layer: int) -> None:
        """What the new chunk of `layer` recalls, which only what lies before it decides."""
        if layer < len(self._layers) and len(self._pieces) == 1 and self._pieces[0].opens:
            opened = self._view(layer, self._pieces[0]).open
            assert opened is not None
            opened.prefetch()

    def _put(self, layer: int, update: Update, joining: Joining) -> None:
        assert self._store is not None and update.k is not None and update.v is not None
        assert update.summaries is not None and update.summaries.signature is not None
        rows, numbers = (torch.from_numpy(each) for each in (joining.pages >= 0).nonzero())
        heads = torch.arange(len(self._heads)).repeat(len(rows))
        # [P] -> [P, G] -> [P*G]
        rows, numbers = (each.repeat_interleave(len(self._heads)) for each in (rows, numbers))
        names = joining.pages[rows.numpy(), numbers.numpy()].tolist()
        keys = [
            PageKey(0, name, layer, self._heads[head], 0)
            for name, head in zip(names, heads.tolist(), strict=True)
        ]
        # [B, n, C, G, d] -> [P*G, C, d]
        k, v = (padded(x, self._size).transpose(2, 3)[rows, numbers, heads] for x in (update.k, update.v))
        of = update.summaries
        summaries = (x[rows, numbers, heads] for x in (of.k, of.v, of.signature) if x is not None)
        self._store.put(keys, k, v, joining.lengths[rows, numbers], *summaries)

    def _key(self, layer: int, piece: Piece) -> Callable[[int, int, int], PageKey]:
        return lambda row, head, chunk: PageKey(0, int(piece.pages[row, chunk]), layer, self._heads[head], 0)

    @staticmethod
    def _slots(tensors: Sequence[Any]) -> int:
        return next(each.shape[1] for each in tensors if each is not None)
