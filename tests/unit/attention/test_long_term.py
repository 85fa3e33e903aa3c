"""L3 under the dense core against the definition, token by token, dense and in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mka_megatron.attention import fastmka, grouped, mka
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.long_term import available, l3_level
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    L2Config,
    L3Config,
    MemoryConfig,
    RoutingConfig,
)
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector
from mka_megatron.memory.view import Alone, Memory, Summaries
from tests.helpers import oracle
from tests.helpers.layouts import chunked
from tests.helpers.numerics import assert_bitwise, assert_same, assert_same_gradients

B, S, H, G, D, C, R = 2, 45, 4, 2, 8, 8, 2
SCALE = D**-0.5
PLANES = hashing.planes(0, 1, 64, D)
SELECTORS = {"exact": Selector("exact", R), "hash": Selector("hash", R, PLANES)}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def layout(name: str) -> Documents:
    if name == "whole":
        return Documents.unpacked(B, S)
    return chunked(B, S, C, seed=5, padded=name == "gaps")


LAYOUTS = ("whole", "packed", "gaps")


@dataclass
class Layer:
    """Raw inputs of a layer with L1, perhaps L2, and L3."""

    q: Tensor
    k: Tensor
    v: Tensor
    route: RouteInputs
    norm: Tensor
    where: Documents
    config: Config

    @staticmethod
    def make(
        documents: str, variant: str = "fastmka", scope: str = "token", l2: bool = True, mode: str = "soft", **attention
    ) -> Layer:
        torch.manual_seed(0)
        levels = 3 if l2 else 2
        logits = leaf(B, S, levels) if scope == "token" else leaf(B, S, G, levels)
        decays = [torch.rand(G, D, dtype=torch.float64).requires_grad_() if l2 else None for _ in range(2)]
        beta = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        config = Config(
            attention=AttentionConfig(variant=variant, **attention), routing=RoutingConfig(mode=mode, scope=scope),
            memory_hierarchy=MemoryConfig(l2=L2Config(enabled=l2), l3=L3Config(enabled=True)),
        )  # fmt: skip
        return Layer(
            leaf(B, S, H, D), leaf(B, S, G, D), leaf(B, S, G, D), RouteInputs(logits, beta, *decays),
            torch.rand(D, dtype=torch.float64) + 0.5, layout(documents), config,
        )  # fmt: skip

    def normed(self, x: Tensor) -> Tensor:
        return oracle.rms_norm(x, self.norm, 1e-6)

    @property
    def finish(self) -> Finish:
        cos, sin = oracle.tables(self.where.positions, D, 1e4)
        return Finish(self.normed, self.normed, lambda x, _: apply_rope(x, cos.to(x.dtype), sin.to(x.dtype)))

    def finished(self, x: Tensor) -> Tensor:
        return oracle.rotate(self.normed(x), self.where.positions, 1e4)

    def memory(self, selector: str = "exact") -> Memory:
        return Memory(chunks=Chunks.of(self.where, C), selector=SELECTORS[selector])

    def attend(self, variant=None) -> tuple[Tensor, Tensor]:
        variant = variant or (fastmka if self.config.attention.variant == "fastmka" else mka)
        return variant.attend(
            self.q, self.k, self.v, finish=self.finish, route=self.route, documents=self.where, scale=SCALE,
            config=self.config, memory=self.memory(),
        )[:2]  # fmt: skip

    def long_term(self, selector: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
        where = (self.where.starts, self.where.padding, C)
        planes = PLANES[0] if selector == "hash" else None
        with torch.no_grad():
            chosen = oracle.recalled(self.normed(self.q), self.normed(self.k), *where, R, planes)
        return oracle.long_term(self.q, self.k, self.v, chosen, *where)

    def levels(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Raw keys and values of every level, and where L3 exists."""
        k3, v3, exists = self.long_term()
        keys, values = [self.k], [self.v]
        if self.config.memory_hierarchy.l2.enabled:
            keys.append(oracle.ema(self.k, self.route.decay_k, self.where.starts, self.where.padding))
            values.append(oracle.ema(self.v, self.route.decay_v, self.where.starts, self.where.padding))
        return [*keys, k3], [*values, v3], exists

    def logits(self, exists: Tensor) -> Tensor:
        """[B, S, G, L], -inf where there is no L3."""
        logits = self.route.logits if self.route.logits.dim() == 4 else self.route.logits[:, :, None].expand(B, S, G, -1)
        last = torch.where(exists[:, :, None], logits[..., -1], float("-inf"))
        return torch.cat((logits[..., :-1], last[..., None]), dim=-1)

    @property
    def wanted(self) -> list[Tensor]:
        given = [self.q, self.k, self.v, self.route.logits, self.route.beta, self.route.decay_k, self.route.decay_v]
        return [x for x in given if x is not None]


