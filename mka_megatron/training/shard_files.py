"""The files of a training checkpoint, unpickled from an allow-list with their tensors memory-mapped."""

from __future__ import annotations

import pickle
import re
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.training.manifest import Checkpoint

_REOPEN_AFTER = 256 << 20  # bytes read through the maps, whose pages count as this process's memory
_OPAQUE = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
)  # fmt: skip
"""The only classes that the pickles may name beside tensors and containers; nothing of them is needed or run."""


class _Opaque:
    """Stands for an object of DeepSpeed's."""

    def __init__(self, *arguments: object) -> None:
        pass


class ShardFiles:
    """Files of a verified checkpoint; what cannot be used raises ConfigError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._open: dict[str, dict[str, Any]] = {}
        self._read = 0

    def names(self, pattern: str) -> list[str]:
        """Files of the manifest whose whole name matches."""
        return sorted(name for name in self.checkpoint.body["files"] if re.fullmatch(pattern, name))

    def state(self, name: str) -> dict[str, Any]:
        """What was pickled into the file `name`; raises ConfigError."""
        if name not in self._open:
            self._open[name] = self._load(name)
        return self._open[name]

    def tensor(self, name: str, path: tuple[str | int, ...]) -> Tensor:
        """The tensor under the keys `path`; raises ConfigError."""
        value: Any = self.state(name)
        try:
            for key in path:
                value = value[key]
        except (KeyError, IndexError, TypeError):
            value = None
        if not isinstance(value, Tensor):
            raise self.unknown(name, f"it has no tensor {'.'.join(map(str, path))}")
        return value

    def account(self, size: int) -> None:
        """Bytes that are about to be read; the maps are let go now and then, and opened again when needed."""
        self._read += size
        if self._read > _REOPEN_AFTER:
            self._open.clear()
            self._read = 0

    def unknown(self, name: str, reason: str) -> ConfigError:
        """The file is whole, but another one than this module knows."""
        return ConfigError(f"{self.checkpoint.path / name} is not what a training of this version writes: {reason}; use it "
                           "with the version that wrote it.")

    def _load(self, name: str) -> dict[str, Any]:
        path = self.checkpoint.path / name
        if name not in self.checkpoint.body["files"]:
            raise ConfigError(f"checkpoint {self.checkpoint.path} has no file {name}: it is incomplete; use another one.")
        try:
            with torch.serialization.safe_globals([(_Opaque, each) for each in _OPAQUE]):
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"it names {show(named[1])}, which is not loaded" if named else "it cannot be unpickled"
            raise ConfigError(f"{path} is refused: {what}; use a checkpoint that you trust.") from None
        except Exception as error:  # torch's readers raise of everything on bytes that are not theirs
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{path} cannot be read ({show(reason)}); use another checkpoint.") from None
        if not isinstance(found, dict):
            raise self.unknown(name, "it holds no dictionary")
        return found
