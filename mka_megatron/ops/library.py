"""The CUDA kernels' shared library: finds it, checks that it belongs to this package, calls it.

It is built by `python kernels/build.py` or, where nvcc is there, by the installation. Without it, or without a GPU,
every op runs on its other backends.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.errors import refuse

PATH = Path(__file__).parent / "_lib" / "libmka.so"
SOURCES = Path(__file__).parents[2] / "kernels"
"""The sources, in a checkout."""
CAPABILITIES = {8: "sm_80 to sm_89", 9: "sm_90"}
"""Major compute capabilities that the library has code for, without PTX for later ones."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of c_api.h."""


class LibraryError(Exception):
    """The library cannot be used; one sentence that says why and what to do."""


BACKENDS = ("reference", "cuda")
"""Of the ops with kernels here; block attention has a choice of its own."""

_log = logging.getLogger(__name__)


def fields(**kinds: str) -> list[tuple[str, Any]]:
    """`_fields_` of a struct of c_api.h, in its order: "p" a pointer, "i" an int64_t, "i3" three of them, "f" a double."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "i3": ctypes.c_int64 * 3, "f": ctypes.c_double}
    return [(name, types[kind]) for name, kind in kinds.items()]


def expected_hash(path: Path = PATH, sources: Path = SOURCES) -> str:
    """The hash of the sources beside the package, or in an installation without them the one kept beside the library.

    Raises LibraryError when there is neither.
    """
    script = sources / "build.py"
    if script.exists() and (sources / "c_api.h").exists():  # in site-packages `kernels` is another project
        return build_script(script).source_hash(sources)
    record = path.with_suffix(".json")
    if not record.exists():
        raise LibraryError(f"{record} is not there: run python kernels/build.py in a checkout.")
    return json.loads(record.read_text(encoding="utf-8"))["source_hash"]


def load(path: Path = PATH, sources: Path = SOURCES) -> ctypes.CDLL:
    """The library at `path`, whose host functions work without a GPU.

    Raises LibraryError when it is not there, does not load or was built from other sources.
    """
    if not path.exists():
        raise LibraryError(f"{path} is not there: run python kernels/build.py where nvcc is installed.")
    try:
        lib = ctypes.CDLL(str(path))
        lib.mka_source_hash.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load ({error}): run python kernels/build.py again.") from error
    has, wants = lib.mka_source_hash().decode(), expected_hash(path, sources)
    if has != wants:
        raise LibraryError(
            f"{path} was built from sources {has[:12]}, these are {wants[:12]}: run python kernels/build.py again."
        )
    return lib


@functools.cache
def library() -> ctypes.CDLL:
    """The package's own library, loaded once; raises LibraryError as :func:`load`."""
    return load()


@functools.cache
def available() -> tuple[bool, str]:
    """(the kernels can run here, why not)."""
    if not torch.cuda.is_available():
        return False, "PyTorch sees no CUDA device."
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        return False, f"the GPU is sm_{major}{minor}: the kernels have code for {' and '.join(CAPABILITIES.values())}."
    try:
        library()
    except LibraryError as error:
        return False, str(error)
    return True, ""


def choose(op: str, wanted: str, device: str, lacks: str = "") -> str:
    """The backend of `op` for `wanted` ("auto" or one of BACKENDS) on a device type ("cpu", "cuda").

    To be decided once, where a model or cache is built; logged. `lacks`: why the op has no kernel for the sizes and
    types that it is to run with. Raises ConfigError when what is wanted does not run there.
    """
    if wanted not in ("auto", *BACKENDS):
        raise refuse("attention.kernels", wanted, f"choose auto, {' or '.join(BACKENDS)}")
    there, why = usable(device, lacks)
    if wanted == "cuda" and not there:
        raise refuse("attention.kernels", wanted, f"the kernels of {op} cannot run: {why}; use auto or reference")
    backend = "cuda" if there and wanted != "reference" else "reference"
    passed_over = backend == "reference" and wanted == "auto" and device == "cuda"
    tell(f"{op}: {backend} on {device}{f' ({why})' if passed_over else ''}")
    return backend


def usable(device: str, lacks: str = "") -> tuple[bool, str]:
    """(an op that `lacks` something for its sizes and types can run its kernel on a device type, why not, no period)."""
    there, why = available() if device == "cuda" else (False, f"the device is {device}")
    if there and lacks:
        there, why = False, lacks
    return there, why.rstrip(".")


def capability(device: str) -> tuple[int, int] | None:
    """(major, minor) of the current GPU; None where the device type is none."""
    return torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None


@functools.cache
def tell(choice: str) -> None:
    """Logs a choice once, though every layer makes it."""
    _log.info(choice)


def run(entry: str, args: ctypes.Structure, device: torch.device) -> None:
    """Calls `entry(&args, stream)` on the device's current stream.

    Raises LibraryError when the library cannot be used or the call fails.
    """
    lib = library()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        code = getattr(lib, entry)(ctypes.byref(args), ctypes.c_void_p(stream))
    if code:
        lib.mka_error_string.restype = ctypes.c_char_p
        raise LibraryError(f"{entry} failed: {lib.mka_error_string(code).decode()}.")


def pointer(x: Tensor | None) -> int | None:
    """What a pointer field takes; None and an empty tensor are null."""
    return None if x is None or x.numel() == 0 else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """`x` [..., d] as the kernels can read it: itself where every row of d is contiguous and aligned to 16 bytes (as the
    keys and values within a fused projection are), else a copy."""
    aligned = all(step * x.element_size() % 16 == 0 for step in strides(x)) and x.data_ptr() % 16 == 0
    return x if aligned and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.clone(memory_format=torch.contiguous_format)


def strides(x: Tensor) -> tuple[int, ...]:
    """Elements from one row of `x` [..., d] to the next, for every axis but the last; 0 for an axis of one."""
    return tuple(0 if size == 1 else step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def check(
    name: str,
    x: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    *,
    strided: bool = False,
) -> None:
    """Raises ValueError unless `x` is a CUDA tensor of this shape (-1: any), dtype and device, and contiguous and
    aligned unless `strided`."""
    if x.device.type != "cuda" or (device is not None and x.device != device):
        raise ValueError(f"{name} is on {x.device}: it must be on {device or 'a CUDA device'}.")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}: it must be {' or '.join(str(d) for d in dtypes)}.")
    if x.dim() != len(shape) or any(want not in (-1, has) for has, want in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} has the shape {list(x.shape)}: it must be {list(shape)} (-1: any).")
    if strided:
        return
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous() first.")
    if x.data_ptr() % x.element_size() or (x.element_size() < 8 and x.data_ptr() % 16):
        raise ValueError(f"{name} is not aligned to 16 bytes: call .clone() first.")


def operator(
    name: str,
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    mutates: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that registers a function of CUDA tensors as the operator `mka::<name>`.

    Args:
        name: the operator's name.
        fake: the outputs' shapes and dtypes without data, for torch.compile.
        backward: (ctx, *gradients of the outputs) -> gradients of the arguments; None: no gradient.
        save: (ctx, inputs, output) that keeps what `backward` needs.
        mutates: arguments that are written.
    """

    def register(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(
            f"mka::{name}", function, mutates_args=tuple(mutates), device_types="cuda"
        )
        made.register_fake(fake)
        if backward is not None:
            made.register_autograd(backward, setup_context=save)
        return made

    return register


@functools.cache
def build_script(at: Path = SOURCES / "build.py") -> Any:
    """kernels/build.py as a module, in a checkout; the folder is no package, since `kernels` is another project's name."""
    spec = importlib.util.spec_from_file_location("mka_kernels_build", at)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
