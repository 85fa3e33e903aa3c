"""The kernels' library, built for these tests from the sources beside them (what is up to date is not built again)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import pytest

from mka_megatron.ops import library as package_library

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def build_script() -> ModuleType:
    """kernels/build.py."""
    return package_library.build_script()


@pytest.fixture(scope="session")
def library(build_script: ModuleType) -> ctypes.CDLL:
    """The library of these sources; its host functions run without a GPU."""
    if build_script.find_nvcc() is None:
        pytest.skip("there is no nvcc: the kernels are not compiled")
    at = build_script.CACHE / "tests" / "libmka.so"
    build_script.build(at)
    return package_library.load(at)
