"""The README's commands, one after the other, in a fresh clone in an empty folder with an empty home.

    python -m tests.newcomer.walk                            # installs as the README does; ten minutes on two cores
    python -m tests.newcomer.walk --reuse .venv              # with the packages of this environment
    python -m tests.newcomer.walk --folder DIR --last 3      # the first three commands, in an empty folder that is kept
    python -m tests.newcomer.walk --folder DIR --first 4     # and the others

walk.yaml says what each must print, write and return, what is replaced for a machine without GPUs, and what is left out
and why. A command of the README that walk.yaml does not have, or the other way round, is an error before anything runs.
The table at the end has every command with its seconds and verdict; exit code 0: all as expected.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.launch import end_tree
from tests.newcomer.readme import Command, commands

ROOT = Path(__file__).resolve().parents[2]
EXPECTATIONS = Path(__file__).with_name("walk.yaml")


@dataclass(frozen=True)
class Expectation:
    """An entry of walk.yaml, whose head says what the fields mean."""

    command: str
    replace: dict[str, str] = field(default_factory=dict)
    append: str = ""
    skip: str = ""
    output: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit: int = 0
    seconds: int = 900


def expectations() -> list[Expectation]:
    return [Expectation(**entry) for entry in yaml.safe_load(EXPECTATIONS.read_text(encoding="utf-8"))]


def paired(readme: str, expected: list[Expectation]) -> list[tuple[Command, Expectation]]:
    """The README's commands with what walk.yaml expects of them; ValueError where the two differ."""
    found = commands(readme)
    for at in range(max(len(found), len(expected))):
        there = found[at].text.split("\n")[0] if at < len(found) else "nothing"
        wanted = expected[at].command if at < len(expected) else "nothing"
        if there != wanted:
            raise ValueError(f"command {at + 1}: README.md has {there!r} and {EXPECTATIONS.name} {wanted!r}")
    return list(zip(found, expected, strict=True))


def typed(command: Command, expected: Expectation) -> str:
    """The command as it is run here."""
    text = command.text
    for old, new in expected.replace.items():
        if old not in text:
            raise ValueError(f"{EXPECTATIONS.name} replaces {old!r}, which is not in {text!r}")
        text = text.replace(old, new)
    if command.language == "python":
        return f"python - <<'END_OF_PYTHON'\n{text}END_OF_PYTHON"
    return f"{text} {expected.append}".strip()


def empty_home(folder: Path) -> dict[str, str]:
    """The environment of somebody who just logged in: the system's paths, a new home, and how pip reaches its packages."""
    kept = {name: value for name, value in os.environ.items()
            if name in ("LANG", "TERM", "TMPDIR", "SSL_CERT_FILE") or name.lower().endswith("_proxy") or name.startswith("PIP_")}  # fmt: skip
    own = Path.home() / ".config/pip/pip.conf"
    if own.is_file():
        kept["PIP_CONFIG_FILE"] = str(own)
    # the interpreter's own directory, not an environment's
    paths = [str(Path(sys.base_prefix, "bin")), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    home = folder / "home"
    home.mkdir()
    return kept | {"HOME": str(home), "PATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def borrow(checkout: Path, other: Path) -> None:
    """A .venv in `checkout` that takes the packages of the environment `other`, which stays as it is."""
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(other), "platbase": str(other)})
    own = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
    Path(own, "borrowed.pth").write_text(f"{checkout}\n{packages}\n")
    for name in ("torchrun", "deepspeed", "tensorboard"):
        script = (other / "bin" / name).read_text().split("\n", 1)[1]
        at = venv / "bin" / name
        at.write_text(f"#!{venv}/bin/python\n{script}")
        at.chmod(0o755)
    for name in ("ninja",):
        (venv / "bin" / name).symlink_to((other / "bin" / name).resolve())
    # as launch/env.sh leaves it behind an installation
    wanted = (checkout / "constraints.txt").read_bytes() + (checkout / "pyproject.toml").read_bytes() + str(checkout).encode()
    (venv / "installed.sha256").write_text(hashlib.sha256(wanted).hexdigest() + "  -\n")
    if (other / "torch_extensions").is_dir():  # else the first command builds DeepSpeed's operators
        shutil.copytree(other / "torch_extensions", venv / "torch_extensions")
        (venv / "operators").write_text("built\n")


