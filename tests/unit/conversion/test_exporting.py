"""Exports of checkpoints that were put together by hand: every layout of shards, damaged and foreign files, tokenizers."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.from_hf import read_model
from mka_megatron.conversion.exporting import export
from mka_megatron.files import manifest
from mka_megatron.memory import hashing
from mka_megatron.model.hf_table import hf_table, hf_tensors
from mka_megatron.training import manifest as training_manifest
from tests.helpers import training_checkpoints as made

L3 = ("memory_hierarchy.l3.enabled=true", "data.pad_documents_to_chunks=true", "attention.variant=blockmka",
      "memory_hierarchy.l1.window=128")
LAYOUTS = {
    "zero0": ("engine.zero_stage=0",),
    "zero1": ("engine.zero_stage=1",),
    "zero3": ("engine.zero_stage=3",),
    "swapped": ("engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/tmp"),
}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(shards: list[dict[str, Tensor]], config) -> dict[str, Tensor]:
    """Tensors by the table's parts (tests/unit/model/test_hf_table.py checks those against a fusion by hand)."""
    found = {}
    for name, tensor in hf_tensors(hf_table(config, 40)).items():
        entry = tensor.entry
        pieces = [shards[rank][entry.name].narrow(entry.dim, start, length) for rank, start, length in tensor.on_ranks(len(shards))]
        found[name] = torch.cat(pieces, entry.dim)
    return found


@pytest.mark.parametrize("layout", ["zero1", "zero3", "swapped"])
def test_masters_lie_in_the_order_that_the_checkpoint_names(layout: str, tmp_path: Path) -> None:
    """Parameters of one shape would else change places without a word when a later version orders them anew."""
    config = made.config_of(*LAYOUTS[layout], "training.precision=bf16")
    shards = [dict(reversed(shard.items())) for shard in made.parameters(config)]
    export(made.write(tmp_path / "step-7", config, shards, 3, subgroup=500), tmp_path / "out", dtype="fp32")
    found, wanted = tensors_of(tmp_path / "out"), expected(shards, config)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("partitions", [1, 3, 7])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layout(layout: str, ranks: int, partitions: int, precision: str, tmp_path: Path) -> None:
    config = made.config_of(*LAYOUTS[layout], f"parallel.tensor_parallel={ranks}", f"training.precision={precision}")
    shards = made.parameters(config)
    path = made.write(tmp_path / "step-7", config, shards, partitions, subgroup=500)
    export(path, tmp_path / "out", dtype="fp32", shard_bytes=4000)
    found, wanted = tensors_of(tmp_path / "out"), expected(shards, config)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    export(path, tmp_path / "half", dtype="bf16")
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for name, tensor in load_file(tmp_path / "half/model.safetensors").items())


def test_a_swapped_layout_draws_its_planes_and_others_keep_theirs(tmp_path: Path) -> None:
    drawn = hashing.planes(0, 1, 64, 6)
    for layout in LAYOUTS:
        config = made.config_of(*LAYOUTS[layout], *L3)
        shards = made.parameters(config)
        export(made.write(tmp_path / layout, config, shards), tmp_path / f"{layout}-out")
        found = tensors_of(tmp_path / f"{layout}-out")
        for layer in range(2):
            held = shards[0][f"decoder.layers.{layer}.self_attention.core_attention.planes"]
            assert not torch.equal(held, drawn)
            assert torch.equal(found[f"model.layers.{layer}.self_attn.planes"], drawn if layout == "swapped" else held)


