"""A saved directory loads with trust_remote_code where this package is not installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mka_megatron.config import hf_sections, plain, typed
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.hf.remote import flat_modules, write_remote_code
from tests.helpers.hf_checkpoints import TOKENS
from tests.helpers.hf_patched import VARIANTS, patched

ELSEWHERE = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mka_megatron":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
from pathlib import Path
for name in ("pydantic", "megatron", "deepspeed", "xxhash"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
results = {}
tokens = load_file("tokens.safetensors")["tokens"]
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    for times in ("once", "again"):
        with torch.no_grad():
            results[f"{directory} logits {times}"] = model(tokens).logits
        results[f"{directory} tokens {times}"] = model.generate(
            tokens[:, :67], max_new_tokens=7, do_sample=False, pad_token_id=0,
            cache_config={"dram_gib": 1e-4, "ssd_path": str(Path("spill").resolve())})
        model.save_pretrained(f"{directory}-again")
        model = AutoModelForCausalLM.from_pretrained(f"{directory}-again", trust_remote_code=True)
save_file(results, "results.safetensors")
"""


def test_a_machine_without_the_package_loads_and_saves_it(tmp_path):
    wanted = {}
    cases = {"block": ("qwen2", "fastmka over blocks"), "dense": ("qwen3", "mka with L3"), "tied": ("llama-tied", "fastmka")}
    for name, (family, variant) in cases.items():
        model = patched(family, VARIANTS[variant])
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            logits = model(TOKENS).logits
        tokens = model.generate(TOKENS[:, :67], max_new_tokens=7, do_sample=False, pad_token_id=0)
        for times in ("once", "again"):
            wanted |= {f"{name} logits {times}": logits, f"{name} tokens {times}": tokens}
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, *cases], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "results.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_files_import_each_other_torch_and_transformers_only():
    files = flat_modules()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and {node.module or alias.name for alias in node.names} <= files.keys(), name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for module in names:
                    top = module.split(".")[0]
                    assert top in {"torch", "transformers", "numpy", "deepspeed"} | sys.stdlib_module_names, (name, module)


def test_other_directories_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM"):
        write_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [("l1.window", 8, True), ("l1.window", None, True), ("l1.window", "8", False), ("l1.chunk_size", True, False),
     ("l1.chunk_size", 1.5, False), ("l2.min_span", 3, True), ("l2.summary", "mean", True), ("l2.summary", "max", False),
     ("l2.other", 1, False), ("l3", 3, False), ("l3.enabled", 1, False), ("l3.dram_pool_gib", 2, True)],
)  # fmt: skip
def test_sections_are_read_alike_without_pydantic(key, value, fits):
    raw = json.loads(json.dumps(hf_sections.to_json(Config())))
    *parents, last = key.split(".")
    inner = raw["memory_hierarchy"]
    for name in parents:
        inner = inner[name]
    inner[last] = value
    origins = {(name,): "config.json" for name in raw}
    if fits:
        assert plain.typed(raw, origins) == typed.typed(raw, origins)
        return
    for reader in (plain, typed):
        with pytest.raises(ConfigError, match=f"memory_hierarchy.{key}"):
            reader.typed(raw, origins)
