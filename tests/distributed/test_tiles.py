"""Tiles change what is there at a time, not what is computed: two ranks in every layout, tied and untied, ZeRO 0 to 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import torchrun
from tests.helpers.numerics import assert_bitwise, assert_same

WORKER = Path(__file__).with_name("tiles_worker.py")
MODELS = ("tied", "untied, full")
LAYOUTS = ("dp2", "tp2", "tp2-sp", "cp2")
ENGINES = [
    *(f"dp2, {model}, zero{stage}" for model in MODELS for stage in range(4)),
    "tp2, untied, full, zero2", "tp2-sp, tied, zero1", "tp2-sp, tied, zero3", "tp2-sp, untied, full, zero2", "cp2, tied, zero3",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles")
    torchrun(WORKER, path, ranks=2, timeout=600)
    return path


@pytest.fixture(scope="module")
def engines(directory: Path) -> dict:
    return json.loads((directory / "engines.json").read_text())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_bitwise_equal_and_gradients_to_roundoff(directory: Path, layout: str, model: str, rank: int) -> None:
    run = torch.load(directory / f"models-{rank}.pt", weights_only=True)[f"{layout}, {model}"]
    plain, tiled = run["plain"], run["tiled"]
    for kind in ("training", "evaluation"):
        assert_bitwise(tiled["losses"][kind], plain["losses"][kind])
    assert_bitwise(plain["losses"]["evaluation"], plain["losses"]["training"])
    assert tiled["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert gradient.any(), name
        assert_same(tiled["gradients"][name], gradient, terms=64)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ["tp2", "tp2-sp"])
def test_tensor_parallel_tiles_give_every_token_the_loss_it_has_on_one_rank(directory: Path, layout: str, model: str) -> None:
    runs = torch.load(directory / "models-0.pt", weights_only=True)
    alone, shared = runs[f"dp2, {model}"]["plain"]["losses"], runs[f"{layout}, {model}"]["tiled"]["losses"]
    assert_same(shared["training"], alone["training"], terms=64)


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_does_not_tell_them_apart(engines: dict, name: str) -> None:
    """Losses and gradient norms of two steps, the held-out loss, one hook per parameter and pass, the weights gathered."""
    plain, tiled = engines[name]["plain"], engines[name]["tiled"]
    for key in ("losses", "norms", "evaluation"):
        assert_same(torch.tensor(tiled[key]), torch.tensor(plain[key]), terms=64)
    assert tiled["hooks"] == [tiled["passes"]] and tiled["hooked"] == tiled["parameters"] == plain["parameters"]
    if name.endswith("zero3") and not name.startswith("tp2"):
        assert 0 < tiled["gathered"] <= plain["gathered"]


@pytest.mark.parametrize("name", ENGINES)
def test_no_more_logits_than_a_tile_at_a_time(engines: dict, name: str) -> None:
    tokens = 32 if name.startswith("cp2") else 64
    assert engines[name]["plain"]["largest"] == engines[name]["plain"]["largest_evaluated"] == tokens
    assert engines[name]["tiled"]["largest"] == engines[name]["tiled"]["largest_evaluated"] == 12