def tokens(where: Documents) -> Tensor:
    return torch.ones_like(where.starts) if where.padding is None else ~where.padding


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("documents", LAYOUTS)
def test_the_level_is_that_of_the_loop(documents: str, selector: str) -> None:
    layer = Layer.make(documents)
    k3, v3, exists = layer.long_term(selector)
    found = l3_level(layer.q, layer.k, layer.v, layer.finish, layer.where, SCALE, layer.memory(selector))[:2]
    real = tokens(layer.where)[..., None, None]
    levels, exact = torch.stack(found) * real, torch.stack((k3, v3))
    assert_same(levels, exact, terms=S)
    assert_same_gradients(levels, exact, [layer.q, layer.k, layer.v], terms=B * S)
    masked = available(layer.route.logits, layer.config, layer.memory(selector))
    assert masked.shape == (B, S, 3) and bool(masked[..., :2].all())
    assert torch.equal(masked[..., 2] & tokens(layer.where), exists)
    assert bool(exists.any()) and not bool(exists.all())


def test_a_level_of_one_key_only_passes_a_bias() -> None:
    layer = Layer.make("packed")
    bias = torch.randn(G, D, dtype=torch.float64)
    memory = layer.memory()
    plain, shifted = (
        l3_level(layer.q, k, v, layer.finish, layer.where, SCALE, replace(memory, selector=Selector("exact", 9)))
        for k, v in ((layer.k, layer.v), (layer.k, layer.v + bias))
    )
    exists = layer.long_term()[2]
    assert_same(shifted[1][exists], plain[1][exists] + bias, terms=S)
    assert_bitwise(shifted[0], plain[0])


@pytest.mark.parametrize("mode", ["soft", "fixed"])
@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("fuse", ["kv", "k", "v"])
@pytest.mark.parametrize("documents", LAYOUTS)
def test_fastmka_fuses_it(documents: str, fuse: str, scope: str, l2: bool, mode: str) -> None:
    layer = Layer.make(documents, scope=scope, l2=l2, mode=mode, fuse=fuse)
    keys, values, exists = layer.levels()
    logits = layer.logits(exists)
    lam = (logits if mode == "soft" else logits.detach().clamp(min=0, max=0) + logits.isneginf() * -1e30).softmax(dim=-1)

    def blend(levels: Sequence[Tensor]) -> Tensor:
        mixed = sum(lam[..., place, None] * level for place, level in enumerate(levels))
        return levels[0] + layer.route.beta * (mixed - levels[0])

    k = blend(keys) if "k" in fuse else keys[0]
    v = blend(values) if "v" in fuse else values[0]
    seen = oracle.visible(layer.where.starts, layer.where.padding)
    exact = oracle.attention(layer.finished(layer.q), layer.finished(k), v, seen, SCALE)
    out, weights = layer.attend()
    assert_same(out, exact, terms=D * S)
    real = tokens(layer.where)
    assert_same((weights if scope == "group" else weights[:, :, None].expand_as(lam))[real], lam[real], terms=2)
    assert not bool(weights[..., -1][~exists & real].any())
    wanted = layer.wanted if mode == "soft" else [x for x in layer.wanted if x is not layer.route.logits]
    assert_same_gradients(out, exact, wanted, terms=D * B * S)


