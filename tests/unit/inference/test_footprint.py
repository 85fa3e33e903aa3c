"""The bytes that are reported are those that shapes and layout give."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.config.load import load_config
from mka_megatron.inference.footprint import footprint, read_per_token
from mka_megatron.inference.generate import generate, remember
from mka_megatron.memory.generation import open_pages
from mka_megatron.model.build import build_model
from tests.unit.model.test_causality import CASES, TINY, VOCAB

LAYERS, HEADS, GROUPS, D, FP32, FP64 = 2, 4, 2, 16, 4, 8  # of TINY
CHUNK, WINDOW, RECALLED, QUERIES = 4, 8, 2, 16
BATCH, PROMPT = 3, 22
CHUNKS = 6  # the last one of 2 tokens
LATENT = 16 + 8  # and a rotary key
PAGE = 832  # a head of 128 bytes, a code of 8, 2 * (4 + 1) * 16 numbers of 4 and a checksum of 8; in units of 64
EMA = 2 * GROUPS * D * FP32

PER_ROW = {
    "mha": {"tokens": PROMPT * 2 * HEADS * D * FP32},
    "mqa": {"tokens": PROMPT * 2 * D * FP32},
    "gqa": {"tokens": PROMPT * 2 * GROUPS * D * FP32},
    "mla": {"tokens": PROMPT * LATENT * FP32},
    "mka-output": {"tokens": 2 * PROMPT * 2 * GROUPS * D * FP32, "state": EMA},
    "fastmka": {"tokens": PROMPT * 2 * GROUPS * D * FP32, "state": EMA},
    "blockmka": {
        "tokens": CHUNK * 2 * GROUPS * D * FP32, "state": QUERIES * GROUPS * D * FP64,
        "summaries": CHUNKS * GROUPS * (2 * D * FP32 + 8), "dram": CHUNKS * GROUPS * PAGE,
    },
    "fastmka-block": {
        "tokens": CHUNK * 2 * GROUPS * D * FP32, "state": QUERIES * GROUPS * D * FP64 + EMA,
        "summaries": CHUNKS * GROUPS * (2 * D * FP32 + 8), "dram": CHUNKS * GROUPS * PAGE,
    },
}  # fmt: skip
"""Of a layer."""


@pytest.mark.parametrize("variant", PER_ROW)
def test_bytes_kept_are_those_of_the_shapes(variant: str, topology) -> None:
    config = load_config([], [*TINY, *CASES[variant]])
    model = build_model(config, topology, VOCAB).eval()
    store = open_pages(config, torch.float32, topology.device, run="test")
    memory = remember(model, config, topology, BATCH, store)
    prompts = torch.randint(0, VOCAB, (BATCH, PROMPT)).tolist()
    generate(model, memory, prompts, max_new_tokens=0, eos_id=None, positions=64, prefill_slots=9)
    found = footprint(memory, store)
    each = {name: LAYERS * BATCH * count for name, count in PER_ROW[variant].items()}
    dram = each.pop("dram", 0)
    assert {name: found.device[name] for name in ("tokens", "summaries", "state")} == {
        "tokens": 0, "summaries": 0, "state": 0, **each,
    }  # fmt: skip
    assert (found.device["open_chunk"] > 0) == (store is not None) and found.device["hot"] == 0
    assert found.tiers == {"device": sum(found.device.values()), "dram": dram, "ssd": 0}
    assert found.allocated >= found.tiers["device"]
    if store is not None:
        store.close()


def read_by_hand(chunk_of: list[int], prompt: int, token: int) -> tuple[int, int]:
    """Tokens and summaries that a new token sees of a row whose tokens lie in `chunk_of`."""
    here = prompt + token
    own = chunk_of[here]
    near = sum(own - WINDOW // CHUNK < chunk <= own for chunk in chunk_of[: here + 1])
    past = len({chunk for chunk in chunk_of[:here] if chunk <= own - WINDOW // CHUNK})
    return near + min(RECALLED, past) * CHUNK, past


@pytest.mark.parametrize("prompt", [1, 3, 4, 9, 16, 22])
def test_bytes_read_of_the_block_core(prompt: int) -> None:
    config = load_config([], [*TINY, *CASES["blockmka"]])
    chunk_of = [token // CHUNK for token in range(prompt)]
    chunk_of += [chunk_of[-1] + 1 + token // CHUNK for token in range(20)]
    vector = LAYERS * GROUPS * 2 * D * 2
    seen = [sum(read_by_hand(chunk_of, prompt, token)) * vector for token in range(20)]
    assert [read_per_token(config, prompt, range(t, t + 1), itemsize=2) for t in range(20)] == seen
    assert read_per_token(config, prompt, range(5, 9), itemsize=2) == sum(seen[5:9]) / 4


@pytest.mark.parametrize(
    ("variant", "numbers"),
    [
        ("mqa", 23 * 2 * D),
        ("mla", 23 * LATENT),
        ("mka-output", 2 * 23 * GROUPS * 2 * D),
        ("fastmka", 23 * GROUPS * 2 * D),
        ("fastmka-l3", (23 + RECALLED) * GROUPS * 2 * D),
        ("mka-output-l3", (3 * 23 - CHUNK + RECALLED) * GROUPS * 2 * D),
    ],
)
def test_bytes_read_of_the_dense_core(variant: str, numbers: int) -> None:
    config = load_config([], [*TINY, *CASES[variant]])
    assert read_per_token(config, PROMPT, range(1), itemsize=4) == LAYERS * numbers * 4
