"""The state of fp16's dynamic loss scale, which every DeepSpeed optimizer keeps under other names."""

from __future__ import annotations

from typing import Any

_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def capture(optimizer: Any) -> dict[str, float]:
    """Of a DeepSpeed optimizer: plain numbers; empty where there is no loss scale."""
    scaler = _scaler(optimizer)
    values = {key: getattr(scaler, key, None) for key in _FIELDS}
    return {key: value for key, value in values.items() if value is not None}


def restore(optimizer: Any, state: dict[str, float]) -> None:
    """Put back what :func:`capture` returned; what this optimizer does not count (ZeRO 0: hysteresis) is left out."""
    scaler = _scaler(optimizer)
    for key, value in state.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _scaler(optimizer: Any) -> Any:
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
