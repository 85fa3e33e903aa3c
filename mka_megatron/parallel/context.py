"""Context parallelism: what a rank sees of the shards of its rows that lie on the ranks before it.

Rank r of P holds the slots [r*S, (r+1)*S) of every row, in this order, all of one length S.

Shapes: B batch, S slots at hand, G KV heads, d head channels, C chunk size, n = S/C chunks at hand, h halo chunks,
R recalled chunks, M pages, Q = 16 queries that select, W words of a signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import SELECTING_QUERIES
from mka_megatron.memory.summary import ema
from mka_megatron.memory.view import Pages, Summaries, Update
from mka_megatron.parallel.exchange import Index, Traffic, exchange, gather_before, transpose


@dataclass(frozen=True)
class RankHistory:
    """A memory.view.History: the views of all layers of one forward pass."""

    group: dist.ProcessGroup
    documents: Documents
    """This rank's part of the rows."""
    chunks: Chunks | None
    traffic: Sequence[Traffic]
    """One per layer."""

    def view(self, layer: int) -> RankView:
        """The view of `layer`, counted from 0."""
        return RankView(self.group, self.documents, self.chunks, self.traffic[layer])

    def stage(self, layer: int, update: Update) -> None:
        """Nothing follows: the rows end with the last rank."""


