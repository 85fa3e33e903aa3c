"""The import rules of the design, read from the source: imports point down only, and the names of Megatron
and of DeepSpeed's configuration stay in the folders that own them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mka_megatron"

# What each folder may import from the package, besides itself.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "files": {"config"},
    "ops": {"config"},
    "memory": {"ops", "config"},
    "attention": {"ops", "memory", "config"},
    "parallel": {"memory", "config"},
    "data": {"memory", "config"},
    "evaluation": {"memory", "config", "data"},
    "hf": {"attention", "ops", "memory", "config", "data"},
    "planning": {"attention", "config"},
    "model": {"attention", "parallel", "files", "ops", "memory", "config"},
    "inference": {"model", "attention", "parallel", "ops", "memory", "config"},
    "conversion": {"training", "model", "parallel", "files", "attention", "ops", "memory", "config"},
    "benchmark": {"training", "inference", "evaluation", "data", "model", "attention", "parallel", "planning", "memory", "config"},
    "dry_run": {"training", "data", "model", "attention", "parallel", "ops", "memory", "config"},
    "drills": {"training"},
    "training": {"attention", "parallel", "planning", "ops", "memory", "config", "model", "data"},
}
MEGATRON = {"model", "parallel"}
INDEXED_DATASET = "megatron.core.datasets.indexed_dataset"
DEEPSPEED = {"model", "parallel", "training"}
ASYNC_IO = ("memory", "tiers")
# Sections and keys that only DeepSpeed's JSON has.
DEEPSPEED_KEYS = {"zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping",
                  "gradient_accumulation_steps", "offload_optimizer_config", "wall_clock_breakdown",
                  "stage3_param_persistence_threshold", "loss_scale_window", "initial_scale_power"}
FILES = sorted(PACKAGE.rglob("*.py"))


def read(path: Path) -> list[str]:
    """Absolute names of the modules that a file of the package imports."""
    return imports(path.read_text(encoding="utf-8"), ("mka_megatron", *path.relative_to(PACKAGE).parts[:-1]))


def imports(source: str, package: tuple[str, ...]) -> list[str]:
    """The same for `source` in `package`; imports inside functions count."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *((node.module,) if node.module else ())))
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    folder = parts[0] if len(parts) > 1 else None
    for name in read(path):
        if under(name, "mka_megatron") and "." in name:
            target = name.split(".")[1]
            if folder is None:
                assert target == "__version__", f"the package root imports {name}"
            elif target in ALLOWED or (PACKAGE / target).exists():
                assert target == folder or target in ALLOWED[folder], f"{path} imports {name}"
        assert not under(name, "tools") and not under(name, "tests") and not under(name, "kernels"), name
        if under(name, "megatron"):
            assert folder in MEGATRON or (folder == "data" and under(name, INDEXED_DATASET)), f"{path} imports {name}"
        if under(name, "deepspeed"):
            assert folder in DEEPSPEED or parts[:2] == ASYNC_IO, f"{path} imports {name}"


def test_every_folder_has_a_rule() -> None:
    folders = {f.parent.name for f in PACKAGE.glob("*/*.py")}
    assert folders <= set(ALLOWED), "a new folder needs a line in ALLOWED"


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_deepspeed_keys_stay_in_one_file(path: Path) -> None:
    if path.name == "deepspeed_config.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & DEEPSPEED_KEYS, f"{path} names DeepSpeed keys {sorted(strings & DEEPSPEED_KEYS)}"


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_one_place_asks_which_variant_it_is(path: Path) -> None:
    """A variant is a registry entry: no comparison with its name outside the configuration's checks."""
    if path.relative_to(PACKAGE).as_posix() in ("config/validate.py", "config/variants.py"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {side.attr for side in sides if isinstance(side, ast.Attribute)} | {
                side.id for side in sides if isinstance(side, ast.Name)}
            assert "variant" not in names, f"{path}:{node.lineno} compares a variant's name"


def test_nested_relative_and_aliased_imports_are_seen() -> None:
    source = "def f():\n    from ..model import gpt as g\n    import megatron.core as m\nfrom . import x\n"
    assert set(imports(source, ("mka_megatron", "attention"))) == {
        "mka_megatron.model.gpt", "megatron.core", "mka_megatron.attention.x"}
