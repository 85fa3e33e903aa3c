"""Right after patch_model a model is what it was: logits, generated tokens, what is saved; and it can be trained."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

import mka_megatron.hf as hf
from mka_megatron.config.errors import ConfigError
from tests.helpers.hf_checkpoints import FAMILIES, SHAPE, TOKENS, random_model
from tests.helpers.hf_patched import EXACT, VARIANTS, config, patched, stir
from tests.helpers.numerics import assert_as_accurate, assert_bitwise

PROMPT = TOKENS[:, :21]
LEFT = torch.ones_like(PROMPT)
LEFT[0, :6] = 0
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


def logits_of(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, **kwargs).logits


def tokens_of(model, **kwargs):
    torch.manual_seed(11)
    return model.generate(
        PROMPT, attention_mask=LEFT, max_new_tokens=9, pad_token_id=0, use_cache=False, **kwargs
    )


@pytest.fixture(scope="module", params=FAMILIES)
def original(request):
    """Family, the unpatched model's logits, the same in fp64, and its tokens."""
    model = random_model(request.param)
    tokens = {way: tokens_of(model, **kwargs) for way, kwargs in WAYS.items()}
    logits = logits_of(model)
    return request.param, logits, logits_of(model.double()), tokens


@pytest.mark.parametrize("mode", EXACT)
def test_logits_stay(mode, original):
    family, logits, exact, _ = original
    model = patched(family, EXACT[mode], stirred=False)
    assert_as_accurate(logits_of(model), logits, exact)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["mka", "fastmka", "blockmka"])
def test_generated_tokens_stay(mode, way, original):
    family, _, _, tokens = original
    assert torch.equal(tokens_of(patched(family, EXACT[mode], stirred=False), **WAYS[way]), tokens[way])


@pytest.mark.parametrize(("variant", "family"), [*((name, "qwen2") for name in VARIANTS), ("mka", "qwen3"),
                                                 ("fastmka over blocks", "llama-tied")])  # fmt: skip
def test_what_is_saved_is_loaded(variant, family, tmp_path):
    model = patched(family, VARIANTS[variant])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not again.training
    assert not any(report.values()), report
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, loaded[name])
        else:
            assert_bitwise(loaded[name], tensor)
    assert_bitwise(logits_of(again), logits_of(model))


def test_config_json_names_us_and_the_base(tmp_path):
    patched("qwen3", VARIANTS["blockmka"]).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "mka_qwen3" and stored["architectures"] == ["MKAQwen3ForCausalLM"]
    assert stored["mka"]["base"] == {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert stored["mka"]["attention"]["variant"] == "blockmka"
    assert stored["mka"]["memory_hierarchy"]["l1"] == {"placement": "hbm", "window": 16, "chunk_size": 8}


def gradients(model):
    """Of the route: name -> it is not zero."""
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name.split(".route.")[1]: bool(p.grad is not None and p.grad.any())
            for name, p in model.named_parameters() if "layers.0.self_attn.route." in name}  # fmt: skip


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("gqa", "mka by score")])
def test_gradients_reach_beta_and_once_it_moves_every_gate(variant):
    model = patched("qwen2", VARIANTS[variant], stirred=False).train()
    route = model.model.layers[0].self_attn.route
    assert route.beta is None or not route.beta.any()
    assert route.core_gate is None or not route.core_gate.fc2.any()
    assert all(reached for name, reached in gradients(model).items() if name in ("beta", "core_gate.fc2"))
    stir(model)
    assert all(gradients(model).values())


def test_gradients_reach_the_gates_of_the_score_mixture():
    model = patched("qwen2", VARIANTS["mka by score"])
    assert all(reached for name, reached in gradients(model).items() if name != "beta")


def test_nothing_else_is_changed():
    before = modeling_qwen2.Qwen2Attention, modeling_qwen2.Qwen2Attention.forward, Qwen2ForCausalLM.forward
    shared = Qwen2Config(**SHAPE)
    ours, theirs = Qwen2ForCausalLM(shared), Qwen2ForCausalLM(shared)
    state = torch.random.get_rng_state()
    assert hf.patch_model(ours, config(VARIANTS["blockmka"])) is ours
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(theirs) is Qwen2ForCausalLM and theirs.config is shared and shared.model_type == "qwen2"
    assert not hasattr(shared, "mka") and shared.architectures is None
    assert type(theirs.model.layers[0].self_attn) is modeling_qwen2.Qwen2Attention
    assert before == (
        modeling_qwen2.Qwen2Attention, modeling_qwen2.Qwen2Attention.forward, Qwen2ForCausalLM.forward
    )


def test_the_seed_decides_the_gates():
    first, same, other = (
        hf.patch_model(random_model("qwen2"), config(VARIANTS["fastmka"]), seed=seed) for seed in (3, 3, 4)
    )
    gates = [model.model.layers[1].self_attn.route.gate.fc1 for model in (first, same, other)]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


def test_the_route_takes_the_model_s_dtype():
    model = hf.patch_model(random_model("qwen2").bfloat16(), config(VARIANTS["fastmka over blocks"]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.planes.dtype == torch.int8
    assert logits_of(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "overrides", "named"),
    [
        ({}, ["attention.variant=mla"], "attention.variant is mla"),
        ({}, ["attention.variant=mqa"], "attention.variant is mqa"),
        ({"attention_dropout": 0.1}, ["attention.variant=gqa"], "attention_dropout is 0.1"),
        ({"use_sliding_window": True, "max_window_layers": 1}, ["attention.variant=gqa"], "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["attention.variant=gqa"],
         "rope_type is dynamic"),
    ],
)  # fmt: skip
def test_what_we_do_not_compute_is_refused(changes, overrides, named):
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **changes))
    with pytest.raises(ConfigError, match=named):
        hf.patch_model(model, config(overrides))
    assert type(model) is Qwen2ForCausalLM and type(model.config) is Qwen2Config


def test_other_models_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
        hf.patch_model(model, config(VARIANTS["gqa"]))
    with pytest.raises(ConfigError, match="MKAQwen2ForCausalLM"):
        hf.patch_model(patched("qwen2", VARIANTS["gqa"]), config(VARIANTS["gqa"]))
