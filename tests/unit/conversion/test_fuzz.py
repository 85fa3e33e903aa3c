"""Damaged models: refused in one sentence with nothing written and little memory used, or read for what they are."""

from __future__ import annotations

import json
import os
import random
import shutil
import tracemalloc

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.conversion.importing import import_model
from mka_megatron.conversion.stripping import strip_model
from mka_megatron.files import manifest
from tests.helpers import damage
from tests.helpers.hf_checkpoints import random_model, save
from tests.helpers.model_directories import contents

ROUNDS = 24
MEMORY = 64 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Plain and imported, in one file and in several; small ones, since every round copies them."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for sharded in (False, True):
        plain = save(random_model("qwen2-tied"), root / f"plain-{sharded}", sharded)
        import_model(plain, root / f"ours-{sharded}")
        found[f"plain-{sharded}"], found[f"ours-{sharded}"] = plain, root / f"ours-{sharded}"
    return found


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def attempt(directory, work):
    """Whether it was accepted. Anything but a ConfigError of one line, or a trace of the output, fails."""
    run = strip_model if directory.name.startswith("ours") else import_model
    output = work / "out"
    before = contents(directory)
    tracemalloc.start()
    try:
        run(directory, output)
        accepted = True
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
        accepted = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    assert contents(directory) == before
    assert accepted == output.exists()
    assert sorted(path.name for path in work.iterdir()) == sorted([directory.name, *(["out"] if accepted else [])])
    shutil.rmtree(output, ignore_errors=True)
    return accepted


def tensors(file):
    """Names, dtypes, shapes and offsets that the header gives."""
    data, length = damage.header_of(file)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


@pytest.mark.parametrize("name", ["plain-False", "plain-True", "ours-False"])
@pytest.mark.parametrize("kind", damage.WEIGHTS, ids=lambda kind: kind.__name__)
def test_damaged_weights(kind, name, models, tmp_path):
    draw = random.Random(f"{kind.__name__} {name}")  # noqa: S311
    for _ in range(ROUNDS // 3):
        directory = shutil.copytree(models[name], tmp_path / models[name].name)
        if name.startswith("ours"):
            (directory / manifest.NAME).unlink()  # which would notice everything
        file = draw.choice(sorted(directory.glob("*.safetensors")))
        before = tensors(file)
        kind(file, draw)
        if attempt(directory, tmp_path) and file.name != "model-mka.safetensors":
            assert tensors(file) == before
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", ["plain-True", "ours-True"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", manifest.NAME])
def test_damaged_json(file, name, models, tmp_path):
    draw = random.Random(f"{file} {name}")  # noqa: S311
    if not (models[name] / file).exists():
        pytest.skip("a plain model has no manifest")
    for _ in range(ROUNDS):
        directory = shutil.copytree(models[name], tmp_path / models[name].name)
        if file != manifest.NAME:
            (directory / manifest.NAME).unlink(missing_ok=True)
        damage.mutate_json(directory / file, draw)
        attempt(directory, tmp_path)
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", ["plain-False", "ours-False"])
def test_changed_configurations(name, models, tmp_path):
    draw = random.Random(name)  # noqa: S311
    for _ in range(2 * ROUNDS):
        directory = shutil.copytree(models[name], tmp_path / models[name].name)
        (directory / manifest.NAME).unlink(missing_ok=True)
        damage.change_config(directory / "config.json", draw)
        attempt(directory, tmp_path)
        shutil.rmtree(directory)


def test_every_flipped_bit_is_noticed_where_there_is_a_manifest(models, tmp_path):
    draw = random.Random(0)  # noqa: S311
    for _ in range(ROUNDS):
        directory = shutil.copytree(models["ours-True"], tmp_path / "ours-True")
        file = draw.choice(sorted(directory.glob("model-0*.safetensors")))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        assert not attempt(directory, tmp_path)
        with pytest.raises(ConfigError, match=file.name):
            manifest.verify(directory)
        shutil.rmtree(directory)
