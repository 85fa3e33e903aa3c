"""Build entry point; everything is in pyproject.toml, but for the CUDA kernels, which are built where nvcc is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

LIBRARY = Path("mka_megatron", "ops", "_lib", "libmka.so")


def kernels() -> ModuleType | None:
    """kernels/build.py, None without it or without nvcc."""
    script = Path(__file__).resolve().parent / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("mka_kernels_build", script)
    if not script.exists() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module if module.find_nvcc() else None


class BuildWithKernels(build_py):
    """Puts the library beside the package's modules; without it the package runs on its other backends."""

    def run(self) -> None:
        super().run()
        script = kernels()
        if script is None:
            print("mka-megatron: there is no nvcc, so the CUDA kernels are not built.", file=sys.stderr)
            return
        root = Path(__file__).resolve().parent if self.editable_mode else Path(self.build_lib)
        try:
            script.build(root / LIBRARY)
        except script.BuildError as error:
            print(f"mka-megatron: the CUDA kernels are not built: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """For one platform where it has the library, which serves every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class MaybeBinary(Distribution):
    """Binary where the library is built."""

    def has_ext_modules(self) -> bool:
        return kernels() is not None


setup(distclass=MaybeBinary, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
