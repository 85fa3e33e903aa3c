"""The kernels' library as the package sees it: what is missing or of other sources is told in a sentence."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.ops import library

BAKED = "a" * 64


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A library that says that its sources' hash is BAKED."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = tmp_path / "version.c"
    source.write_text(f'const char* mka_source_hash(void) {{ return "{BAKED}"; }}')
    at = tmp_path / "libmka.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", at, source], check=True)
    return at


def test_an_installation_compares_with_the_kept_hash(made: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    with pytest.raises(
        library.LibraryError, match=r"libmka\.json is not there: run python kernels/build\.py"
    ):
        library.load(made, nowhere)
    made.with_suffix(".json").write_text(json.dumps({"source_hash": BAKED}))
    assert library.load(made, nowhere).mka_source_hash() == BAKED.encode()
    made.with_suffix(".json").write_text(json.dumps({"source_hash": "b" * 64}))
    with pytest.raises(
        library.LibraryError, match="was built from sources aaaaaaaaaaaa, these are bbbbbbbbbbbb"
    ):
        library.load(made, nowhere)


def test_a_checkout_compares_with_its_sources(made: Path) -> None:
    made.with_suffix(".json").write_text(json.dumps({"source_hash": BAKED}))
    wants = library.expected_hash()
    assert len(wants) == 64 and wants == library.build_script().source_hash()
    with pytest.raises(
        library.LibraryError, match=f"these are {wants[:12]}: run python kernels/build.py again"
    ):
        library.load(made)


def test_a_library_that_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(library.LibraryError, match=r"is not there: run python kernels/build\.py where nvcc"):
        library.load(tmp_path / "libmka.so")
    (tmp_path / "libmka.so").write_bytes(b"no library")
    with pytest.raises(library.LibraryError, match="does not load"):
        library.load(tmp_path / "libmka.so")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reference_runs_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert library.available() == (False, "PyTorch sees no CUDA device.")
    library.tell.cache_clear()
    caplog.set_level("INFO")
    choose = functools.partial(library.choose, "recall")
    assert choose("auto", "cpu") == choose("auto", "cuda") == choose("reference", "cuda") == "reference"
    assert caplog.text.count("recall: reference on cuda (PyTorch sees no CUDA device)") == 1
    with pytest.raises(ConfigError, match="kernels is cuda: the kernels of recall cannot run: PyTorch sees no CUDA device"):
        choose("cuda", "cuda")
    with pytest.raises(ConfigError, match="the kernels of recall cannot run: the device is cpu; use auto or reference"):
        choose("cuda", "cpu")
    with pytest.raises(ConfigError, match=r"attention\.kernels is triton: choose auto, reference or cuda"):
        choose("triton", "cpu")


def test_with_a_gpu_the_kernels_run_what_they_cover(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "available", lambda: (True, ""))
    library.tell.cache_clear()
    caplog.set_level("INFO")
    choose = functools.partial(library.choose, "recall")
    assert choose("auto", "cuda") == choose("cuda", "cuda") == "cuda"
    assert choose("reference", "cuda") == choose("auto", "cpu") == choose("auto", "cuda", "no size 32") == "reference"
    assert "recall: cuda on cuda" in caplog.text and "recall: reference on cuda (no size 32)" in caplog.text
    with pytest.raises(ConfigError, match="the kernels of recall cannot run: no size 32; use auto"):
        choose("cuda", "cuda", "no size 32")


@pytest.mark.parametrize(
    ("capability", "told"),
    [((7, 5), "the GPU is sm_75: the kernels have code for sm_80 to sm_89 and sm_90."), ((10, 0), "the GPU is sm_100"),
     ((8, 6), ""), ((9, 0), "")],
)  # fmt: skip
def test_gpus_without_code(capability: tuple[int, int], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older or a later GPU would find no kernel in the library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(library, "library", lambda: None)
    there, why = library.available.__wrapped__()
    assert there == (told == "") and why.startswith(told)


def test_arguments_are_checked() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="k is on cpu: it must be on a CUDA device"):
        library.check("k", x, (2, 3), (torch.float32,))
    meta = [torch.empty(0)]
    assert library.pointer(None) is None and library.pointer(meta[0]) is None
    assert library.pointer(x) == x.data_ptr()
