"""MKA-Megatron: long-context Qwen/Llama training with hierarchical-memory attention.

The attention benchmark's functions are here too: get_model, get_dataloader, train_model, evaluate_model,
run_benchmark. They are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_BENCHMARK = {
    "get_model": "model",
    "get_dataloader": "data",
    "train_model": "training",
    "evaluate_model": "training",
    "run_benchmark": "runs",
}
__all__ = ["__version__", "evaluate_model", "get_dataloader", "get_model", "run_benchmark", "train_model"]


def __getattr__(name: str) -> Any:
    if name not in _BENCHMARK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.benchmark.{_BENCHMARK[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
