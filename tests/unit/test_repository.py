"""What must hold of every tracked file."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A package registry is the reader's pip configuration, never ours; written in pieces so as not to match itself.
REGISTRIES = [host.replace("_", "") for host in
              ("pypi._org", "pytho_nhosted", "pypi._python", "download._pytorch", "test._pypi", "conda._anaconda",
               "index_-url", "find_-links", "trusted_-host", "proxy.golan_g", "registry._npmjs")]
PRIVATE = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w|/tm" + r"p/w\b")


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in os.fsdecode(listing.stdout).split("\0") if name and (ROOT / name).is_file()]


def test_no_registry_hosts_and_no_private_paths() -> None:
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        for host in REGISTRIES:
            assert host not in text, f"{path.relative_to(ROOT)} names {host}"
        found = PRIVATE.search(text)
        assert not found, f"{path.relative_to(ROOT)} holds the path {found and found[0]}"


def test_shell_scripts_are_strict_and_executable() -> None:
    scripts = [path for path in tracked() if path.suffix == ".sh" or path.parent.name == ".ci"]
    assert scripts
    for path in scripts:
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env bash\n"), path
        assert "set -euo pipefail" in text, path
        assert os.access(path, os.X_OK), path


def test_no_unsafe_loading() -> None:
    """No pickle, eval, shell=True or unrestricted torch.load in our own sources."""
    forbidden = re.compile(r"\bpickle\.loads?\(|(?<![.\w])eval\(|\bshell=True|weights_only=False|yaml\.unsafe_load")
    for path in tracked():
        if path.suffix == ".py" and path.name != Path(__file__).name:
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"


def test_constraints_pin_every_requirement() -> None:
    """Each requirement of pyproject.toml has an exact pin, and every pin is exact."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [line for line in lines if line]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+( *; *.+)?", pin) for pin in pins)
    names = {re.split("==", pin)[0].lower().replace("_", "-") for pin in pins}
    requirements = re.findall(r'^    "([A-Za-z0-9_.-]+)[<>=~]', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    requirements += re.findall(r'"(pytest|hypothesis|ruff|mypy|matplotlib|rouge|jieba|wonderwords)>=', (ROOT / "pyproject.toml").read_text())
    assert requirements and {name.lower().replace("_", "-") for name in requirements} <= names