@dataclass(frozen=True)
class RankView:
    """A memory.view.View whose slots before lie on the ranks before.

    Every method is collective. All but `queries` are differentiable in the floating point tensors they return, on
    condition that these enter the rank's loss (parallel/exchange.py).
    """

    group: dist.ProcessGroup
    documents: Documents
    """This rank's part of the rows."""
    chunks: Chunks | None
    """None where no method but `carry` and `keys_values` is called."""
    traffic: Traffic
    """Counts the bytes that this rank sends."""

    @property
    def open(self) -> None:
        """Shards have whole chunks."""
        return None

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Tensor:
        """EMA state before slot 0, [B, G, d] in fp32 (fp64 for fp64 x): the ranks' last states without a carry,
        decayed by the tokens between. See View. Raises ValueError without a decay."""
        if decay is None:
            raise ValueError("memory_hierarchy.l2.summary is mean: ranks hand on the state of an ema only.")
        plan = documents.once(_carry_plan)
        wide = torch.promote_types(x.dtype, torch.float32)
        begun = x[:, 0].to(wide)
        continues = documents.continues[:, None, None]
        _, last = ema(x, decay, documents, torch.where(continues, 0, begun))
        # [B, r+1, G, d]
        (states,) = gather_before([last[:, None]], self.group, self.traffic, f"carry {name}")
        states = torch.where(plan.reached[:, :, None, None], states, 0)
        factors = decay.to(wide) ** plan.tokens[:, :, None, None].to(wide)
        return torch.where(continues, (states * factors).sum(dim=1), begun)

    def halo(self, k: Tensor, v: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """See View."""
        batch, slots, groups, channels = k.shape
        rank, ranks = self.group.rank(), self.group.size()

        def piece(owner: int, wants: int) -> tuple[int, int]:
            """Slots of `owner` that belong to the halo of `wants`."""
            begin = max(0, wants * slots - chunks * self._table.size)
            low, high = max(begin, owner * slots), min(wants * slots, (owner + 1) * slots)
            return (low - owner * slots, high - owner * slots) if low < high and owner < wants else (0, 0)

        given = [piece(rank, other) for other in range(ranks)]
        give: list[Index | None] = [(slice(None), slice(*each)) if each[1] else None for each in given]
        lengths = [high - low for low, high in (piece(other, rank) for other in range(ranks))]
        take = [(batch, length, groups, channels) for length in lengths]
        halo_k, halo_v = exchange((k, v), give, take, self.group, self.traffic, "halo")
        return torch.cat(halo_k, dim=1), torch.cat(halo_v, dim=1)

    @torch.no_grad()
    def queries(self, local: Tensor) -> Tensor:
        """See View; zeros where there are fewer tokens."""
        plan = self.documents.once(_queries_plan)
        rank, ranks = self.group.rank(), self.group.size()
        give: list[Index | None] = [(...,) if rank in plan.owners[other] else None for other in range(ranks)]
        nothing = (0, *local.shape[1:])
        take = [tuple(local.shape) if other in plan.owners[rank] else nothing for other in range(ranks)]
        (pieces,) = exchange((local,), give, take, self.group, self.traffic, "queries")
        # a last slot of zeros, for what is not there
        found = [pieces[owner] for owner in plan.owners[rank]] + [torch.zeros_like(local[:, :1])]
        rows = torch.arange(local.shape[0], device=local.device)[:, None]
        return torch.cat(found, dim=1)[rows, plan.source]

    def summaries(self, local: Summaries) -> Summaries:
        """See View."""
        k, v = gather_before((local.k, local.v), self.group, self.traffic, "summaries")
        signature = None
        if local.signature is not None:
            (signature,) = gather_before([local.signature.detach()], self.group, self.traffic, "signatures")
        return Summaries(k, v, signature)

    def pages(self, recalled: Tensor, halo: int, k: Tensor, v: Tensor) -> Pages:
        """See View. A chunk that several of this rank's chunks recall travels once per KV head."""
        table = self._table
        held = table.first - halo
        wanted, page = _wanted(recalled, held)
        asked, answered = self._ask(wanted)
        counts = torch.stack((asked.flatten(1).sum(dim=1), answered.flatten(1).sum(dim=1))).tolist()
        take = [(count, table.size, k.shape[3]) for count in counts[0]]
        # (rank, row, KV head, chunk at hand) of every page that is given, in the order in which it was asked for
        given = answered.nonzero().split(counts[1])
        give: list[Index | None] = [
            (each[:, 1], each[:, 3], slice(None), each[:, 2]) if len(each) else None for each in given
        ]
        # [B, n*C, G, d] -> [B, n, C, G, d]; an index leaves [P, C, d]
        whole = [x.unflatten(1, (table.count, table.size)) for x in (k, v)]
        pieces = exchange(whole, give, take, self.group, self.traffic, "pages")
        owner, row, head, chunk = asked.nonzero().unbind(1)
        number = owner * table.count + chunk
        places = (row, head, page[row, head, number + 1])
        shape = (k.shape[0], k.shape[2], int(page.max()) + 1, table.size, k.shape[3])
        pages_k, pages_v = (k.new_zeros(shape).index_put(places, torch.cat(each)) for each in pieces)
        lengths = table.lengths.new_zeros(shape[:3]).index_put(places, table.lengths[row, number])
        # [B, n, G, R] -> [B, G, n*R] and back
        flat = recalled.transpose(1, 2).flatten(2)
        paged = halo + table.count + page.gather(2, _column(flat, held))
        index = torch.where(flat < held, paged, flat - held).masked_fill(flat < 0, -1)
        return Pages(pages_k, pages_v, lengths, index.unflatten(2, (table.count, -1)).transpose(1, 2))

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """See View."""
        k, v = gather_before((k, v), self.group, self.traffic, "keys and values")
        return k, v

    @property
    def _table(self) -> Chunks:
        if self.chunks is None:
            raise ValueError("this view knows no chunks: build it with those of its documents.")
        return self.chunks

    def _ask(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """[ranks, B, G, n] bool: the chunks that this rank wants of every rank, and they of it."""
        table, ranks = self._table, self.group.size()
        missing = ranks * table.count - wanted.shape[2]
        # [B, G, chunks] -> [B, G, ranks, n] -> [ranks, B, G, n]
        asked = F.pad(wanted, (0, missing)).unflatten(2, (ranks, -1)).movedim(2, 0)
        return asked, transpose(asked.byte(), self.group, self.traffic, "requests").bool()


def _wanted(recalled: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """Of the chunks [0, held) before the halo: [B, G, held] bool, which are recalled, and [B, G, held+1] int64, the
    page of each, by column."""
    # [B, n, G, R] -> [B, G, n*R]
    flat = recalled.transpose(1, 2).flatten(2)
    hits = torch.zeros(*flat.shape[:2], held + 1, dtype=torch.bool, device=flat.device)
    hits.scatter_(2, _column(flat, held), True)
    hits[:, :, 0] = False
    return hits[:, :, 1:], hits.long().cumsum(dim=2) - 1


def _column(numbers: Tensor, held: int) -> Tensor:
    """Chunk c < held -> c + 1; 0 for what is no page."""
    return torch.where(numbers < held, numbers + 1, 0)


@dataclass(frozen=True)
class _CarryPlan:
    """How the last states of the ranks up to this one reach slot 0; this rank's own does not."""

    reached: Tensor
    """[B, r+1] bool: the document that slot 0 continues was running at the end of the rank's shard."""
    tokens: Tensor
    """[B, r+1] int64 of that document between the end of the rank's shard and slot 0."""


def _carry_plan(documents: Documents) -> _CarryPlan:
    whole, slots = _whole(documents), documents.starts.shape[1]
    ends = range(slots, documents.begin + 1, slots)
    begins = [-1] * documents.starts.shape[0]
    for row, begin, _ in whole.spans:
        if begin < documents.begin:
            begins[row] = begin
    reached = [[0 <= begin < end for end in ends] + [False] for begin in begins]
    tokens = [[0] * len(each) for each in reached]
    for row, begin, end in whole.runs:
        for rank, after in enumerate(ends):
            tokens[row][rank] += max(0, min(end, documents.begin) - max(begin, after))
    device = documents.starts.device
    return _CarryPlan(torch.tensor(reached, device=device), torch.tensor(tokens, device=device))


@dataclass(frozen=True)
class _QueriesPlan:
    """Where the last Q tokens before every rank's slot 0 lie."""

    owners: tuple[tuple[int, ...], ...]
    """Per rank those that it gets queries from."""
    source: Tensor
    """[B, Q] int64: where this rank's lie among the Q of each owner, joined, and a last slot for none."""


def _queries_plan(documents: Documents) -> _QueriesPlan:
    whole, slots, most = _whole(documents), documents.starts.shape[1], SELECTING_QUERIES
    batch, ranks = documents.starts.shape[0], whole.starts.shape[1] // slots
    tokens = [[0] * batch for _ in range(ranks)]
    for row, begin, end in whole.runs:
        for rank in range(begin // slots, -(-end // slots)):
            tokens[rank][row] += min(end, (rank + 1) * slots) - max(begin, rank * slots)
    owners = []
    for rank in range(ranks):
        missing, mine = [most] * batch, []
        for owner in range(rank - 1, -1, -1):
            found = [min(left, count) for left, count in zip(missing, tokens[owner], strict=True)]
            if any(found):
                mine.append(owner)
            missing = [left - count for left, count in zip(missing, found, strict=True)]
        owners.append(tuple(reversed(mine)))
    own = owners[documents.begin // slots]
    source = []
    for row in range(batch):
        places: list[int] = []
        for number, owner in enumerate(own):
            places += range((number + 1) * most - min(most, tokens[owner][row]), (number + 1) * most)
        source.append([len(own) * most] * max(0, most - len(places)) + places[-most:])
    return _QueriesPlan(tuple(owners), torch.tensor(source, device=documents.starts.device))


def _whole(documents: Documents) -> Documents:
    if documents.whole is None:
        raise ValueError("these are whole rows: give a rank its part of them.")
    return documents.whole
