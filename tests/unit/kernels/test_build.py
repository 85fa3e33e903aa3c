"""kernels/build.py: both targets compile within their resources, what changed is compiled again, errors are sentences."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from mka_megatron.ops import library as package_library
from tests.helpers.c_api import HEADER
from tests.unit.kernels.conftest import REPOSITORY

PLAIN = """
#include "c_api.h"
__global__ void plain(float* x) { x[threadIdx.x] *= 2; }
extern "C" MKA_API int mka_plain(float* x) { plain<<<1, 32>>>(x); return cudaGetLastError(); }
"""
# a local array that is indexed by what is read cannot lie in registers
STACK = """
__global__ void stacked(const int* at, float* x) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i];
  for (int i = 0; i < 64; ++i) x[i] = local[at[i]];
}
"""
REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers, 18560 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Function properties for _Z6devicev
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


@pytest.fixture
def folder(tmp_path: Path, build_script: ModuleType) -> Path:
    """Sources of their own."""
    if build_script.find_nvcc() is None:
        pytest.skip("there is no nvcc: nothing can be compiled")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "include" / "mka").mkdir(parents=True)
    shutil.copy(HEADER, tmp_path)
    return tmp_path


def test_every_kernel_is_within_its_resources(library: ctypes.CDLL, build_script: ModuleType) -> None:
    """For both targets; the build would have failed, so this reads what it recorded."""
    record = json.loads((build_script.CACHE / "tests" / "libmka.json").read_text(encoding="utf-8"))
    assert record["targets"] == ["80", "90a"]
    by_target = {t: {k["name"] for k in record["kernels"] if k["target"] == t} for t in record["targets"]}
    assert by_target["80"] == by_target["90a"] and len(by_target["80"]) >= 28
    assert all(k["stack"] == k["spills"] == 0 for k in record["kernels"])
    hopper = [k for k in record["kernels"] if k["target"] == "90a" and "UTMALDG" in k["instructions"]]
    assert len(hopper) >= 4 and all("HGMMA" in k["instructions"] for k in hopper)


def test_the_library_has_what_the_header_declares(library: ctypes.CDLL) -> None:
    text = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8"))
    names = re.findall(r"MKA_API[^;]*?(mka_\w+)\(", text)
    assert len(names) >= 12
    for name in names:
        getattr(library, name)


def test_an_error_has_a_sentence(library: ctypes.CDLL) -> None:
    library.mka_error_string.restype = ctypes.c_char_p
    assert library.mka_error_string(-1) == b"there is no kernel for these sizes or types"
    assert b"driver" in library.mka_error_string(35)


def test_reading_the_compilers_report(build_script: ModuleType) -> None:
    Kernel = build_script.Kernel
    assert build_script.resources(REPORT) == [
        Kernel("_Z1av", "80", 0, 0, 54, 18560),
        Kernel("_Z1av", "90a", 8, 16, 255, 0),
        Kernel("_Z6devicev", "90a", 16, 0, 0, 0),
    ]


def test_a_stack_frame_fails_the_build(folder: Path, build_script: ModuleType) -> None:
    (folder / "csrc" / "stack.cu").write_text(STACK)
    with pytest.raises(build_script.BuildError, match=r"stacked.*sm_80: 0 bytes spilled, 256 bytes of stack"):
        build_script.build(folder / "lib.so", targets=("80",), cache=folder / "cache", folder=folder)
    assert not (folder / "lib.so").exists()


def test_a_hopper_kernel_without_hoppers_instructions_fails_the_build(folder: Path, build_script: ModuleType) -> None:
    """What a source of that name is for; of others nothing is asked."""
    build = partial(build_script.build, folder / "lib.so", cache=folder / "cache", folder=folder)
    (folder / "csrc" / "plain.cu").write_text(PLAIN)
    assert all(k.instructions == () for k in build(targets=("90a",)))
    (folder / "csrc" / "plain.cu").rename(folder / "csrc" / "plain_hopper.cu")
    with pytest.raises(build_script.BuildError, match=r"plain.* of plain_hopper\.cu has no HGMMA and no UTMALDG for sm_90a"):
        build(targets=("80", "90a"))
    with pytest.raises(build_script.BuildError, match="has no HGMMA"):
        build(targets=("90a",))


@pytest.mark.parametrize("warning", ["(C7510) Potential Performance Loss: serialized", "(C7508) setmaxnreg ignored"])
def test_what_ptxas_says_of_slow_kernels_fails_the_build(
    warning: str, folder: Path, tmp_path: Path, build_script: ModuleType
) -> None:
    (folder / "csrc" / "plain.cu").write_text(PLAIN)
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{build_script.find_nvcc()} \"$@\" && echo \"ptxas info : {warning}\"\n")
    compiler.chmod(0o755)
    with pytest.raises(build_script.BuildError, match=r"plain\.cu: ptxas info : \(C75"):
        build_script.build(
            folder / "lib.so", targets=("80",), nvcc=str(compiler), cache=folder / "cache", folder=folder
        )


def test_only_what_changed_is_compiled(folder: Path, build_script: ModuleType) -> None:
    one, two, header = (folder / at for at in ("csrc/one.cu", "csrc/two.cu", "include/mka/two.cuh"))
    one.write_text(PLAIN)
    two.write_text(PLAIN.replace("plain", "other").replace('"c_api.h"', '"mka/two.cuh"'))
    header.write_text('#include "c_api.h"\n')

    def build() -> set[str]:
        before = set((folder / "cache").glob("*.o"))
        build_script.build(folder / "lib.so", targets=("80",), cache=folder / "cache", folder=folder, jobs=1)
        return {path.name[:3] for path in set((folder / "cache").glob("*.o")) - before}

    assert build() == {"one", "two"}
    made, first = (folder / "lib.so").stat().st_mtime_ns, build_script.source_hash(folder)
    assert package_library.load(folder / "lib.so", folder).mka_source_hash() == first.encode()
    assert build() == set() and (folder / "lib.so").stat().st_mtime_ns == made
    # comments count: what a library was made from is compared, not what it means
    header.write_text('#include "c_api.h"\n// changed\n')
    assert build_script.source_hash(folder) != first
    assert build() == {"two"} and (folder / "lib.so").stat().st_mtime_ns != made


def test_a_compiler_error_is_told(folder: Path, build_script: ModuleType) -> None:
    (folder / "csrc" / "wrong.cu").write_text("int f( {")
    with pytest.raises(build_script.BuildError, match=r"wrong\.cu does not compile:(.|\n)*error"):
        build_script.build(folder / "lib.so", targets=("80",), cache=folder / "cache", folder=folder)


def test_the_command_without_a_compiler(tmp_path: Path) -> None:
    script = tmp_path / "kernels" / "build.py"
    script.parent.mkdir()
    shutil.copy(REPOSITORY / "kernels" / "build.py", script)
    run = subprocess.run([sys.executable, script, "--nvcc", "/bin/true"], capture_output=True, text=True)
    assert run.returncode == 1 and "has no .cu file" in run.stderr
