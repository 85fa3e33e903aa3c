"""Parity of two directories: the figures, and what counts as equal."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import mka_megatron.hf  # noqa: F401 - registers our models
from mka_megatron.config.errors import ConfigError
from mka_megatron.conversion.importing import import_model
from mka_megatron.conversion.verification import RANDOM_LENGTH, compare, logits_of, prompts_of
from tests.helpers.hf_checkpoints import random_model, save
from tests.helpers.model_directories import write_directory
from tests.helpers.numerics import assert_same

SCORE = ["attention.variant=mka", "attention.mixture=score"]
BLOCK = ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", "memory_hierarchy.l1.chunk_size=8", "memory_hierarchy.l3.enabled=true"]


def test_figures_are_those_of_the_definitions():
    first = [torch.tensor([[0.0, math.log(3)], [2.0, 0.0]]), torch.tensor([[5.0, 5.0]])]
    second = [torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[5.0, 6.0]])]
    found = compare(first, second)
    # KL of (1/4, 3/4) from (1/2, 1/2), and of (1/2, 1/2) from softmax(0, 1)
    one = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    other = 0.5 * (math.log(0.5 * (1 + math.e)) + math.log(0.5 * (1 + 1 / math.e)))
    assert found.positions == 3 and found.largest == 5 and found.max_error == pytest.approx(math.log(3))
    assert found.max_kl == pytest.approx(max(one, other)) and found.mean_kl == pytest.approx((one + other) / 3)
    assert found.top1 == pytest.approx(1 / 3)  # of equal logits the first counts
    assert found.within(0.22) and not found.within(0.21)
    same = compare(first, first)
    assert (same.max_error, same.max_kl, same.top1) == (0, 0, 1)


def test_other_shapes_and_values_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="prompt 1 gives logits"):
        compare([torch.zeros(2, 3)], [torch.zeros(2, 4)])
    with pytest.raises(ConfigError, match="not finite"):
        compare([torch.zeros(2, 3)], [torch.full((2, 3), math.nan)])


def test_prompts_come_from_the_tokenizer_or_at_random(tmp_path):
    with_tokenizer = write_directory(tmp_path / "x")
    assert len(prompts_of(with_tokenizer, None, 192)) >= 5
    plain = save(random_model("qwen2"), tmp_path / "y")
    drawn = prompts_of(plain, None, 192)
    assert all(tokens.shape == (RANDOM_LENGTH,) and 0 <= tokens.min() and tokens.max() < 192 for tokens in drawn)
    assert all(torch.equal(a, b) for a, b in zip(drawn, prompts_of(plain, None, 192), strict=True))
    with pytest.raises(ConfigError, match="no tokenizer"):
        prompts_of(plain, ["w1"], 192)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama"])
@pytest.mark.parametrize("overrides", [SCORE, BLOCK], ids=["score", "block"])
def test_exact_mode_gives_the_original_s_logits(overrides, family, tmp_path):
    """Also where the route has learned something, which shows without it."""
    x, ours = save(random_model(family), tmp_path / "x"), tmp_path / "ours"
    import_model(x, ours, [], overrides)
    added = load_file(ours / "model-mka.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in added.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(added, ours / "model-mka.safetensors")
    prompts = prompts_of(x, None, 192)[:2]
    theirs = logits_of(x, prompts, torch.float32)
    for own, exact in zip(theirs, logits_of(ours, prompts, torch.float32, exact=True), strict=True):
        assert_same(exact, own, 96)
    assert not compare(theirs, logits_of(ours, prompts, torch.float32)).within(1e-3)


def test_missing_tensors_are_not_made_up(tmp_path):
    x, ours = save(random_model("qwen2"), tmp_path / "x"), tmp_path / "ours"
    import_model(x, ours)
    added = load_file(ours / "model-mka.safetensors")
    del added["model.layers.1.self_attn.route.beta"]
    save_file(added, ours / "model-mka.safetensors")
    with pytest.raises(ConfigError, match=r"route\.beta"):
        logits_of(ours, prompts_of(x, None, 192), torch.float32)
