"""model.init_from on a directory of ours: everything comes back, and damage is refused before anything is built on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.conversion.exporting import export
from mka_megatron.files import manifest
from mka_megatron.model.build import build_model
from mka_megatron.model.gpt import GPT
from tests.helpers import training_checkpoints as made

CASES = {
    "fastmka": ["attention.variant=fastmka"],
    "untied gqa": ["attention.variant=gqa", "model.tie_embeddings=false"],
    "hashed recall, a gate per head": ["attention.variant=blockmka", "memory_hierarchy.l1.window=128", "routing.scope=group",
                                      "memory_hierarchy.l3.enabled=true", "data.pad_documents_to_chunks=true"],
}


def directory_of(case: str, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An exported model, and its Megatron parameters."""
    config = made.config_of("engine.zero_stage=0", *CASES[case])
    shards = made.parameters(config)
    export(made.write(tmp_path / "step-7", config, shards), tmp_path / "model")
    return tmp_path / "model", shards[0]


def load(directory: Path, topology) -> GPT:
    config = load_config([], [f"model.init_from={directory}", "data.pad_documents_to_chunks=true", "model.vocab_multiple=32"])
    return build_model(config, topology, 40)


@pytest.mark.parametrize("case", CASES)
def test_everything_comes_back(case: str, tmp_path: Path, topology) -> None:
    directory, wanted = directory_of(case, tmp_path)
    model = load(directory, topology)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(wanted) <= set(held)
    for name, tensor in wanted.items():
        kept = tensor.clone()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            kept[40:] = 0  # padding is not exported
        assert torch.equal(held[name].detach(), kept), name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_refused_by_the_file(file: str, tmp_path: Path, topology) -> None:
    directory, _ = directory_of("fastmka", tmp_path)
    if file == "config.json":
        path = directory / file
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    else:
        flip(directory / file)
    with pytest.raises(ConfigError, match=rf"{file} is damaged"):
        load(directory, topology)


def test_ours_without_a_route_is_incomplete(tmp_path: Path, topology) -> None:
    directory, _ = directory_of("fastmka", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.route.gate.fc2"]
    save_file(tensors, directory / "model.safetensors")
    (directory / manifest.NAME).unlink()
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.1\.self_attn\.route\.gate\.fc2"):
        load(directory, topology)


def test_a_plain_directory_leaves_the_route_alone(tmp_path: Path, topology) -> None:
    directory, _ = directory_of("fastmka", tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    tensors = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if ".route." not in name}
    save_file(tensors, directory / "model.safetensors")
    (directory / manifest.NAME).unlink()
    kept = {key: value for key, value in raw.items() if key not in ("mka", "auto_map")} | raw["mka"]["base"]
    (directory / "config.json").write_text(json.dumps(kept))
    model = load(directory, topology)
    betas = [parameter for name, parameter in model.named_parameters() if name.endswith("beta")]
    assert len(betas) == 2 and not any(beta.detach().any() for beta in betas)
