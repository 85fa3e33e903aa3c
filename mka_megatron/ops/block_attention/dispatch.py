"""Which implementation of the block core runs: decided once, when a model is built, and logged."""

from __future__ import annotations

from mka_megatron.config.errors import refuse
from mka_megatron.ops import library

BACKENDS = ("cuda", "flex", "reference")


def choose(wanted: str, device: str, lacks: str = "") -> str:
    """The backend for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    `lacks`: why there is no kernel for the sizes and types that it is to run with. Raises ConfigError when what is
    wanted does not train there.
    """
    key = "attention.block_backend"
    if wanted not in ("auto", *BACKENDS):
        raise refuse(key, wanted, f"choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    there, why = library.usable(device, lacks)
    if wanted == "cuda" and not there:
        raise refuse(key, wanted, f"the kernels of block_attention cannot run: {why}; use auto, flex or reference")
    if wanted == "flex" and device != "cuda":
        raise refuse(key, wanted, f"FlexAttention has no backward on {device}, choose auto or reference")
    best = "cuda" if there else "flex" if device == "cuda" else "reference"
    backend = best if wanted == "auto" else wanted
    passed_over = wanted == "auto" and backend == "flex"
    library.tell(f"block_attention: {backend} on {device}{f' ({why})' if passed_over else ''}")
    return backend
