"""A gqa Megatron model with a Hugging Face checkpoint's weights gives Hugging Face's logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from tests.helpers.hf_checkpoints import FAMILIES, SHAPE, TOKENS, random_model, save


def import_model(directory, topology, *overrides):
    config = load_config(
        [], [f"model.init_from={directory}", "attention.variant=gqa", "data.sequence_length=96", *overrides]
    )
    return build_model(config, topology, config.model.vocab_size).eval()


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS, Documents.unpacked(*TOKENS.shape))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_logits_equal_hugging_face(family, sharded, tmp_path, topology):
    theirs = random_model(family)
    ours = import_model(save(theirs, tmp_path, sharded), topology)
    with torch.no_grad():
        theirs32 = theirs(TOKENS).logits
        exact = theirs.double()(TOKENS).logits
    own_error = (theirs32.double() - exact).abs().max()
    error = (logits_of(ours).double() - exact).abs().max()
    assert error <= 2 * own_error + torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("variant", ["mka", "fastmka"])
def test_import_starts_function_preserving(variant, tmp_path, topology):
    theirs = random_model("qwen2")
    save(theirs, tmp_path)
    ours = import_model(tmp_path, topology, f"attention.variant={variant}")
    gqa = import_model(tmp_path, topology)
    assert torch.equal(logits_of(ours), logits_of(gqa))
    ours.train()
    ours(TOKENS, Documents.unpacked(*TOKENS.shape), TOKENS.roll(-1, 1)).sum().backward()
    betas = [p for n, p in ours.named_parameters() if n.endswith("route.beta")]
    assert len(betas) == SHAPE["num_hidden_layers"]
    assert all(p.grad.abs().item() > 0 for p in betas)


CHUNKS = ["data.pad_documents_to_chunks=true", "memory_hierarchy.l1.chunk_size=8"]
L3 = [*CHUNKS, "memory_hierarchy.l3.enabled=true"]
EXACT = {
    "a window over everything": ["attention.variant=blockmka", "memory_hierarchy.l1.window=96", *L3],
    "every chunk recalled": ["attention.variant=blockmka", "memory_hierarchy.l1.window=16", *L3,
                             "memory_hierarchy.l2.enabled=false", "memory_hierarchy.l3.recalled_chunks=12"],
    "fused, every chunk recalled": ["attention.variant=fastmka", "attention.core=block",
                                    "memory_hierarchy.l1.window=8", "memory_hierarchy.l3.recalled_chunks=12", *L3,
                                    "memory_hierarchy.l2.enabled=false"],
    "fused with L3": ["attention.variant=fastmka", *L3],
    "mixed with L3": ["attention.variant=mka", *L3],
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("mode", EXACT)
def test_import_in_exact_mode_equals_hugging_face(mode, family, tmp_path, topology):
    theirs = random_model(family)
    save(theirs, tmp_path)
    with torch.no_grad():
        theirs32 = theirs(TOKENS).logits
        exact = theirs.double()(TOKENS).logits
    own_error = (theirs32.double() - exact).abs().max()
    error = (logits_of(import_model(tmp_path, topology, *EXACT[mode])).double() - exact).abs().max()
    assert error <= 2 * own_error + torch.finfo(torch.float32).eps * exact.abs().max()


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), "model.layers.1.self_attn.k_proj.bias"),
        (lambda t: t.update({"model.layers.0.self_attn.extra": torch.zeros(2)}), "model.layers.0.self_attn.extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), "model.norm.weight"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(95, 64)}), "mlp.up_proj.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, named, tmp_path, topology):
    save(random_model("qwen2"), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ConfigError, match=named):
        import_model(tmp_path, topology)


def test_truncated_file_is_refused(tmp_path, topology):
    save(random_model("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        import_model(tmp_path, topology)


def test_pickle_only_directory_is_refused(tmp_path, topology):
    save(random_model("llama"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="as safetensors"):
        import_model(tmp_path, topology)


def test_variant_without_the_heads_is_refused(tmp_path, topology):
    save(random_model("llama"), tmp_path)
    for variant in ("mla", "mqa", "mha"):
        with pytest.raises(ConfigError, match="init_from"):
            import_model(tmp_path, topology, f"attention.variant={variant}")


def test_config_json_decides_the_shape(tmp_path):
    save(random_model("qwen3"), tmp_path)
    model = load_config([], [f"model.init_from={tmp_path}", "data.sequence_length=96"]).model
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (model.num_layers, model.qk_norm, model.qkv_bias) == (stored["num_hidden_layers"], True, False)
