"""With the cache, model.generate gives the tokens that it gives without, in every variant and way of generating."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mka_megatron.config.errors import ConfigError
from mka_megatron.hf.cache import MKACache
from tests.helpers.hf_checkpoints import SHAPE, TOKENS
from tests.helpers.hf_patched import VARIANTS, patched
from tests.helpers.numerics import assert_same

TERMS = 4 * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"]
PROMPT = TOKENS[:, :37]
LEFT = torch.ones_like(PROMPT)
LEFT[0, :6] = 0
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 30, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}
PAGED = ["blockmka", "fastmka over blocks", "blockmka, exact selection"]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return patched("qwen2", VARIANTS[request.param])


@pytest.fixture(scope="module")
def greedy(model):
    return tokens_of(model)


@pytest.fixture(scope="module", params=PAGED)
def paged(request):
    return patched("qwen3", VARIANTS[request.param])


def tokens_of(model, prompt=PROMPT, mask=LEFT, **kwargs):
    torch.manual_seed(3)
    return model.generate(prompt, **{"attention_mask": mask, "max_new_tokens": 11, "pad_token_id": 0, **kwargs})


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_without_a_cache(way, model):
    assert torch.equal(tokens_of(model, **WAYS[way]), tokens_of(model, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("width", [9, 36])
def test_a_prompt_in_pieces(width, model, greedy):
    """36 leaves one column for the last piece, which is no step of the generation."""
    assert torch.equal(tokens_of(model, prefill_chunk_size=width, max_new_tokens=5), greedy[:, : 37 + 5])


def test_rows_give_what_each_alone_gives(model, greedy):
    assert torch.equal(greedy[:1, 6:], tokens_of(model, PROMPT[:1, 6:], LEFT[:1, 6:]))
    assert torch.equal(greedy[1:], tokens_of(model, PROMPT[1:], LEFT[1:]))


def test_logits_step_by_step(model):
    """A loop of one's own: the prompt's open chunk is closed by the first single column."""
    with torch.no_grad():
        whole = model(TOKENS[:, :50], prompt_columns=37, use_cache=False).logits
        out = model(TOKENS[:, :37])
        assert isinstance(out.past_key_values, MKACache)
        pieces = [out.logits]
        for column in range(37, 50):
            out = model(TOKENS[:, column : column + 1], past_key_values=out.past_key_values)
            pieces.append(out.logits)
    assert out.past_key_values.get_seq_length() == 50
    assert_same(torch.cat(pieces, dim=1), whole, TERMS)


def test_a_second_turn_goes_on_with_the_first(model):
    cache = MKACache(model.config)
    first = tokens_of(model, past_key_values=cache)
    second = torch.cat((first, TOKENS[:, 60:71]), dim=1)
    mask = torch.cat((LEFT, torch.ones(2, second.shape[1] - LEFT.shape[1], dtype=torch.long)), dim=1)
    assert cache.get_seq_length() == first.shape[1] - 1
    made = tokens_of(model, second, mask, past_key_values=cache)
    assert cache.get_seq_length() == made.shape[1] - 1
    with torch.no_grad():
        cache = MKACache(model.config)
        model(second[:, :37], attention_mask=LEFT, past_key_values=cache)
        for column in range(37, first.shape[1] - 1):
            model(second[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
        logits = model(second[:, first.shape[1] - 1 :], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(logits[:, -1].argmax(dim=-1), made[:, second.shape[1]])


def test_a_cache_that_goes_takes_its_rows_with_it(model):
    """At once, not when somebody collects garbage: what closes chunks does not keep them."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            kept = weakref.ref(model(TOKENS[:, :18]).past_key_values.memory)
        assert kept() is None
    finally:
        gc.enable()


def test_an_empty_dynamic_cache_becomes_ours(model, greedy):
    cache = DynamicCache(config=model.config)
    assert torch.equal(tokens_of(model, past_key_values=cache, max_new_tokens=2), greedy[:, : 37 + 2])
    assert type(cache) is MKACache and cache.batch_size == 2
    assert not cache.is_compileable and not cache.is_croppable
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1


def test_rows_are_repeated_and_chosen(model):
    with torch.no_grad():
        cache = model(PROMPT, attention_mask=LEFT).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2, 3]))
        step = torch.cat((LEFT, torch.ones(2, 1, dtype=torch.long)), dim=1)[[0, 1, 1]]
        logits = model(TOKENS[:1, :1].expand(3, 1), attention_mask=step, past_key_values=cache).logits
        alone = model(torch.cat((PROMPT, TOKENS[:1, :1].expand(2, 1)), dim=1), attention_mask=step[:2], use_cache=False,
                      prompt_columns=37).logits[:, -1:]  # fmt: skip
    assert_same(logits, alone[[0, 1, 1]], TERMS)


def test_pages_on_host_and_disk_give_the_same(paged, tmp_path):
    wanted = tokens_of(paged, **WAYS["beams"])
    # room for few of the pages
    some = {"dram_gib": 1e-4, "ssd_path": str(tmp_path)}
    assert torch.equal(tokens_of(paged, cache_config=some, **WAYS["beams"]), wanted)
    cache = MKACache(paged.config, **some)
    assert torch.equal(tokens_of(paged, past_key_values=cache), tokens_of(paged))
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))
    del cache
    gc.collect()
    assert not any(path.suffix == ".pages" for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="dram_pool_gib"):
        tokens_of(paged, cache_config={"dram_gib": 1e-9})
    with pytest.raises(ConfigError, match="give dram_gib too"):
        MKACache(paged.config, ssd_path=tmp_path)


@pytest.fixture(scope="module")
def block():
    return patched("qwen2", VARIANTS["blockmka"])


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(kind, block):
    with pytest.raises(ValueError, match=f"cache_implementation is {kind}"):
        tokens_of(block, cache_implementation=kind)


def test_filled_and_static_caches_are_refused(block):
    static = StaticCache(config=block.config, max_cache_len=64)
    filled = DynamicCache(config=block.config)
    filled.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), 0)
    for cache in (static, filled):
        with pytest.raises(ValueError, match=f"past_key_values is a {type(cache).__name__}"):
            tokens_of(block, past_key_values=cache)


def test_a_model_on_several_devices_has_no_cache(block):
    block.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta"}
    with pytest.raises(ValueError, match="device_map spreads"):
        tokens_of(block)
    del block.hf_device_map


def test_nothing_is_taken_back(block):
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        tokens_of(block, TOKENS[:1, :20], LEFT[1:, :20], prompt_lookup_num_tokens=3)
    with torch.no_grad():
        cache = block(PROMPT).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)


def test_gradients_and_caches_exclude_each_other(block):
    assert block(TOKENS).past_key_values is None
    block.train()
    with pytest.raises(ValueError, match="no gradients"):
        block(TOKENS, use_cache=True)
    block.eval()


def test_packed_documents_have_no_cache(block):
    positions = torch.arange(96).remainder(40)[None]
    with torch.no_grad():
        assert block(TOKENS, position_ids=positions).past_key_values is None
        with pytest.raises(ValueError, match="packed documents have no cache"):
            block(TOKENS, position_ids=positions, use_cache=True)


def test_another_number_of_rows_is_refused(block):
    with torch.no_grad():
        cache = block(PROMPT).past_key_values
        with pytest.raises(ValueError, match="1 rows, the cache 2"):
            block(PROMPT[:1, :1], past_key_values=cache)
