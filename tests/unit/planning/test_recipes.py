"""The recipes for long contexts fit into 80 GB by the planner; what their page says of them is what the planner says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mka_megatron.config.load import load_config
from mka_megatron.planning.cluster import GIB, Cluster, gpu_by_key
from mka_megatron.planning.compute import UTILISATION
from mka_megatron.planning.plan import make_plan, vocabulary

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "configs/run").glob("*_*k.yaml"))
NODES = (1, 2, 4, 8, 32)
PAGE = dict(re.findall(r"^\| `(\S+_\d+k)` \| (.+) \|$", (ROOT / "docs/long_context.md").read_text(), flags=re.MULTILINE))


def plan_of(path: Path, nodes: int, *overrides: str):
    config = load_config(path, overrides, world_size=8 * nodes)
    return make_plan(config, Cluster(gpu_by_key("h100-80g"), 8, nodes, 1024 * GIB, None), vocabulary(config)[0], UTILISATION)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_fits_as_its_page_says(path: Path) -> None:
    for nodes, cell in zip(NODES, PAGE[path.stem].split(" | "), strict=True):
        plan = plan_of(path, nodes)
        assert not plan.shortages, nodes
        gib = sum(part.bytes for part in plan.device) / GIB
        assert abs(float(cell.split(" · ")[0]) / gib - 1) < 0.05, f"{nodes} nodes: run tools/plan.py again for docs/long_context.md"


@pytest.mark.parametrize(("recipe", "override"), [
    ("qwen2.5-7b_256k", "training.recompute=none"),
    ("qwen2.5-14b_256k", "engine.zero_stage=1"),
    ("qwen2.5-14b_256k", "training.logits_tile=null"),
])
def test_what_does_not_fit_is_refused(recipe: str, override: str) -> None:
    assert plan_of(ROOT / f"configs/run/{recipe}.yaml", 1, override).shortages
