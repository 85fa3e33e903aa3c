"""Which implementation of the recall runs: decided once, when a model is built, and logged."""

from __future__ import annotations

import logging

from mka_megatron.config.errors import refuse
from mka_megatron.ops import library

BACKENDS = ("reference", "cuda")

_log = logging.getLogger(__name__)


def choose(wanted: str, device: str) -> str:
    """The backend for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    Raises ConfigError when it does not run there.
    """
    if wanted not in ("auto", *BACKENDS):
        raise refuse("the recall's backend", wanted, f"choose auto, {' or '.join(BACKENDS)}")
    if wanted == "reference" or (wanted == "auto" and device != "cuda"):
        backend, why = "reference", ""
    else:
        there, why = library.available() if device == "cuda" else (False, f"the model is on {device}.")
        if wanted == "cuda" and not there:
            raise refuse("the recall's backend", wanted, f"the kernels cannot run: {why}")
        backend = "cuda" if there else "reference"
    _log.info("recall: %s on %s%s", backend, device, f" ({why})" if why else "")
    return backend
