"""Which implementation of the decode runs: decided once, when a cache is built, and logged."""

from __future__ import annotations

import logging

from mka_megatron.ops import library

BACKENDS = ("reference", "cuda")

_log = logging.getLogger(__name__)


def choose(wanted: str, device: str) -> str:
    """The backend for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    Raises ValueError when it does not run there.
    """
    there, reason = library.available() if device == "cuda" else (False, f"the kernels do not run on {device}.")
    backend = ("cuda" if there else "reference") if wanted == "auto" else wanted
    if backend not in BACKENDS:
        raise ValueError(f"decode backend {wanted!r}: choose auto, {' or '.join(BACKENDS)}.")
    if backend == "cuda" and not there:
        raise ValueError(f"decode backend cuda cannot be used here: {reason}")
    _log.info("decode: %s on %s%s", backend, device, f" ({reason})" if device == "cuda" and not there else "")
    return backend
