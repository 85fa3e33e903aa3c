"""Compiled ops: what a configuration needs, and a killed build's lock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import EngineConfig
from mka_megatron.training import ops

NVME = EngineConfig(zero_stage=3, offload_optimizer="nvme", nvme_path="/fast")


@pytest.mark.parametrize(
    ("engine", "on_cuda", "expected"),
    [
        (EngineConfig(), False, ()),
        (EngineConfig(), True, ("fused_adam",)),
        (EngineConfig(offload_optimizer="cpu"), True, ()),
        (NVME, True, ("pin_memory", "async_io")),
        (EngineConfig(zero_stage=3, offload_param="nvme"), False, ("pin_memory", "async_io")),
    ],
)
def test_names(engine: EngineConfig, on_cuda: bool, expected: tuple[str, ...]) -> None:
    assert ops.names(engine, on_cuda) == expected


def test_pages_on_an_ssd_need_async_io_but_go_without(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.names(EngineConfig(), False, pages_on_ssd=True) == ("pin_memory", "async_io")
    monkeypatch.setattr(ops, "_builder", lambda name: Builder(False))
    ops.check(EngineConfig(), on_cuda=False, pages_on_ssd=True)
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    with pytest.raises(ConfigError, match=f"left {lock}"):
        ops.check(EngineConfig(), on_cuda=False, pages_on_ssd=True)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "async_io" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


class Builder:
    """An op that can be built here, or not."""

    def __init__(self, compatible: bool) -> None:
        self.compatible = compatible

    def is_compatible(self, verbose: bool) -> bool:
        return self.compatible


def test_an_old_lock_is_named_and_a_young_one_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_builder", lambda name: Builder(True))
    ops.check(NVME, on_cuda=False)
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    with pytest.raises(ConfigError, match=rf"async_io was killed and left {lock}: remove that file"):
        ops.check(NVME, on_cuda=False)
    ops.check(EngineConfig(), on_cuda=False)


def test_nvme_without_libaio_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_builder", lambda name: Builder(False))
    with pytest.raises(ConfigError, match="libaio-dev"):
        ops.check(NVME, on_cuda=False)
    assert ops.build("async_io").startswith("not available here")