def mixture(
    layer: Layer, keys: Sequence[Tensor], values: Sequence[Tensor], bias: Tensor, exists: Tensor
) -> tuple[list[Tensor], Tensor]:
    """(outputs of each level by itself, output of one softmax over all raised by `bias` [B, S, G, L])."""
    seen = oracle.visible(layer.where.starts, layer.where.padding)
    seens = [seen] * (len(keys) - 1) + [seen & exists[:, None]]
    q = layer.finished(layer.q)
    alone = [
        oracle.attention(q, layer.finished(k), v, may, SCALE) for k, v, may in zip(keys, values, seens, strict=True)
    ]
    per_head = bias.repeat_interleave(H // G, dim=2).permute(3, 0, 2, 1)[..., None]
    raised = [
        oracle.scores(q, layer.finished(k), may, SCALE) + bias_of
        for k, may, bias_of in zip(keys, seens, per_head, strict=True)
    ]
    blind = ~seen.any(dim=2)[:, None, :, None]
    probabilities = torch.cat(raised, dim=-1).masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
    stacked = torch.cat([v.repeat_interleave(H // G, dim=2) for v in values], dim=1)
    return alone, torch.einsum("bhtu,buhe->bthe", probabilities, stacked)


@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("documents", LAYOUTS)
def test_mka_mixes_outputs_with_it(documents: str, scope: str, l2: bool) -> None:
    layer = Layer.make(documents, "mka", scope, l2)
    keys, values, exists = layer.levels()
    logits = layer.logits(exists)
    alone, _ = mixture(layer, keys, values, logits, exists)
    lam = logits.softmax(dim=-1).repeat_interleave(H // G, dim=2)
    mixed = sum(lam[..., place, None] * out for place, out in enumerate(alone))
    exact = alone[0] + layer.route.beta * (mixed - alone[0])
    out, weights = layer.attend()
    assert_same(out, exact, terms=D * S)
    assert not bool(weights[..., -1][~exists & tokens(layer.where)].any())
    assert_same_gradients(out, exact, layer.wanted, terms=D * B * S)


@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("scope", ["token", "group"])
@pytest.mark.parametrize("documents", LAYOUTS)
def test_mka_mixes_scores_with_it(documents: str, scope: str, l2: bool) -> None:
    layer = Layer.make(documents, "mka", scope, l2, mixture="score")
    keys, values, exists = layer.levels()
    logits = layer.logits(exists)
    _, exact = mixture(layer, keys, values, logits, exists)
    out, weights = layer.attend()
    real = tokens(layer.where)
    assert_same(out, exact, terms=D * S)
    expected = logits.softmax(dim=-1)
    assert_same(
        (weights if scope == "group" else weights[:, :, None].expand_as(expected))[real], expected[real], terms=2
    )
    wanted = [x for x in layer.wanted if x is not layer.route.beta]
    assert_same_gradients(out, exact, wanted, terms=D * B * S)
    (grad,) = torch.autograd.grad(layer.attend()[0].square().sum(), layer.route.logits)
    assert_same(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]), terms=D * S, scale=grad)


@pytest.mark.parametrize("mode", ["top1", "top2"])
@pytest.mark.parametrize("case", [("fastmka", {}), ("mka", {}), ("mka", {"mixture": "score"})], ids=str)
def test_hard_routes_choose_among_what_is_there(case, mode: str) -> None:
    if "mixture" in case[1] and mode == "top1":
        pytest.skip("refused: its gradient is zero")
    layer = Layer.make("gaps", case[0], "group", True, mode, **case[1])
    with torch.no_grad():
        layer.route.logits[..., 2] += 100
    exists = layer.long_term()[2]
    _, weights = layer.attend()
    real = tokens(layer.where)
    assert bool((weights[exists & real][..., 2] > 0.99).all())
    assert not bool(weights[~exists & real][..., 2].any())


@pytest.mark.parametrize("case", [("fastmka", {}), ("mka", {}), ("mka", {"mixture": "score"})], ids=str)
@pytest.mark.parametrize("documents", LAYOUTS)
def test_nothing_differs_where_nothing_is_there_yet(documents: str, case) -> None:
    """In a document's first chunk the output is that of the same layer without L3."""
    layer = Layer.make(documents, case[0], **case[1])
    without = replace(layer.config, memory_hierarchy=MemoryConfig())
    route = replace(layer.route, logits=layer.route.logits[..., :2])
    two = replace(layer, route=route, config=without).attend()[0]
    exists = layer.long_term()[2]
    first = ~exists & tokens(layer.where)
    assert_same(layer.attend()[0][first], two[first], terms=D * S)
    assert bool((layer.attend()[0][exists] != two[exists]).any())


CASES = [("fastmka", {}), ("fastmka", {"fuse": "k"}), ("mka", {}), ("mka", {"mixture": "score"})]


def changed(layer: Layer, mask: Tensor, fill: float | None, dtype: torch.dtype) -> Layer:
    """The layer in `dtype` with other inputs where `mask` [B, S] is true."""
    generator = torch.Generator().manual_seed(3)

    def other(x: Tensor) -> Tensor:
        noise = 3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        new = noise if fill is None else torch.full_like(x, fill)
        return torch.where(mask.view(B, S, *(1,) * (x.dim() - 2)), new, x.detach()).to(dtype).requires_grad_()

    decays = [layer.route.decay_k.detach().to(dtype), layer.route.decay_v.detach().to(dtype)]
    route = RouteInputs(other(layer.route.logits).float(), layer.route.beta.detach().float(), *decays)
    return replace(
        layer, q=other(layer.q), k=other(layer.k), v=other(layer.v), route=route, norm=layer.norm.to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_later_token_changes_a_bit(case, dtype: torch.dtype) -> None:
    layer = Layer.make("whole", case[0], **case[1])
    none = torch.zeros(B, S, dtype=torch.bool)
    before, _ = changed(layer, none, None, dtype).attend()
    for time in (1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 39, 40, 41, S - 1):
        mask = none.clone()
        mask[:, time:] = True
        after, _ = changed(layer, mask, None, dtype).attend()
        assert_bitwise(after[:, :time], before[:, :time])
        assert not torch.equal(after[:, time], before[:, time])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", ["packed", "gaps"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_other_document_changes_a_bit(case, documents: str, dtype: torch.dtype) -> None:
    layer = Layer.make(documents, case[0], **case[1])
    real = tokens(layer.where)
    original = changed(layer, torch.zeros_like(real), None, dtype)
    before, _ = original.attend()
    before_grads = torch.autograd.grad(before.float().square().sum(), [original.q, original.k, original.v])
    for row, begin, end in layer.where.spans:
        mask = real.clone()
        mask[row, begin:end] = False
        poisoned = changed(layer, mask, float("nan"), dtype)
        after, _ = poisoned.attend()
        assert_bitwise(after[row, begin:end], before[row, begin:end])
        grads = torch.autograd.grad(after[row, begin:end].float().square().sum(), [poisoned.q, poisoned.k, poisoned.v])
        for grad, expected in zip(grads, before_grads, strict=True):
            assert_bitwise(grad[row, begin:end], expected[row, begin:end])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_lies_on_padding_does_not_matter(case) -> None:
    layer = Layer.make("gaps", case[0], **case[1])
    real = tokens(layer.where)
    found = []
    for fill in (0.0, 1e3):
        other = changed(layer, ~real, fill, torch.float32)
        given = replace(other, route=replace(other.route, logits=layer.route.logits.detach().float()))
        out, _ = given.attend()
        grads = torch.autograd.grad(out[real].square().sum(), [given.q, given.k, given.v])
        found.append([out[real], *(grad[real] for grad in grads)])
    for one, another in zip(*found, strict=True):
        assert_bitwise(one, another)


def test_a_blend_of_zero_is_plain_attention_bit_for_bit() -> None:
    layer = Layer.make("gaps")
    layer.route = replace(layer.route, beta=torch.zeros(1, dtype=torch.float64, requires_grad=True))
    out, _ = layer.attend()
    plain, _ = layer.attend(grouped)
    assert_bitwise(out, plain)
    (grad,) = torch.autograd.grad(out.square().sum(), layer.route.beta)
    assert bool(grad.any())


@dataclass(frozen=True)
class Before(Alone):
    """A view of the slots before, kept from the attention over them."""

    q: Tensor
    k: Tensor
    v: Tensor
    layer: Layer
    begin: int

    def carry(self, name: str, x: Tensor, decay: Tensor, documents: Documents) -> Tensor:
        earlier = {"k": self.k, "v": self.v}[name]
        where = self.layer.where
        padding = None if where.padding is None else where.padding[:, : self.begin]
        state = oracle.ema(earlier, decay, where.starts[:, : self.begin], padding)[:, -1]
        return torch.where(documents.continues[:, None, None], state, x[:, 0])

    def queries(self, local: Tensor) -> Tensor:
        part = self.layer.where.part(0, self.begin)
        return hashing.last_queries(self._selector.queries(self.layer.normed(self.q), G), part)

    def summaries(self, local: Summaries) -> Summaries:
        chunks = Chunks.of(self.layer.where.part(0, self.begin), C)
        means = [hashing.chunk_means(x, chunks) for x in (self.k, self.v)]
        signature = self._selector.signature(self.layer.normed(self.k), chunks)
        joined = (torch.cat(pair, dim=1) for pair in zip((*means, signature), (local.k, local.v, local.signature), strict=True))
        return Summaries(*joined)

    @property
    def _selector(self) -> Selector:
        return SELECTORS["exact"]


@pytest.mark.parametrize("documents", LAYOUTS)
@pytest.mark.parametrize("begin", [8, 24, 40])
def test_a_part_of_the_rows_gets_the_level_of_the_rows(begin: int, documents: str) -> None:
    layer = Layer.make(documents)
    whole = l3_level(layer.q, layer.k, layer.v, layer.finish, layer.where, SCALE, layer.memory())[:2]
    part = layer.where.part(begin, S)
    view = Before(layer.q[:, :begin], layer.k[:, :begin], layer.v[:, :begin], layer, begin)
    memory = Memory(view, Chunks.of(part, C), SELECTORS["exact"])
    q, k, v = (x[:, begin:] for x in (layer.q, layer.k, layer.v))
    found = l3_level(q, k, v, layer.finish, part, SCALE, memory)[:2]
    for level, expected in zip(found, whole, strict=True):
        assert_same(level, expected[:, begin:], terms=D)
    late = available(layer.route.logits[:, begin:], layer.config, memory)
    assert torch.equal(late, available(layer.route.logits, layer.config, layer.memory())[:, begin:])


def test_a_memory_without_chunks_is_refused() -> None:
    layer = Layer.make("whole")
    with pytest.raises(ValueError, match=r"l3\.enabled is true: pass a memory with chunks and a selector"):
        l3_level(layer.q, layer.k, layer.v, layer.finish, layer.where, SCALE, Memory())


def test_scores_over_a_part_of_rows_are_refused() -> None:
    layer = Layer.make("whole")
    part = layer.where.part(8, 16)
    bias = torch.zeros(B, 8, 1, dtype=torch.float64)
    q, k, v = (x[:, 8:16] for x in (layer.q, layer.k, layer.v))
    with pytest.raises(ValueError, match="mixture score works on whole rows"):
        mka.score_mixture(q, [k], [v], bias, part, SCALE)
