"""A wheel that is built where there is no nvcc: without the library, and it says which backend it uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.unit.kernels.conftest import REPOSITORY

PARTS = ("mka_megatron", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SAYS = """
import logging
logging.basicConfig(format="%(message)s", level="INFO")
import mka_megatron
from mka_megatron.ops import library
print(mka_megatron.__file__)
library.choose("route_fuse", "auto", "cuda")
library.available.cache_clear()
library.torch.cuda.is_available, library.torch.cuda.get_device_capability = lambda: True, lambda: (9, 0)
library.choose("recall", "auto", "cuda")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with nothing on the path but a shell and no toolkit where it usually is."""
    at = tmp_path_factory.mktemp("wheel")
    sources = at / "sources"
    sources.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "_lib", "build", "*.so")
    for name in PARTS:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, sources / name, ignore=unwanted)
        else:
            shutil.copy(REPOSITORY / name, sources)
    script = sources / "kernels" / "build.py"
    text = script.read_text(encoding="utf-8")
    assert text.count("/usr/local/cuda/bin/nvcc") == 1
    script.write_text(text.replace("/usr/local/cuda/bin/nvcc", str(at / "nowhere")), encoding="utf-8")
    (at / "bin").mkdir()
    (at / "bin" / "sh").symlink_to("/bin/sh")
    environment = {**os.environ, "PATH": str(at / "bin")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", at, sources]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "there is no nvcc, so the CUDA kernels are not built" in run.stdout + run.stderr
    (found,) = at.glob("*.whl")
    build = "import setuptools.build_meta as backend; print(backend.build_sdist('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=sources, capture_output=True, check=True)
    return found


def test_the_source_distribution_has_what_the_kernels_are_built_from(wheel: Path) -> None:
    (found,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("kernels/**/*.cu*")}
    assert {"kernels/build.py", "kernels/c_api.h", "kernels/verify.py", "setup.py", *tracked} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_it_is_for_every_platform_and_has_no_library(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mka_megatron/ops/route_fuse/reference.py" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("kernels/")]


def test_installed_it_says_which_backend_it_uses(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", SAYS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "mka_megatron" / "__init__.py")
    assert "route_fuse: reference on cuda (PyTorch sees no CUDA device)" in run.stderr
    assert "recall: reference on cuda (" in run.stderr and "libmka.so is not there: run python kernels/build.py" in run.stderr
