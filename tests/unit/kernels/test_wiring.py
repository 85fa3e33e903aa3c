"""The layers over the kernels: the variants call the operators that they are told to, whose threads run on the host, and
come to what they come to without."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mka_megatron.attention import blockmka, fastmka, mka
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.rope import apply_rope
from mka_megatron.config.schema import (
    AttentionConfig,
    Config,
    L1Config,
    L2Config,
    L3Config,
    MemoryConfig,
    RoutingConfig,
)
from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector
from mka_megatron.memory.view import Alone, Memory, Update
from mka_megatron.ops import block_attention
from mka_megatron.ops.block_attention.layout import Layout
from tests.helpers import block_oracle, oracle
from tests.helpers.host_block_attention import run_on_host as run_blocks_on_host
from tests.helpers.host_kernels import register_recall
from tests.helpers.host_route_fuse import run_on_host
from tests.helpers.layouts import chunked
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same

B, S, H, G, D, C, R = 2, 8 * 64 + 21, 4, 2, 64, 64, 2
SCALE = D**-0.5
VARIANTS = {"fastmka": fastmka, "mka": mka, "blockmka": blockmka}
FUSION = {"mka_host_route_fuse_forward", "mka_host_route_fuse_backward"}
BLOCKS = {"mka_host_block_attention_forward", "mka_host_block_attention_backward"}
RECALL = {"mka_host_recall_pool", "mka_host_recall_queries", "mka_host_recall_select"}


class Recorded:
    """The library, and the names of the host's kernels that were called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("mka_host_"):
            self.called.add(name)
        return getattr(self.library, name)


@pytest.fixture
def host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """The operators take CPU tensors; what they do not write is NaN."""
    recorded = Recorded(library)
    register_recall(recorded)  # type: ignore[arg-type]
    run_on_host(recorded, monkeypatch)  # type: ignore[arg-type]
    run_blocks_on_host(recorded, monkeypatch)  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield recorded
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """A layer's configuration."""

    variant: str = "fastmka"
    core: str = "dense"
    l2: bool = True
    l3: bool = False
    fuse: str = "kv"
    scope: str = "token"
    mode: str = "soft"
    normed: bool = False

    @property
    def config(self) -> Config:
        return Config(
            attention=AttentionConfig(variant=self.variant, core=self.core, fuse=self.fuse),
            routing=RoutingConfig(scope=self.scope, mode=self.mode),
            memory_hierarchy=MemoryConfig(
                l1=L1Config(window=2 * C, chunk_size=C), l2=L2Config(enabled=self.l2),
                l3=L3Config(enabled=self.l3, recalled_chunks=R),
            ),
        )  # fmt: skip

    @property
    def levels(self) -> int:
        return 1 + self.l2 + (self.l3 and self.core == "dense")

    @property
    def kernels(self) -> set[str]:
        """Those that a forward and a backward pass call."""
        fused = FUSION if self.variant == "fastmka" and self.levels > 1 else set()
        pooled = {"mka_host_recall_pool"} if self.core == "block" else set()
        return fused | (RECALL if self.l3 else pooled)


CASES = {
    "fastmka": Case(),
    "fastmka, keys": Case(fuse="k", scope="group"),
    "fastmka, values": Case(fuse="v", mode="fixed"),
    "fastmka with recall": Case(l3=True, scope="group"),
    "fastmka with recall, normed": Case(l3=True, normed=True, mode="top1"),
    "fastmka of L1 and L3": Case(l2=False, l3=True, mode="top2"),
    "fastmka over blocks": Case(core="block", l3=True, normed=True),
    "fastmka over blocks without recall": Case(core="block"),
    "blockmka": Case("blockmka", "block", l3=True),
    "local": Case("blockmka", "block"),
    "mka": Case("mka", l3=True, normed=True),
}


@dataclass(frozen=True)
class Run:
    """What a layer gave."""

    outputs: dict[str, Tensor]
    update: Update | None