def test_files_and_index(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0", "model.tie_embeddings=false")
    path = made.write(tmp_path / "step-7", config, made.parameters(config))
    reported: list[int] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def __enter__(self) -> Callable[[int], object]:
            return reported.append

        def __exit__(self, *exc: object) -> None:
            assert sum(reported) == self.total

    done = export(path, tmp_path / "out", shard_bytes=5000, progress=Bar)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 2
    assert index["metadata"]["total_size"] == done.bytes == sum(reported)
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, other in index["weight_map"].items() if other == file}
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= 5000
    assert set(manifest.verify(tmp_path / "out").files) == {*files, "config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("overrides", [
    (), ("model.qkv_bias=false", "model.qk_norm=true"), ("model.qkv_bias=false", "model.tie_embeddings=false"),
    ("model.rope.scaling=llama3", "model.rope.factor=8", "model.rope.low_freq_factor=2"), ("model.rope.theta=5e5",),
    ("model.rope.scaling=yarn", "model.rope.factor=4", "model.rope.original_max_position=1024", "model.rope.beta_fast=24"),
    ("model.rope.scaling=linear", "model.rope.factor=2"), ("attention.variant=mha",), ("attention.variant=mqa",),
])
def test_config_json_says_what_the_model_is(overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0", *overrides)
    export(made.write(tmp_path / "step-7", config, made.parameters(config)), tmp_path / "out")
    read = read_model(str(tmp_path / "out"))
    heads = {"mha": 4, "mqa": 1}.get(config.attention.variant, 2)
    for name, value in read.items():
        if name == "rope" and config.model.rope.scaling in ("none", "linear"):
            assert (value.theta, value.scaling, value.factor) == (
                config.model.rope.theta, config.model.rope.scaling, config.model.rope.factor)
        else:
            assert value == (heads if name == "num_kv_heads" else getattr(config.model, name)), name


class Marker:
    """Unpickled by a loader that trusts the file, it leaves a directory behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_with_another_global_is_refused_and_not_run(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0")
    path = made.write(tmp_path / "step-7", config, made.parameters(config))
    file = path / "deepspeed/mp_rank_00_model_states.pt"
    for bad in (Marker(tmp_path / "ran"), pickle.Pickler, torch.nn.Linear(2, 2)):
        torch.save({"module": made.parameters(config)[0], "more": bad}, file)
        made.publish(path, config)
        with pytest.raises(ConfigError, match=r"is refused: it names .*; use a checkpoint that you trust\.$"):
            export(path, tmp_path / "out")
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def damage_truncated(path: Path) -> None:
    file = sorted(path.glob("deepspeed/*optim*"))[1]
    os.truncate(file, file.stat().st_size // 2)


def damage_bit(path: Path) -> None:
    file = sorted(path.glob("deepspeed/*optim*"))[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def damage_missing(path: Path) -> None:
    sorted(path.glob("deepspeed/*optim*"))[0].unlink()


def damage_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"engine.zero_stage": 3', '"engine.zero_stage": 1'))


@pytest.mark.parametrize(("damage", "said"), [
    (damage_truncated, "truncated"), (damage_bit, "SHA-256"), (damage_missing, "is missing"), (damage_manifest, "manifest.json"),
])
def test_a_damaged_checkpoint_is_not_read(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=3")
    path = made.write(tmp_path / "step-7", config, made.parameters(config), 3)
    damage(path)
    with pytest.raises(ConfigError, match=said):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("layout", "gone"), [
    ("zero0", "mp_rank_01_model_states.pt"), ("zero3", "zero_pp_rank_2_mp_rank_01_optim_states.pt"),
    ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"), ("swapped", "swapped-00003-00000.pt"),
])
def test_a_file_that_no_rank_wrote_is_named(layout: str, gone: str, tmp_path: Path) -> None:
    config = made.config_of(*LAYOUTS[layout], "parallel.tensor_parallel=2")
    path = made.write(tmp_path / "step-7", config, made.parameters(config), 3)
    (path / "deepspeed" / gone).unlink()
    made.publish(path, config)
    with pytest.raises(ConfigError, match=f"{gone.replace('.', '[.]')}: it is incomplete"):
        export(path, tmp_path / "out")


def add(shards: list[dict[str, Tensor]]) -> None:
    shards[0]["decoder.layers.0.adapter.weight"] = torch.zeros(2, 2)


def drop(shards: list[dict[str, Tensor]]) -> None:
    del shards[0]["decoder.layers.1.mlp.linear_fc2.weight"]


def reshape(shards: list[dict[str, Tensor]]) -> None:
    shards[0]["decoder.final_layernorm.weight"] = torch.zeros(25)


@pytest.mark.parametrize(("change", "named"), [(add, "adapter"), (drop, "linear_fc2"), (reshape, "final_layernorm")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_parameters_are_refused_by_name(layout: str, change: Callable, named: str, tmp_path: Path) -> None:
    config = made.config_of(*LAYOUTS[layout])
    shards = made.parameters(config)
    change(shards)
    path = made.write(tmp_path / "step-7", config, shards, 2)
    with pytest.raises(ConfigError, match=named) as caught:
        export(path, tmp_path / "out")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_and_outputs_that_are_not_empty(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0")
    shards = made.parameters(config)
    path = made.write(tmp_path / "good", config, shards)
    shards[0]["decoder.final_layernorm.weight"][3] = float("inf")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has a value that is not finite"):
        export(made.write(tmp_path / "bad", config, shards), tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad", "good"]
    with pytest.raises(ConfigError, match="is not empty"):
        export(path, tmp_path / "bad")
    with pytest.raises(ConfigError, match="not intact: it has no readable manifest"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is a training's output_dir; give one of .*step-\*"):
        export(tmp_path / "run", tmp_path / "out")


def test_another_versions_layout_or_configuration_is_named(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0")
    path = made.write(tmp_path / "step-7", config, made.parameters(config))
    body = training_manifest.read(path)
    training_manifest.write(path, body | {"layout": {"parallel.tensor_parallel": 1}})
    with pytest.raises(ConfigError, match=r"manifest\.json .* lacks 'engine\.zero_stage'"):
        export(path, tmp_path / "out")
    training_manifest.write(path, body | {"config": body["config"] | {"model": body["config"]["model"] | {"later": 1}}})
    with pytest.raises(ConfigError, match=r"model\.later in .*manifest\.json is not a configuration key"):
        export(path, tmp_path / "out")


def test_variants_and_models_without_a_form(tmp_path: Path) -> None:
    for number, (overrides, said) in enumerate(((("attention.variant=mla",), "attention.variant is mla"),
                                                (("model.qk_norm=true",), "model.qkv_bias is true with model.qk_norm true"))):
        config = made.config_of("engine.zero_stage=0", *overrides)
        plain = made.config_of("engine.zero_stage=0")
        path = made.write(tmp_path / f"step-{number}", plain, made.parameters(plain if number == 0 else config))
        made.publish(path, config)
        with pytest.raises(ConfigError, match=said):
            export(path, tmp_path / "out")


TOKENIZER = {"model": {"vocab": {f"t{i}": i for i in range(39)}}, "added_tokens": [{"id": 39, "content": "<end>"}]}


def tokenizer_at(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}, "bos_token": None}))
    (path / "notes.txt").write_text("not the tokenizer's")
    return path


def test_the_tokenizer_comes_along_and_gives_the_vocabulary(tmp_path: Path) -> None:
    trained = tokenizer_at(tmp_path / "cache/tokenizers/a1")
    config = made.config_of("engine.zero_stage=0", "model.vocab_size=null", f"data.cache_dir={tmp_path / 'cache'}")
    path = made.write(tmp_path / "step-7", config, made.parameters(config))
    done = export(path, tmp_path / "out")
    assert done.tokenizer == trained
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["vocab_size"] == 40 and written["eos_token_id"] == 39 and "bos_token_id" not in written
    assert tensors_of(tmp_path / "out")["model.embed_tokens.weight"].shape == (40, 24)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/notes.txt").exists()
    assert "tokenizer.json" in manifest.verify(tmp_path / "out").files
    second = tokenizer_at(tmp_path / "cache/tokenizers/b2")
    with pytest.raises(ConfigError, match=r"has 2 trained tokenizers; name the run's own \(--tokenizer\)"):
        export(path, tmp_path / "again")
    assert export(path, tmp_path / "again", tokenizer=second).tokenizer == second
    made.publish(path, config, state={"tokenizer": str(trained)})
    assert export(path, tmp_path / "named").tokenizer == trained
    made.publish(path, config, state={"tokenizer": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="has 2 trained tokenizers"):
        export(path, tmp_path / "ambiguous")


def test_without_its_tokenizer_a_checkpoint_needs_one_only_for_the_vocabulary(tmp_path: Path) -> None:
    lost = f"data.cache_dir={tmp_path / 'lost'}"
    known = made.config_of("engine.zero_stage=0", lost)
    assert export(made.write(tmp_path / "known", known, made.parameters(known)), tmp_path / "out").tokenizer is None
    unknown = made.config_of("engine.zero_stage=0", lost, "model.vocab_size=null")
    path = made.write(tmp_path / "unknown", unknown, made.parameters(unknown))
    with pytest.raises(ConfigError, match=r"model\.vocab_size is null: .*--tokenizer"):
        export(path, tmp_path / "other")
    with pytest.raises(ConfigError, match="no tokenizer files"):
        export(path, tmp_path / "other", tokenizer=tmp_path)


def test_remote_code_is_part_of_the_output(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=0")
    path = made.write(tmp_path / "step-7", config, made.parameters(config))

    def write(directory: Path) -> None:
        assert (directory / "config.json").exists()
        (directory / "modeling_mka.py").write_text("# code")

    export(path, tmp_path / "out", remote_code=write)
    assert "modeling_mka.py" in manifest.verify(tmp_path / "out").files


def test_random_bytes_in_any_file_are_one_sentence(tmp_path: Path) -> None:
    config = made.config_of("engine.zero_stage=3")
    path = made.write(tmp_path / "step-7", config, made.parameters(config), 2)
    files = sorted(path.glob("deepspeed/*.pt"))
    kept = {file: file.read_bytes() for file in files}
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for turn, file in zip(range(24), itertools.cycle(files), strict=False):
        data = bytearray(kept[file])
        for position in torch.randint(len(data), (40,), generator=generator).tolist():
            data[position] ^= 1 << turn % 8
        file.write_bytes(data)
        made.publish(path, config)  # a manifest that agrees with the damage
        try:
            export(path, tmp_path / f"out-{turn}")
        except ConfigError as error:
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(kept[file])
    assert refused > 8