def run(text: str, checkout: Path, environment: dict[str, str], seconds: int) -> tuple[int, str, dict[str, str]]:
    """(exit code, what it printed, the environment behind it) of a command in a shell; a code of 124: out of time."""
    state = checkout.parent / "environment"
    script = f"{text}\ncode=$?\nenv -0 >{shlex.quote(str(state))}\nexit $code"
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(["bash", "-c", script], cwd=checkout, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)  # noqa: S607
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end_tree(process)
            code = 124
        out.seek(0)
        printed = out.read().decode(errors="replace")
    if code == 124 or not state.is_file():
        return code, printed, environment
    return code, printed, left_behind(checkout.parent)


def verdict(expected: Expectation, code: int, printed: str, checkout: Path) -> str:
    """`as expected`, or what is not."""
    if code != expected.exit:
        return f"exit code {code}, not {expected.exit}" if code != 124 else f"not done after {expected.seconds} s"
    missing = [pattern for pattern in expected.output if not re.search(pattern, printed)]
    absent = [name for name in expected.files if not (checkout / name).exists()]
    if missing or absent:
        return f"lacks {', '.join([*missing, *absent])}"
    return "as expected"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", type=Path, help="virtual environment whose packages are taken instead of an installation")
    parser.add_argument("--folder", type=Path, help="empty folder, which is kept (default: a temporary one)")
    parser.add_argument("--first", type=int, default=1, help="command to begin with, in a --folder where those before were run")
    parser.add_argument("--last", type=int, help="command to end with (default: the last)")
    parser.add_argument("--logs", type=Path, help="directory for what each command printed")
    chosen = parser.parse_args()
    steps = paired((ROOT / "README.md").read_text(encoding="utf-8"), expectations())
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="newcomer-")))
        folder.mkdir(parents=True, exist_ok=True)
        rows = walk(steps, folder.resolve(), chosen)
    print(table(rows))
    return int(any(outcome != "as expected" and not outcome.startswith("not run here") for *_, outcome in rows))


def walk(steps: list[tuple[Command, Expectation]], folder: Path, chosen: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(command, seconds, verdict) of the chosen commands, run in `folder`."""
    checkout = folder / "mka-megatron"
    if chosen.first == 1:
        environment = empty_home(folder)
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(checkout)], check=True)  # noqa: S607
        if chosen.reuse:
            borrow(checkout, chosen.reuse.resolve())
    else:
        environment = left_behind(folder)
    rows: list[tuple[str, str, str]] = []
    for number, (command, expected) in enumerate(steps, 1):
        if not chosen.first <= number <= (chosen.last or len(steps)):
            continue
        if expected.skip:
            rows.append((expected.command, "", f"not run here: {expected.skip}"))
            continue
        if number > 1 and not (checkout / "DIR").is_dir():
            code, printed, _ = run(".venv/bin/python tests/newcomer/material.py", checkout, environment, 600)
            if code:
                raise RuntimeError(f"no material: {printed}")
        began = time.monotonic()
        code, printed, environment = run(typed(command, expected), checkout, environment, expected.seconds)
        seconds, outcome = time.monotonic() - began, verdict(expected, code, printed, checkout)
        rows.append((expected.command, f"{seconds:.1f}", outcome))
        print(f"{seconds:8.1f} s  {outcome}: {expected.command}", file=sys.stderr, flush=True)
        if chosen.logs:
            chosen.logs.mkdir(parents=True, exist_ok=True)
            (chosen.logs / f"{number:02}.log").write_text(f"{typed(command, expected)}\n{printed}")
        elif outcome != "as expected":
            print(printed[-3000:], file=sys.stderr, flush=True)
    return rows


def left_behind(folder: Path) -> dict[str, str]:
    """The environment behind the last command that was run in `folder`."""
    lines = (entry.partition("=") for entry in (folder / "environment").read_bytes().decode().split("\0") if entry)
    return {name: value for name, _, value in lines if name not in ("_", "SHLVL", "PWD", "OLDPWD")}


def table(rows: list[tuple[str, Any, str]]) -> str:
    lines = ["| command | seconds | verdict |", "| --- | --: | --- |"]
    return "\n".join([*lines, *(f"| `{command}` | {seconds} | {outcome} |" for command, seconds, outcome in rows)])


if __name__ == "__main__":
    sys.exit(main())
