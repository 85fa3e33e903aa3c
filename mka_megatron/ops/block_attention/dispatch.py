"""Which implementation of the block core runs: decided once, when a model is built, and logged."""

from __future__ import annotations

import logging

from mka_megatron.config.errors import refuse

BACKENDS = ("reference", "flex")

_log = logging.getLogger(__name__)


def choose(wanted: str, device: str) -> str:
    """The backend for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    Raises ConfigError when it does not train there.
    """
    backend = ("flex" if device == "cuda" else "reference") if wanted == "auto" else wanted
    if backend not in BACKENDS:
        raise refuse("attention.block_backend", wanted, f"choose auto, {' or '.join(BACKENDS)}")
    if backend == "flex" and device != "cuda":
        raise refuse(
            "attention.block_backend",
            wanted,
            f"FlexAttention has no backward on {device}, choose auto or reference",
        )
    _log.info("block attention: %s on %s", backend, device)
    return backend
