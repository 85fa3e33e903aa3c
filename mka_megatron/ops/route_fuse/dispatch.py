"""Which implementation of the fusion runs: decided once, when a model is built, and logged."""

from __future__ import annotations

import logging

from mka_megatron.ops import library

BACKENDS = ("reference", "cuda")

_log = logging.getLogger(__name__)


def choose(wanted: str, device: str) -> str:
    """The backend for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    Raises ValueError when it is not there.
    """
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"route_fuse backend is {wanted!r}: choose auto, {' or '.join(BACKENDS)}.")
    there, reason = library.available()
    backend = wanted
    if wanted == "auto":
        backend = "cuda" if device == "cuda" and there else "reference"
    elif wanted == "cuda" and (device != "cuda" or not there):
        why = reason if device == "cuda" else f"the device is {device}"
        raise ValueError(f"route_fuse backend is 'cuda': {why}, choose auto or reference.")
    _log.info("route_fuse: %s on %s%s", backend, device, "" if there else f" (no kernels: {reason})")
    return backend
