"""The collectives and views of context parallelism on four ranks, against whole rows in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from tests.distributed.context_worker import (
    BATCH,
    CHANNELS,
    CHUNK,
    CHUNKS,
    GROUPS,
    HALOS,
    LAYOUTS,
    RECALLED,
    SLOTS,
    WORDS,
    draw,
    recalled,
    rows,
)
from tests.helpers import oracle
from tests.helpers.launch import torchrun
from tests.helpers.numerics import assert_bitwise, assert_same

RANKS = 4
FP64 = 8


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("context")
    worker = Path(__file__).with_name("context_worker.py")
    torchrun(worker, directory, ranks=RANKS, timeout=120)
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(RANKS)]


def own(whole: Tensor, rank: int) -> Tensor:
    """The shard of a rank."""
    return whole.chunk(RANKS, dim=1)[rank]


def leaf(name: str, *tail: int, slots: int = SLOTS) -> Tensor:
    return draw(name, BATCH, RANKS * slots, *tail).requires_grad_()


def compare(
    ranks: list[dict[str, Tensor]],
    name: str,
    outputs: list[dict[str, Tensor]],
    leaves: dict[str, Tensor],
    shared: tuple[str, ...] = (),
) -> None:
    """Every rank's outputs, and its share of the gradients of all ranks' functionals; `shared`: whose sum counts.

    A copy is compared bitwise; a gradient to the roundoff of its few terms.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rank, expected in enumerate(outputs):
        for key, out in expected.items():
            assert_same(ranks[rank][f"{name}/{key}"], out.detach(), terms=4 * SLOTS)
            total = total + (out * draw(f"{name}/{key}/{rank}", *out.shape)).sum()
    for key, grad in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        found = [each[f"{name}/d{key}"] for each in ranks]
        if key in shared:
            assert_same(torch.stack(found).sum(0), grad, terms=RANKS * SLOTS)
            continue
        for rank in range(RANKS):
            assert_same(found[rank], own(grad, rank), terms=4 * SLOTS, scale=grad)


def test_gathered_shards_and_their_gradients(ranks: list[dict[str, Tensor]]) -> None:
    x, y = leaf("x", 3), leaf("y", 2, 2)
    outputs = [{"x": x[:, : (r + 1) * SLOTS], "y": y[:, : (r + 1) * SLOTS]} for r in range(RANKS)]
    compare(ranks, "gather", outputs, {"x": x, "y": y})


def test_exchanged_pieces_and_their_gradients(ranks: list[dict[str, Tensor]]) -> None:
    a, b = leaf("a", 3), leaf("b", 3)

    def pieces(x: Tensor, taker: int) -> Tensor:
        lengths = [0 if giver == taker else (giver + 2 * taker) % 5 for giver in range(RANKS)]
        return torch.cat([own(x, giver)[:, :length] for giver, length in enumerate(lengths)], dim=1)

    compare(ranks, "exchange", [{"a": pieces(a, r), "b": pieces(b, r)} for r in range(RANKS)], {"a": a, "b": b})


def test_a_transposed_table(ranks: list[dict[str, Tensor]]) -> None:
    for rank in range(RANKS):
        expected = [[100 * other + 2 * rank, 100 * other + 2 * rank + 1] for other in range(RANKS)]
        assert ranks[rank]["transpose/table"].tolist() == expected


def test_bytes_of_the_collectives(ranks: list[dict[str, Tensor]]) -> None:
    shard = BATCH * SLOTS * (3 + 4) * FP64
    for rank in range(RANKS):
        given = sum((rank + 2 * other) % 5 for other in range(RANKS) if other != rank)
        taken = sum((other + 2 * rank) % 5 for other in range(RANKS) if other != rank)
        found = {key.split("/")[-1]: int(each) for key, each in ranks[rank].items() if key.startswith("collectives/")}
        assert found == {
            "gather": 3 * shard,
            "gather gradient": rank * shard,
            "exchange": 2 * BATCH * given * 3 * FP64,
            "exchange gradient": 2 * BATCH * taken * 3 * FP64,
            "transpose": 3 * 2 * FP64,
        }


