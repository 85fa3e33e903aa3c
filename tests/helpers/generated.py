"""One attention layer that is given whole rows, or the same rows step by step with a memory. Shapes: B rows, T new
slots, S slots, C = 4 slots of a chunk, H = 4 query heads, G KV heads, d = 8 channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    L1Config,
    L2Config,
    L3Config,
    MemoryConfig,
    RoutingConfig,
)  # fmt: skip
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.generation import Generation
from mka_megatron.memory.hashing import Selector
from mka_megatron.memory.rows import Piece
from mka_megatron.memory.tiers.pages import PageShape
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.memory.view import Alone, Memory, Update, View
from tests.helpers import oracle

H, D, HIDDEN, C, WINDOW, R = 4, 8, 24, 4, 8, 2
SHAPES = {
    name: PageShape(C, D, torch.float64, words, of)
    for name, words, of in (("hash", 1, torch.int64), ("exact", D, torch.float64))
}


@dataclass(frozen=True)
class Case:
    """A variant with its settings."""

    variant: str
    attention: dict = field(default_factory=dict)
    routing: dict = field(default_factory=dict)
    l2: dict = field(default_factory=dict)
    l3: dict | None = None
    window: int = WINDOW

    @property
    def config(self) -> Config:
        l3 = L3Config() if self.l3 is None else L3Config(enabled=True, recalled_chunks=R, **self.l3)
        block = self.variant == "blockmka" or self.attention.get("core") == "block"
        memory = MemoryConfig(
            l1=L1Config(window=self.window if block else None, chunk_size=C), l2=L2Config(**self.l2), l3=l3
        )
        return Config(
            attention=AttentionConfig(variant=self.variant, **self.attention),  # type: ignore[arg-type]
            routing=RoutingConfig(**self.routing), memory_hierarchy=memory,
        )  # fmt: skip


L3: dict = {"l3": {}}
BLOCK: dict = {"attention": {"core": "block"}}
CASES = {
    "mha": Case("mha"), "mqa": Case("mqa"), "gqa": Case("gqa"), "mla": Case("mla"),
    "mka output": Case("mka"), "mka score": Case("mka", {"mixture": "score"}),
    "mka mean": Case("mka", l2={"summary": "mean"}),
    "mka output l3": Case("mka", **L3), "mka score l3": Case("mka", {"mixture": "score"}, **L3),
    "mka score l3 alone": Case("mka", {"mixture": "score"}, l2={"enabled": False}, **L3),
    "fastmka": Case("fastmka"), "fastmka mean": Case("fastmka", l2={"summary": "mean"}),
    "fastmka keys": Case("fastmka", {"fuse": "k"}), "fastmka top1": Case("fastmka", routing={"mode": "top1"}),
    "fastmka l3": Case("fastmka", **L3), "fastmka l3 group": Case("fastmka", routing={"scope": "group"}, **L3),
    "fastmka l3 mean": Case("fastmka", l2={"summary": "mean"}, **L3),
    "fastmka block": Case("fastmka", **BLOCK, **L3), "fastmka block mean": Case(
        "fastmka", **BLOCK, l2={"summary": "mean"}, **L3),
    "fastmka block local": Case("fastmka", **BLOCK),
    "blockmka": Case("blockmka", **L3), "blockmka exact": Case("blockmka", l3={"selection": "exact"}),
    "blockmka group": Case("blockmka", routing={"scope": "group"}, **L3),
    "blockmka one chunk": Case("blockmka", window=C, **L3), "blockmka wide": Case("blockmka", window=4 * C, **L3),
    "blockmka no summaries": Case("blockmka", l2={"enabled": False}, **L3), "local": Case("blockmka"),
}  # fmt: skip


class Layer:
    """[B, S, hidden] -> [B, S, H, e] with random projections, gates and decays, in fp64."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.config, self.variant = case.config, VARIANTS[case.variant]
        self.groups = {"mha": H, "mqa": 1, "mla": H}.get(case.variant, 2)
        self.chunked = (
            self.config.memory_hierarchy.l3.enabled or self.config.memory_hierarchy.l1.window is not None
        )
        self.latent = self.variant.projection == "latent"
        self.weights = [draw(HIDDEN, n) for n in (
            (H * D, H * (D - 4 + D), 4) if self.latent else (H * D, self.groups * D, self.groups * D))]  # fmt: skip
        routes = self.groups if self.config.routing.scope == "group" else 1
        counts = (self.variant.levels(self.config), self.variant.core_levels(self.config))
        self.gates = [draw(HIDDEN, routes * count) if count > 1 else None for count in counts]
        self.routes = routes
        mean = (
            self.config.memory_hierarchy.l2.summary == "mean" or not self.config.memory_hierarchy.l2.enabled
        )
        self.decay = None if mean else torch.rand(self.groups, D, dtype=torch.float64, generator=generator)
        self.beta = torch.full((1,), 0.7, dtype=torch.float64)
        self.norm = torch.rand(D, dtype=torch.float64, generator=generator) + 0.5
        l3 = self.config.memory_hierarchy.l3
        self.selector = Selector(l3.selection, R, hashing.planes(0, 1, 64, D)) if l3.enabled else None

    def raw(self, x: Tensor) -> list[Tensor | None]:
        """Queries, keys, values and gate logits (latent: queries, up-projected latent, shared key)."""
        first, second, third = (project(x, weight) for weight in self.weights)
        if self.latent:
            return [first.unflatten(-1, (H, D)), second.unflatten(-1, (H, -1)), third]
        found: list[Tensor | None] = [first.unflatten(-1, (H, D))]
        found += [each.unflatten(-1, (self.groups, D)) for each in (second, third)]
        for gate in self.gates:
            logits = None if gate is None else project(x, gate)
            if logits is not None and self.routes > 1:
                logits = logits.unflatten(-1, (self.routes, -1))
            found.append(logits)
        return found

    def core(self, documents: Documents, view: View, *raw: Tensor | None) -> tuple[Tensor, Update | None]:
        """The variant over the slots at hand."""
        if self.latent:
            cos, sin = oracle.tables(documents.positions, 4, 1e4)
            return self.variant.attend(*raw, cos, sin, documents, nope=D - 4, scale=D**-0.5, view=view), None
        q, k, v, logits, core = raw
        route = None
        if logits is not None or core is not None:
            decays = (self.decay, self.decay) if logits is not None else (None, None)
            route = RouteInputs(logits, self.beta, *decays, core)

        def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
            return apply_rope(
                x, *oracle.tables(documents.positions if positions is None else positions, D, 1e4)
            )

        def norm(x: Tensor) -> Tensor:
            return oracle.rms_norm(x, self.norm, 1e-6)

        memory = Memory(view, Chunks.of(documents, C) if self.chunked else None, self.selector)
        out, _, *update = self.variant.attend(
            q, k, v, finish=Finish(norm, norm, rotate), route=route, documents=documents, scale=D**-0.5,
            config=self.config, memory=memory,
        )  # fmt: skip
        return out, update[0] if update else None

    def whole(self, x: Tensor, documents: Documents) -> Tensor:
        """Without a memory."""
        return self.core(documents, Alone(), *self.raw(x))[0]

    def begun(self, batch: int, store: TierStore | None = None) -> Generation:
        """A memory of `batch` rows."""
        return Generation(
            self.config,
            layers=1,
            heads=range(self.groups),
            batch=batch,
            device=torch.device("cpu"),
            store=store,
        )

    def step(self, memory: Generation, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The next slots' outputs [B, T, H, e]."""
        memory.begin(x.shape[1], valid)

        def core(piece: Piece, view: View, *raw: Tensor | None) -> tuple[Tensor, Update | None]:
            return self.core(piece.documents, view, *raw)

        return memory.attend(0, core, *self.raw(x))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Elementwise, so that a token's projection has the same bits whatever the others are."""
    return (x[..., None] * weight).sum(dim=-2)


@dataclass
class Row:
    """The tokens that a row was given, and where its chunks were closed early."""

    tokens: list[Tensor] = field(default_factory=list)
    """[hidden] each."""
    closed: list[int] = field(default_factory=list)
    """Tokens at each closing."""
    outputs: list[Tensor] = field(default_factory=list)
    """What the memory gave for each."""

    def copy(self) -> Row:
        return Row(list(self.tokens), list(self.closed), list(self.outputs))

    def slots(self) -> list[int]:
        """Where its tokens lie in a row whose chunks are closed there."""
        found, slot = [], 0
        for token in range(len(self.tokens)):
            if token in self.closed:
                slot = -(-slot // C) * C
            found.append(slot)
            slot += 1
        return found

    def expected(self, layer: Layer) -> Tensor:
        """What the layer gives without a memory for the row alone, of each token."""
        slots = self.slots() if layer.chunked else list(range(len(self.tokens)))
        x = torch.randn(1, slots[-1] + 1, HIDDEN, dtype=torch.float64)
        x[0, slots] = torch.stack(self.tokens)
        padding = torch.ones(x.shape[:2], dtype=torch.bool)
        padding[0, slots] = False
        starts = torch.zeros_like(padding)
        starts[:, 0] = True
        return layer.whole(x, Documents.from_starts(starts, padding))[0, slots]


class Rows:
    """Rows that a layer generates; every call gives the same to the memory and to the rows' own record."""

    def __init__(self, layer: Layer, batch: int, store: TierStore | None = None, seed: int = 1) -> None:
        self.layer, self.memory = layer, layer.begun(batch, store)
        self.rows = [Row() for _ in range(batch)]
        self._generator = torch.Generator().manual_seed(seed)

    def give(self, counts: Sequence[int], left: bool = False, width: int | None = None) -> None:
        """So many new tokens to every row, the padding behind or in front."""
        width = width or max(counts)
        x = torch.randn(len(counts), width, HIDDEN, dtype=torch.float64, generator=self._generator)
        slots = torch.arange(width).expand(len(counts), -1)
        ends = torch.tensor(counts)[:, None]
        valid = slots >= width - ends if left else slots < ends
        out = self.layer.step(self.memory, x, None if bool(valid.all()) else valid)
        assert not bool(out[~valid].any())
        for row, mine in enumerate(self.rows):
            mine.tokens += x[row, valid[row]].unbind(0)
            mine.outputs += out[row, valid[row]].unbind(0)

    def close(self, rows: Sequence[int] | None = None) -> None:
        """Close open chunks."""
        self.memory.close_chunks(rows)
        for row in range(len(self.rows)) if rows is None else rows:
            self.rows[row].closed.append(len(self.rows[row].tokens))

    def select(self, index: Sequence[int]) -> None:
        """As Generation.select."""
        self.memory.select(index)
        self.rows = [self.rows[row].copy() for row in index]
