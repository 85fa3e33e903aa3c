"""Greedy tokens with a memory are those without one, for whole models of every variant."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.inference.generate import generate, remember
from mka_megatron.inference.sampling import Sampling
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.generation import open_pages
from mka_megatron.memory.tiers.pages import PageKey, TierError
from mka_megatron.model.build import build_model
from mka_megatron.model.gpt import GPT
from tests.unit.model.test_causality import CASES, TINY, VOCAB

POSITIONS, NEW = 128, 13
PROMPTS = [
    torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (22, 9, 1)
]


@pytest.fixture(scope="module", params=CASES)
def built(request, topology) -> tuple[GPT, Config]:
    config = load_config([], [*TINY, *CASES[request.param], f"model.max_position_embeddings={POSITIONS}"])
    model = build_model(config, topology, VOCAB).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():  # biases and blends that are zero at the start hide errors
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, config


def without_memory(model: GPT, prompts: list[list[int]], count: int) -> list[int]:
    """Greedy tokens by the whole row each time, whose open chunk is closed behind each of the `prompts`."""
    made: list[int] = []
    while len(made) < count:
        made.append(int(logits(model, [*prompts, made])[-1].argmax()))
    return made


def logits(model: GPT, pieces: list[list[int]]) -> torch.Tensor:
    """[tokens, vocabulary] of a row of pieces that begin on chunks."""
    slots: list[int] = []
    for piece in pieces:
        begin = slots[-1] + 1 if slots else 0
        if model.chunk_size is not None:
            begin = -(-begin // model.chunk_size) * model.chunk_size
        slots += range(begin, begin + len(piece))
    tokens = torch.zeros(1, slots[-1] + 1, dtype=torch.int64)
    tokens[0, slots] = torch.tensor([token for piece in pieces for token in piece])
    padding = torch.ones_like(tokens, dtype=torch.bool)
    padding[0, slots] = False
    starts = torch.zeros_like(padding)
    starts[0, 0] = True
    with torch.no_grad():
        return model(tokens, Documents.from_starts(starts, padding))[0, slots]


def test_a_batch_gives_what_each_prompt_gives_without_memory(built, topology) -> None:
    model, config = built
    expected = [without_memory(model, [prompt], NEW) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 6, "a model that repeats itself shows nothing"
    for width in (5, 1024):
        store = open_pages(config, torch.float32, topology.device, run="test")
        memory = remember(model, config, topology, len(PROMPTS), store)
        found = generate(
            model, memory, PROMPTS, max_new_tokens=NEW, eos_id=None, positions=POSITIONS, prefill_slots=width
        )
        assert found.tokens == expected
        assert found.prompt_tokens == sum(map(len, PROMPTS)) and found.new_tokens == len(PROMPTS) * (NEW - 1)
        if store is not None:
            assert store.statistics().pages > 0
            memory.close()
            assert store.statistics().pages == 0
            store.close()


def test_a_second_turn_goes_on(built, topology) -> None:
    """The last token of an answer is given with the next prompt."""
    model, config = built
    first, second = PROMPTS[:2]
    store = open_pages(config, torch.float32, topology.device, run="test")
    memory = remember(model, config, topology, 1, store)
    options = {"max_new_tokens": 6, "eos_id": None, "positions": POSITIONS}
    [answer] = generate(model, memory, [first], **options).tokens
    assert answer == without_memory(model, [first], 6)
    [answered] = generate(model, memory, [[answer[-1], *second]], **options).tokens
    assert answered == without_memory(model, [first, answer + second], 6)
    if store is not None:
        store.close()


def test_a_memory_that_goes_is_given_up_at_once(built, topology) -> None:
    """Not when somebody collects garbage: what closes chunks does not keep it."""
    model, config = built
    store = open_pages(config, torch.float32, topology.device, run="test")
    memory = remember(model, config, topology, 1, store)
    with torch.no_grad():
        model.extend(torch.tensor([PROMPTS[1]]), memory)
    kept = weakref.ref(memory)
    gc.collect()
    gc.disable()
    try:
        del memory
        assert kept() is None
    finally:
        gc.enable()
    if store is not None:
        store.close()


def test_rows_end_at_the_end_of_text(built, topology) -> None:
    model, config = built
    expected = [without_memory(model, [prompt], NEW) for prompt in PROMPTS]
    eos = expected[1][4]
    store = open_pages(config, torch.float32, topology.device, run="test")
    memory = remember(model, config, topology, len(PROMPTS), store)
    found = generate(model, memory, PROMPTS, max_new_tokens=NEW, eos_id=eos, positions=POSITIONS)
    assert found.tokens == [row[: row.index(eos)] if eos in row else row for row in expected]
    if store is not None:
        store.close()


@pytest.fixture(scope="module")
def block(topology) -> tuple[GPT, Config]:
    config = load_config([], [*TINY, *CASES["blockmka"], f"model.max_position_embeddings={POSITIONS}"])
    return build_model(config, topology, VOCAB).eval(), config


def on_disk(config: Config, path: Path, **l3: object) -> Config:
    """Little host memory, and the rest in `path`."""
    memory = config.memory_hierarchy
    l3_there = dataclasses.replace(memory.l3, placement="ssd", dram_pool_gib=20 * 4096 / 2**30, **l3)  # type: ignore[arg-type]
    return dataclasses.replace(
        config, memory_hierarchy=dataclasses.replace(memory, l3=l3_there, ssd_spill_path=str(path))
    )


def test_tokens_are_the_same_with_pages_on_the_disk_and_nothing_stays_there(
    block, topology, tmp_path: Path
) -> None:
    model, config = block
    made = []
    for placed in (config, on_disk(config, tmp_path)):
        store = open_pages(placed, torch.float32, topology.device, run="test")
        assert store is not None
        memory = remember(model, placed, topology, len(PROMPTS), store)
        prompts = [prompt * 4 for prompt in PROMPTS]
        made.append(
            generate(model, memory, prompts, max_new_tokens=20, eos_id=None, positions=POSITIONS).tokens
        )
        found = store.statistics()
        store.close()
    assert found.ssd_pages > found.dram_pages and found.misses > 0
    assert made[0] == made[1]
    assert not any(tmp_path.iterdir())


def test_a_layers_pages_are_fetched_while_the_layer_before_computes(
    block, topology, tmp_path: Path, monkeypatch
) -> None:
    """Where a chunk opens; from token to token nothing is asked for."""
    model, config = block
    placed, size = on_disk(config, tmp_path), config.memory_hierarchy.l1.chunk_size
    store = open_pages(placed, torch.float32, topology.device, run="test")
    assert store is not None
    events: list[tuple[str, set[PageKey]]] = []
    with store:
        memory = remember(model, placed, topology, 1, store)
        # the layers have had an open chunk before
        generate(model, memory, [PROMPTS[0] * 4], max_new_tokens=size + 1, eos_id=None, positions=POSITIONS)
        for name in ("prefetch", "get"):

            def recorded(keys: list[PageKey], name: str = name, real=getattr(store, name)):  # noqa: B008
                events.append((name, set(keys)))
                return real(keys)

            monkeypatch.setattr(store, name, recorded)
        for token in range(2 * size):
            events.clear()
            with torch.no_grad():
                model.extend(torch.tensor([[token + 1]]), memory)
            if token % size == 0:
                assert [name for name, _ in events] == ["prefetch", "get", "get"]
                assert events[0][1] == events[2][1] and {key.layer for key in events[0][1]} == {1}
            else:
                assert not events


def test_a_full_disk_is_an_error_that_names_the_budget(block, topology, tmp_path: Path) -> None:
    model, config = block
    placed = on_disk(config, tmp_path, ssd_pool_gib=8.5 * 4096 / 2**30)
    store = open_pages(placed, torch.float32, topology.device, run="test")
    memory = remember(model, placed, topology, 1, store)
    with store, pytest.raises(TierError, match=r"memory_hierarchy\.l3\.ssd_pool_gib"):  # type: ignore[union-attr]
        generate(model, memory, [PROMPTS[0] * 4], max_new_tokens=5, eos_id=None, positions=POSITIONS)
    assert not any(tmp_path.iterdir())


def test_a_spill_directory_that_cannot_be_used_is_refused(block, topology, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("no directory")
    with pytest.raises(ConfigError, match=r"memory_hierarchy\.ssd_spill_path"):
        open_pages(on_disk(block[1], taken), torch.float32, topology.device, run="test")


def test_samples_follow_the_seed(block, topology) -> None:
    model, config = block

    def sample(seed: int) -> list[list[int]]:
        store = open_pages(config, torch.float32, topology.device, run="test")
        memory = remember(model, config, topology, 2, store)
        sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=seed)
        with store:  # type: ignore[union-attr]
            return generate(
                model,
                memory,
                PROMPTS[:2],
                max_new_tokens=8,
                eos_id=None,
                positions=POSITIONS,
                sampling=sampling,
            ).tokens

    assert sample(1) == sample(1) != sample(2)


def test_what_cannot_be_generated_is_refused(block, topology) -> None:
    model, config = block
    with open_pages(config, torch.float32, topology.device, run="test") as store:  # type: ignore[union-attr]
        memory = remember(model, config, topology, 1, store)
        options = {"max_new_tokens": 100, "eos_id": None, "positions": POSITIONS}
        with pytest.raises(
            ConfigError, match=r"model.max_position_embeddings is 128, too few for 40 tokens and 100"
        ):
            generate(model, memory, [[1] * 40], **options)
        for prompts in ([[]], [[1], [2]]):
            with pytest.raises(ValueError, match="at least one token"):
                generate(model, memory, prompts, **options)