@pytest.mark.parametrize("layout", LAYOUTS)
class TestViews:
    def test_carry(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        """The oracle's state of the slot before, or the first slot where a document begins."""
        documents = rows(layout, RANKS)
        x, decay = leaf("k", GROUPS, CHANNELS), draw("decay", GROUPS, CHANNELS).sigmoid().requires_grad_()
        states = oracle.ema(x, decay, documents.starts, documents.padding)
        outputs = []
        for rank in range(RANKS):
            begins = documents.starts[:, rank * SLOTS, None, None]
            outputs.append({"state": torch.where(begins, x[:, rank * SLOTS], states[:, max(0, rank * SLOTS - 1)])})
        compare(ranks, f"{layout}/carry", outputs, {"x": x, "decay": decay}, shared=("decay",))

    def test_averages_with_the_carry(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        documents = rows(layout, RANKS)
        x, decay = leaf("k", GROUPS, CHANNELS), draw("decay", GROUPS, CHANNELS).sigmoid().requires_grad_()
        states = oracle.ema(x, decay, documents.starts, documents.padding)
        outputs = [{"averages": own(states, rank)} for rank in range(RANKS)]
        compare(ranks, f"{layout}/ema", outputs, {"x": x, "decay": decay}, shared=("decay",))

    @pytest.mark.parametrize("chunks", HALOS)
    def test_halo(self, ranks: list[dict[str, Tensor]], layout: str, chunks: int) -> None:
        k, v = leaf("k", GROUPS, CHANNELS), leaf("v", GROUPS, CHANNELS)
        outputs = []
        for rank in range(RANKS):
            halo = slice(max(0, rank * SLOTS - chunks * CHUNK), rank * SLOTS)
            outputs.append({"k": k[:, halo], "v": v[:, halo]})
        compare(ranks, f"{layout}/halo{chunks}", outputs, {"k": k, "v": v})

    def test_queries(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        documents = rows(layout, RANKS)
        tokens = (draw("q", BATCH, RANKS * SLOTS, GROUPS, CHANNELS) * 1000).round()
        for rank in range(RANKS):
            expected = torch.zeros(BATCH, 16, GROUPS, CHANNELS, dtype=torch.float64)
            for row in range(BATCH):
                before = [
                    tokens[row, slot]
                    for slot in range(rank * SLOTS)
                    if documents.padding is None or not documents.padding[row, slot]
                ]
                for place, token in enumerate(reversed(before[-16:])):
                    expected[row, 15 - place] = token
            assert_bitwise(ranks[rank][f"{layout}/queries/before"], expected)

    def test_summaries(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        k, v = leaf("bar k", GROUPS, CHANNELS, slots=CHUNKS), leaf("bar v", GROUPS, CHANNELS, slots=CHUNKS)
        ends = [(rank + 1) * CHUNKS for rank in range(RANKS)]
        compare(ranks, f"{layout}/summaries", [{"k": k[:, :end], "v": v[:, :end]} for end in ends], {"k": k, "v": v})
        words = (draw("words", BATCH, RANKS * CHUNKS, GROUPS, WORDS) * 2**40).long()
        for rank, end in enumerate(ends):
            assert torch.equal(ranks[rank][f"{layout}/signatures/words"], words[:, :end])

    @pytest.mark.parametrize("chunks", HALOS)
    def test_pages(self, ranks: list[dict[str, Tensor]], layout: str, chunks: int) -> None:
        """Every recalled chunk is found where the index says, once; gradients come back to its owner."""
        table = Chunks.of(rows(layout, RANKS), CHUNK)
        numbers = recalled(RANKS, chunks)
        k, v = leaf("k", GROUPS, CHANNELS), leaf("v", GROUPS, CHANNELS)
        total = torch.zeros((), dtype=torch.float64)
        seen = 0
        for rank in range(RANKS):
            name, first = f"{layout}/pages{chunks}", rank * CHUNKS
            halo = min(chunks, first)
            index, lengths = (ranks[rank][f"{name}/table/{key}"] for key in ("index", "lengths"))
            pages = {key: ranks[rank][f"{name}/{key}"] for key in "kv"}
            weights = {key: draw(f"{name}/{key}/{rank}", *pages[key].shape) for key in "kv"}
            homes: dict[tuple[int, int, int], int] = {}
            for row in range(BATCH):
                for place in range(CHUNKS):
                    for group in range(GROUPS):
                        for at in range(RECALLED):
                            number = int(numbers[row, first + place, group, at])
                            found = int(index[row, place, group, at])
                            if number < 0:
                                assert found == -1
                            elif number >= first - halo:
                                assert found == number - (first - halo)
                            else:
                                homes[row, group, number] = found - halo - CHUNKS
            assert len({(row, group, page) for (row, group, _), page in homes.items()}) == len(homes)
            most = max([sum(key[:2] == (row, group) for key in homes) for row in range(BATCH) for group in range(GROUPS)])
            assert pages["k"].shape[2] == most
            for (row, group, number), page in homes.items():
                slots = slice(number * CHUNK, (number + 1) * CHUNK)
                for key, x in (("k", k), ("v", v)):
                    assert_bitwise(pages[key][row, group, page], x[row, slots, group].detach())
                    total = total + (x[row, slots, group] * weights[key][row, group, page]).sum()
                assert lengths[row, group, page] == table.lengths[row, number]
                seen += number // CHUNKS < rank - 1
        assert seen, "no page travelled over more than one rank"
        for key, grad in zip("kv", torch.autograd.grad(total, (k, v)), strict=True):
            for rank in range(RANKS):
                assert_same(ranks[rank][f"{layout}/pages{chunks}/d{key}"], own(grad, rank), terms=4 * SLOTS, scale=grad)

    def test_keys_and_values(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        k, v = leaf("k", GROUPS, CHANNELS), leaf("v", GROUPS, CHANNELS)
        ends = [(rank + 1) * SLOTS for rank in range(RANKS)]
        compare(ranks, f"{layout}/keys_values", [{"k": k[:, :end], "v": v[:, :end]} for end in ends], {"k": k, "v": v})

    def test_only_what_is_needed_travels(self, ranks: list[dict[str, Tensor]], layout: str) -> None:
        """The halos' bytes are those of the slots that lie in later ranks' halos, and theirs back."""
        slot = 2 * BATCH * GROUPS * CHANNELS * FP64

        def between(giver: int, taker: int, chunks: int) -> int:
            slots = range(max(0, taker * SLOTS - chunks * CHUNK), taker * SLOTS)
            return sum(giver * SLOTS <= each < (giver + 1) * SLOTS for each in slots) if giver < taker else 0

        for rank in range(RANKS):
            given = sum(between(rank, other, chunks) for other in range(RANKS) for chunks in HALOS)
            taken = sum(between(other, rank, chunks) for other in range(RANKS) for chunks in HALOS)
            assert int(ranks[rank][f"{layout}/bytes/halo"]) == given * slot
            assert int(ranks[rank][f"{layout}/bytes/halo gradient"]) == taken * slot
