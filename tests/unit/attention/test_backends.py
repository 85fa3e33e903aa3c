"""Which implementations a configuration comes to, on a machine with the kernels and on one without."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.attention.backends import Backends
from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import fuses
from mka_megatron.ops import library

CHUNKED = ["data.pad_documents_to_chunks=true", "model.head_dim=64"]
BLOCK = [*CHUNKED, "attention.core=block", "memory_hierarchy.l1.window=256"]
L3 = [*CHUNKED, "memory_hierarchy.l3.enabled=true"]
CASES = [
    (["attention.variant=gqa"], ("reference", "reference", "reference")),
    (["model.head_dim=64"], ("reference", "cuda", "reference")),
    (["memory_hierarchy.l2.summary=mean"], ("reference", "reference", "reference")),
    (["memory_hierarchy.l2.enabled=false"], ("reference", "reference", "reference")),
    (L3, ("reference", "cuda", "cuda")),
    ([*L3, "memory_hierarchy.l2.enabled=false"], ("reference", "cuda", "cuda")),
    ([*L3, "memory_hierarchy.l3.selection=exact"], ("reference", "cuda", "reference")),
    ([*L3, "attention.variant=mka"], ("reference", "reference", "cuda")),
    (BLOCK, ("cuda", "cuda", "cuda")),
    ([*BLOCK, "attention.variant=blockmka"], ("cuda", "reference", "cuda")),
    ([*BLOCK, "memory_hierarchy.l1.chunk_size=32"], ("flex", "cuda", "reference")),
    ([*BLOCK, "model.head_dim=256"], ("flex", "cuda", "cuda")),
    ([*BLOCK, "memory_hierarchy.l2.summary=mean"], ("cuda", "reference", "cuda")),
    ([*BLOCK, "attention.block_backend=flex"], ("flex", "cuda", "cuda")),
]


def config(*overrides: str) -> Config:
    return load_config([], ["data.sequence_length=1024", "model.max_position_embeddings=1024", *overrides])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with the kernels."""
    monkeypatch.setattr(library, "available", lambda: (True, ""))


@pytest.mark.parametrize(("overrides", "expected"), CASES, ids=[" ".join(case[0]) for case in CASES])
@pytest.mark.usefixtures("kernels")
def test_auto_takes_what_is_there(overrides: list[str], expected: tuple[str, str, str]) -> None:
    chosen = config(*overrides)
    assert Backends.choose(chosen, torch.bfloat16, "cuda") == Backends(*expected)
    if chosen.attention.block_backend == "auto":
        assert Backends.choose(chosen, torch.bfloat16, "cpu") == Backends()
    plain = config(*overrides, "attention.kernels=reference")
    assert Backends.choose(plain, torch.bfloat16, "cuda") == Backends(expected[0])


@pytest.mark.parametrize(
    ("overrides", "dtype", "told"),
    [
        (["memory_hierarchy.l2.summary=mean"], torch.bfloat16, "route_fuse cannot run: it has the EMA, not the prefix mean"),
        (["model.head_dim=36"], torch.bfloat16, "route_fuse cannot run: a head's channels must be a multiple of 8, not 36"),
        ([], torch.float64, "route_fuse cannot run: its dtypes are .*, not torch.float64"),
        ([*BLOCK, "memory_hierarchy.l1.chunk_size=32"], torch.bfloat16, "recall cannot run: its chunk sizes are 64 and 128, not 32"),
        ([*BLOCK, "model.head_dim=96"], torch.bfloat16, "recall cannot run: a head must have 64, 128, 256 channels, not 96"),
        ([*L3, "memory_hierarchy.l3.selection=exact"], torch.bfloat16, "recall cannot run: it selects by hash codes"),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_what_is_asked_for_and_not_there_is_an_error(overrides: list[str], dtype: torch.dtype, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"attention\.kernels is cuda: the kernels of {told}.*; use auto or reference"):
        Backends.choose(config(*overrides, "attention.kernels=cuda"), dtype, "cuda")


@pytest.mark.parametrize(
    ("overrides", "dtype", "told"),
    [
        (["memory_hierarchy.l1.chunk_size=32"], torch.bfloat16, "its chunk sizes are 64 and 128, not 32"),
        (["model.head_dim=96"], torch.bfloat16, "a head must have 64 or 128 channels, not 96"),
        ([], torch.float32, "its dtypes are torch.bfloat16 and torch.float16, not torch.float32"),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_block_kernels_that_are_asked_for_and_not_there_are_an_error(
    overrides: list[str], dtype: torch.dtype, told: str
) -> None:
    chosen = config(*BLOCK, *overrides, "attention.block_backend=cuda")
    said = rf"^attention\.block_backend is cuda: the kernels of block_attention cannot run: {told}; use auto, flex or reference\.$"
    with pytest.raises(ConfigError, match=said):
        Backends.choose(chosen, dtype, "cuda")
    with pytest.raises(ConfigError, match=r"cannot run: the device is cpu; use auto"):
        Backends.choose(chosen, dtype, "cpu")


@pytest.mark.parametrize(("channels", "minor", "expected"), [(128, 9, "flex"), (64, 9, "cuda"), (128, 0, "cuda")])
@pytest.mark.usefixtures("kernels")
def test_gpus_with_little_shared_memory(
    channels: int, minor: int, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, minor))
    library.tell.cache_clear()
    with caplog.at_level("INFO"):
        chosen = Backends.choose(config(*BLOCK, f"model.head_dim={channels}"), torch.bfloat16, "cuda")
    assert chosen.block == expected
    why = " (a head of 128 channels needs more shared memory than sm_89 has)"
    assert f"block_attention: {expected} on cuda{why if expected == 'flex' else ''}\n" in caplog.text


@pytest.mark.parametrize("overrides", [case[0] for case in CASES], ids=[" ".join(case[0]) for case in CASES])
def test_what_fuses_is_what_the_variant_says(overrides: list[str]) -> None:
    chosen = config(*overrides)
    variant = VARIANTS[chosen.attention.variant]
    assert fuses(chosen) == (variant.levels(chosen) > 1 and not variant.attends_each_level)