def run(
    case: Case, where: Documents, backend: str, wide: bool = False, memory: Memory | None = None, half: bool = False
) -> Run:
    """Outputs, and the gradients of a fixed functional of them, of the same numbers; `wide`: in fp64; `half`: queries,
    keys and values that bf16 has and, but for `wide`, in it, where the block core has kernels, too, and an eager peer."""
    torch.manual_seed(0)
    dtype = torch.float64 if wide else torch.float32

    def leaf(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
        return torch.empty(shape).uniform_(low, high).to(dtype).requires_grad_()

    slots = where.starts.shape[1]
    # sequence first, a group's queries beside its key and value, as the projection leaves them
    projected = leaf(slots, B, G, (H // G + 2) * D)
    if half:
        rounded = projected.detach().to(torch.bfloat16)
        projected = (rounded.to(dtype) if wide else rounded).requires_grad_()
    q, k, v = projected.transpose(0, 1).split((H // G * D, D, D), dim=3)
    q = q.reshape(B, slots, H, D)
    per_group = (G,) if case.scope == "group" else ()
    leaves = {"projected": projected, "beta": leaf(1, low=0.5, high=1.0)}
    logits = core = None
    if case.variant != "blockmka":
        logits = leaves["logits"] = leaf(B, slots, *per_group, case.levels)
    if case.core == "block":
        core = leaves["core"] = leaf(B, slots, G, 1 + case.l2 + case.l3)
    decays: list[Tensor | None] = [None, None]
    if case.l2 and case.variant != "blockmka":
        decays = [leaf(G, D, low=0.1, high=0.99), leaf(G, 1, low=0.1, high=0.99)]
        leaves.update({f"decay_{name}": x for name, x in zip("kv", decays, strict=True) if name in case.fuse})
    bias = leaf(G, D).detach() if case.normed else None
    cos, sin = (x.to(dtype) for x in oracle.tables(where.positions, D, 1e4))

    def rotate(x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return apply_rope(x, cos, sin)
        return apply_rope(x, *(x.to(dtype) for x in oracle.tables(positions, D, 1e4)))

    # powers of two, so that the codes are those of fp64
    norm = (lambda x: 2 * x) if case.normed else (lambda x: x)
    selector = Selector("hash", R, hashing.planes(0, 1, 128, D), bias) if case.l3 else None
    chunks = Chunks.of(where, C) if case.l3 or case.core == "block" else None
    memory = replace(
        memory or Memory(), chunks=chunks, selector=selector, fuse_backend=backend, recall_backend=backend,
        backend={"cuda": "cuda", "reference": "eager"}[backend] if half and not wide else "reference",
    )  # fmt: skip
    out, weights, *update = VARIANTS[case.variant].attend(
        q, k, v, finish=Finish(norm, norm, rotate), route=RouteInputs(logits, leaves["beta"], *decays, core),
        documents=where, scale=SCALE, config=case.config, memory=memory,
    )  # fmt: skip
    if isinstance(memory.view, Before):
        leaves.update({f"carry_{name}": x for name, x in memory.view.carries(wide).items() if name in case.fuse})
    direction = torch.empty(out.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(
        (out * direction).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    outputs = {"out": out.detach(), "weights": weights}
    outputs.update({f"d {name}": x for name, x in zip(leaves, found, strict=True)})
    return Run(outputs, update[0] if update else None)


def compare(found: Run, peer: Run, exact: Run, *, sums: bool = True) -> None:
    """As near to fp64 as the reference is in fp32; with `sums` what sums over all tokens, as the roundoff of its sum
    allows."""
    assert found.outputs.keys() == exact.outputs.keys()
    for key, expected in exact.outputs.items():
        try:
            if sums and (key == "d beta" or key.startswith("d decay")):
                scale = torch.stack([expected.abs().max(), torch.ones((), dtype=torch.float64)])
                assert_same(found.outputs[key], expected, B * S, scale)
            else:
                assert_as_accurate(found.outputs[key], peer.outputs[key], expected)
        except AssertionError as problem:
            raise AssertionError(f"{key}: {problem}") from problem


@pytest.mark.parametrize("padded", [False, True], ids=["full chunks", "closed chunks"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_over_the_kernels(host: Recorded, name: str, padded: bool) -> None:
    case = CASES[name]
    where = chunked(B, S, C, seed=3, padded=padded)
    peer, exact = (run(case, where, "reference", wide) for wide in (False, True))
    assert host.called == set(), "the reference calls no kernel"
    found = run(case, where, "cuda")
    assert host.called == case.kernels
    compare(found, peer, exact)
    if found.update is None or peer.update is None:
        return
    if case.l3:
        assert found.update.queries is not None and peer.update.queries is not None
        assert_bitwise(found.update.queries, peer.update.queries)
    if found.update.recalled is not None:
        assert peer.update.recalled is not None
        assert int((peer.update.recalled >= 0).sum()) > 0, "something is recalled"
        assert_bitwise(found.update.recalled, peer.update.recalled)


def eager(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, summaries: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor, Tensor, Tensor] | None, bias: Tensor | None, lengths: Tensor, documents: Tensor,
) -> Tensor:  # fmt: skip
    """The block core as PyTorch's own operations compute it in the precision of q."""
    table = block_oracle.Table(layout.size, lengths, documents, layout.first, layout.count)
    stored = None if pages is None else block_oracle.Pages(*pages)
    bias = None if bias is None else bias.to(q.dtype)
    return block_oracle.attention(q, k, v, summaries, stored, bias, table, layout.window * layout.size, layout.scale)


@pytest.mark.parametrize("name", ["blockmka", "local", "fastmka over blocks without recall"])
def test_a_layer_over_the_block_kernels(host: Recorded, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16. What bf16 keys are fused to selects other chunks than what fp64 keys are."""
    monkeypatch.setitem(block_attention.BACKENDS, "eager", eager)
    case, where = CASES[name], chunked(B, S, C, seed=3)
    peer, exact = (run(case, where, "reference", wide, half=True) for wide in (False, True))
    assert host.called == set()
    found = run(case, where, "cuda", half=True)
    assert host.called == case.kernels | BLOCKS
    compare(found, peer, exact, sums=False)
    if case.l3:
        assert found.update is not None and peer.update is not None and exact.update is not None
        assert found.update.recalled is not None and bool((found.update.recalled >= 0).any())
        for each in (peer.update.recalled, exact.update.recalled):
            assert each is not None
            assert_bitwise(found.update.recalled, each)


class Before(Alone):
    """What went before, of rows that all go on: L2's states, and keys and values."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.seen: dict[tuple[str, torch.dtype], Tensor] = {}

    def carry(self, name: str, x: Tensor, decay: Tensor | None, documents: Documents) -> Tensor:
        """The same numbers in the precision of `x`, to be differentiated."""
        key = name, x.dtype
        if key not in self.seen:
            generator = torch.Generator().manual_seed(ord(name))
            self.seen[key] = torch.randn(B, G, D, generator=generator).to(x.dtype).requires_grad_()
        return self.seen[key]

    def keys_values(self, k: Tensor, v: Tensor, level: int = 0) -> tuple[Tensor, Tensor]:
        """Some."""
        some = torch.linspace(-1, 1, self.slots * D, dtype=k.dtype).view(1, self.slots, 1, D).expand(B, -1, G, -1)
        return torch.cat((some, k), dim=1), torch.cat((-some, v), dim=1)

    def carries(self, wide: bool) -> dict[str, Tensor]:
        """The states that were asked for."""
        return {name: x for (name, dtype), x in self.seen.items() if (dtype == torch.float64) == wide}


@pytest.mark.parametrize("fuse", ["kv", "k", "v"])
def test_states_that_come_in_and_go_out(host: Recorded, fuse: str) -> None:
    """As segments and context parallelism hand them on: with their gradients."""
    whole = Documents.from_starts(torch.arange(300).expand(B, -1) % 170 == 0)
    where = whole.part(70, 300)
    case = Case(fuse=fuse)
    memory = Memory(view=Before(70))
    peer, exact = (run(case, where, "reference", wide, memory) for wide in (False, True))
    found = run(case, where, "cuda", memory=memory)
    assert host.called == FUSION
    assert {key for key in exact.outputs if key.startswith("d carry")} == {f"d carry_{name}" for name in fuse}
    compare(found, peer, exact)
    assert all(bool(x.any()) for key, x in exact.outputs.items() if key.startswith("d carry"))
    for name in ("carry_k", "carry_v"):
        states = [getattr(each.update, name) for each in (found, peer, exact)]
        assert (states[0] is not None) == (name[-1] in fuse)
        if states[0] is not None:
            assert_as_accurate(*states)
            assert not states[0].requires_grad


def test_a_prefix_mean_stays_on_the_reference(host: Recorded) -> None:
    """Backends.choose sees to it; the operator itself refuses."""
    case = Case()
    mean = replace(
        case.config, memory_hierarchy=replace(case.config.memory_hierarchy, l2=L2Config(enabled=True, summary="mean"))
    )
    x, logits = torch.randn(1, 8, G, D), torch.randn(1, 8, 2)
    q = torch.randn(1, 8, H, D)
    route = RouteInputs(logits, torch.ones(1), None, None)
    finish = Finish(lambda x: x, lambda x: x, lambda x, _: x)
    with pytest.raises(ValueError, match="L2 is given as a summary: the kernels have the EMA, take the reference"):
        fastmka.attend(
            q, x, x, finish=finish, route=route, documents=Documents.unpacked(1, 8), scale=SCALE, config=mean,
            memory=Memory(fuse_backend="cuda"),
        )  # fmt: skip
    assert host.called == set()
