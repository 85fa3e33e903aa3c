"""What is measured of generation is there, belongs to its phase, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.config.load import load_config
from mka_megatron.inference.generate import remember
from mka_megatron.inference.measure import PROFILED, PeakMemory, Plan, measure
from mka_megatron.inference.profiling import profiled
from mka_megatron.model.build import build_model
from tests.unit.inference.test_footprint import BATCH, CHUNKS, FP32, GROUPS, LAYERS, PAGE, PROMPT, D
from tests.unit.model.test_causality import CASES, TINY, VOCAB

MIB = 1 << 20


@pytest.mark.parametrize("variant", ["gqa", "blockmka"])
def test_a_cell_has_every_figure(variant: str, topology) -> None:
    config = load_config([], [*TINY, *CASES[variant]])
    model = build_model(config, topology, VOCAB).eval()
    plan, done = Plan(warmup=2, iterations=3, prefill_seconds=60, prefill_slots=8), []
    found = measure(model, config, topology, BATCH, PROMPT, plan, done.append)
    assert sum(done) == 2 * PROMPT + plan.new_tokens and plan.new_tokens == 5 + PROFILED
    assert len(found["prefill_all_seconds"]) == 3  # as many as tokens, for the time was not used up
    assert found["prefill_seconds"] == sorted(found["prefill_all_seconds"])[1]
    assert found["prefill_tok_s"] == pytest.approx(BATCH * PROMPT / found["prefill_seconds"])
    assert found["decode_tok_s"] == pytest.approx(1000 * BATCH / found["ms_per_token_mean"])
    for phase in ("prefill", "decode"):
        assert 0 < found[f"{phase}_core_share"] < found[f"{phase}_attention_share"] < 1
        assert 0 <= found[f"{phase}_peak_bytes"] < 1 << 30
    assert found["operator_calls_per_token"] > 20
    paged = variant == "blockmka"
    assert found["cache"] == ("paged" if paged else "contiguous")
    vectors = 0 if paged else LAYERS * BATCH * PROMPT * GROUPS * 2 * D * FP32
    pages = LAYERS * BATCH * CHUNKS * GROUPS * PAGE if paged else 0
    assert found["kv_device_bytes"]["tokens"] == (vectors or LAYERS * BATCH * 4 * GROUPS * 2 * D * FP32)
    assert found["kv_cache_bytes"]["dram"] == pages
    if not paged:
        read = LAYERS * GROUPS * 2 * D * FP32 * (PROMPT + 2 + 2)  # the mean of tokens 3, 4 and 5, themselves included
        assert found["kv_bytes_read_per_token"] == read


def test_a_profile_sees_the_pass_alone_and_leaves_nothing(topology) -> None:
    config = load_config([], [*TINY, *CASES["gqa"]])
    model = build_model(config, topology, VOCAB).eval()
    memory = remember(model, config, topology, 1, None)
    tokens = torch.randint(0, VOCAB, (1, 8))
    model.extend(tokens, memory, last=True)
    calls = [profiled(model, memory, lambda: model.extend(tokens[:, :1], memory)) for _ in range(2)]
    assert calls[0].calls == calls[1].calls > 20
    assert (calls[0] + calls[1]).calls == 2 * calls[0].calls
    assert "attend" not in vars(memory)
    attention = model.decoder.layers[0].self_attention
    assert not attention._forward_hooks and not attention._forward_pre_hooks
    # work around the layers is the pass's, not theirs
    heavier = profiled(model, memory, lambda: (model.extend(tokens[:, :1], memory), torch.randn(3000, 3000).sort()))
    assert heavier.seconds > heavier.attention * 3


def test_the_peak_is_that_since_the_restart() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.restart()
    big = torch.ones(64 * MIB, dtype=torch.uint8)
    del big
    assert 63 * MIB <= peak.above() <= 96 * MIB
    peak.restart()
    assert peak.above() <= 16 * MIB
