"""What transformers expects of its language models holds of ours: padding, packing, checkpointing, resizing, loading."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, masking_utils

from mka_megatron.config.errors import ConfigError
from mka_megatron.files import manifest
from mka_megatron.hf.configuration import MKAQwen2Config
from tests.helpers.hf_checkpoints import SHAPE, TOKENS
from tests.helpers.hf_patched import VARIANTS, patched
from tests.helpers.numerics import assert_bitwise, assert_same

TERMS = 4 * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"]
"""Sums on the way from a token to a logit."""


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return patched("qwen3", VARIANTS[request.param])


def logits_of(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, model):
    lengths = (41, 57)
    rows = [TOKENS[row, :length] for row, length in enumerate(lengths)]
    batch, mask = torch.full((2, 57), 7), torch.zeros(2, 57, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(57 - len(tokens), 57) if side == "left" else slice(0, len(tokens))
        batch[row, place], mask[row, place] = tokens, 1
    together = logits_of(model, batch, attention_mask=mask)
    for row, tokens in enumerate(rows):
        assert_same(together[row][mask[row].bool()], logits_of(model, tokens[None])[0], TERMS)


def test_packed_documents_do_not_see_each_other(model):
    lengths = (13, 30, 21)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = logits_of(model, TOKENS[:1, : sum(lengths)], position_ids=positions)
    for part, tokens in zip(packed.split(lengths, dim=1), TOKENS[:1, : sum(lengths)].split(lengths, dim=1), strict=True):
        assert_same(part, logits_of(model, tokens), TERMS)


def test_the_future_changes_nothing(model):
    other = TOKENS.clone()
    other[:, 50:] = (other[:, 50:] + 1) % SHAPE["vocab_size"]
    assert_bitwise(logits_of(model, other)[:, :50], logits_of(model)[:, :50])


def test_no_square_mask_is_built(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a mask is built")

    for name in masking_utils.AttentionMaskInterface._global_mapping:
        monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, name, refuse)
    mask = torch.ones_like(TOKENS)
    mask[0, :9] = 0
    logits_of(model)
    logits_of(model, attention_mask=mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, model):
    def gradients():
        model.zero_grad()
        mask = torch.ones_like(TOKENS)
        mask[0, :5] = 0
        model(TOKENS, attention_mask=mask, labels=TOKENS.masked_fill(mask == 0, -100)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    model.activation_checkpointing_disable()
    model.disable_input_require_grads()
    model.eval()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert_same(again[name], gradient, TERMS)


def test_labels_and_hidden_states_as_everywhere():
    model = patched("llama", VARIANTS["blockmka"])
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    with torch.no_grad():
        out = model(TOKENS, attention_mask=mask, labels=TOKENS, output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(TOKENS), attention_mask=mask).logits
        last = model(TOKENS, attention_mask=mask, logits_to_keep=1).logits
        as_tuple = model(TOKENS, attention_mask=mask, return_dict=False)
    nll = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_same(out.loss, nll, TERMS)
    assert len(out.hidden_states) == SHAPE["num_hidden_layers"] + 1
    assert all(state.shape == (*TOKENS.shape, SHAPE["hidden_size"]) for state in out.hidden_states)
    assert_bitwise(embedded, out.logits)
    assert_same(last, out.logits[:, -1:], TERMS)
    assert_bitwise(as_tuple[0], out.logits)
    with pytest.raises(ValueError, match="output_attentions"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_a_copy_is_the_same_model():
    model = patched("qwen2", VARIANTS["fastmka over blocks"])
    before = logits_of(model)
    again = copy.deepcopy(model)
    assert_bitwise(logits_of(again), before)
    with torch.no_grad():
        again.model.layers[0].self_attn.route.beta.add_(1)
    assert not torch.equal(logits_of(again), before)
    assert_bitwise(logits_of(model), before)


@pytest.mark.parametrize("family", ["qwen2-tied", "llama"])
def test_the_vocabulary_can_be_resized(family, tmp_path):
    model = patched(family, VARIANTS["fastmka"])
    before = logits_of(model)
    model.resize_token_embeddings(SHAPE["vocab_size"] + 8, mean_resizing=False)
    assert_same(logits_of(model)[..., : SHAPE["vocab_size"]], before, TERMS)
    model.save_pretrained(tmp_path)
    assert_bitwise(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_bf16_and_the_base_model_load_too(tmp_path):
    patched("qwen2", VARIANTS["fastmka over blocks"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_bitwise(logits_of(again), logits_of(model))
    base = AutoModel.from_pretrained(tmp_path, dtype="auto")
    with torch.no_grad():
        assert_bitwise(base(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_a_manifest_does_not_outlive_what_it_lists(tmp_path):
    """An imported directory that is trained and saved in place is loaded again by everything that checks manifests."""
    model = patched("qwen2", VARIANTS["fastmka"])
    model.save_pretrained(tmp_path)
    manifest.write(tmp_path, {})
    manifest.verify(tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / manifest.NAME).is_file()  # other ranks remove nothing
    model.save_pretrained(tmp_path)
    assert manifest.verify(tmp_path) is None


def test_missing_route_tensors_get_their_first_values(tmp_path):
    model = patched("qwen2", VARIANTS["fastmka over blocks"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".route." not in name and "planes" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    fresh = patched("qwen2", VARIANTS["fastmka over blocks"], stirred=False)
    assert {name for name in model.state_dict() if name not in kept} == set(report["missing_keys"])
    for name, tensor in fresh.state_dict().items():
        if name.endswith(("fc1", "gate.fc2")) and "core_gate.fc2" not in name:
            found = again.state_dict()[name]
            assert found.shape == tensor.shape and bool(found.any()) and found.std() < 0.03
        else:
            assert torch.equal(again.state_dict()[name], tensor), name


def test_a_new_model_needs_no_checkpoint():
    model = AutoModelForCausalLM.from_config(MKAQwen2Config(**SHAPE))
    assert torch.isfinite(logits_of(model)).all()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(MKAQwen2Config(**SHAPE))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_a_wrong_block_is_a_sentence(tmp_path):
    config = patched("qwen2", VARIANTS["blockmka"]).config
    config.mka["memory_hierarchy"]["l1"]["window"] = 12
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"l1\.window is 12"):
        AutoConfig.from_pretrained(tmp_path)
