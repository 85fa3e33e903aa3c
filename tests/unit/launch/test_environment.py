"""launch/env.sh makes an environment once, and in no folder that holds something else; nothing is installed here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# an interpreter whose environments hold one that only notes down what pip is asked for
PYTHON = """#!/usr/bin/env bash
set -e
[ "$1 $2" = "-m venv" ] || exit 0
echo venv >>"$NOTES"
rm -rf "$4"
sleep 0.5
mkdir -p "$4/bin"
printf 'built\\n' >"$4/operators"
touch "$4/pyvenv.cfg"
cat >"$4/bin/python" <<'END'
#!/usr/bin/env bash
[ "$1 $2 $3" != "-m pip install" ] || { echo install >>"$NOTES"; sleep 0.5; }
END
chmod +x "$4/bin/python"
"""


def start(folder: Path, venv: Path) -> subprocess.Popen[str]:
    """A launch script's call of make_environment."""
    python = folder / "python"
    if not python.exists():
        python.write_text(PYTHON)
        python.chmod(0o755)
    environment = os.environ | {"VENV": str(venv), "PYTHON": str(python), "NOTES": str(folder / "notes")}
    command = ["bash", "-c", f"source '{ROOT}/launch/env.sh' && make_environment"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_starts_at_once_make_it_once(tmp_path: Path) -> None:
    """As the tasks of an array of jobs are; each empties the folder that it makes anew."""
    venv = tmp_path / "below" / "venv"
    started = [start(tmp_path, venv)]
    started += [start(tmp_path, venv) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert (tmp_path / "notes").read_text().split() == ["venv", "install", "install"]
    again = start(tmp_path, Path(f"{venv}/"))
    assert again.communicate(timeout=60)[1] == "" and again.returncode == 0
    assert (tmp_path / "notes").read_text().split() == ["venv", "install", "install"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_environment_is_left_alone(tmp_path: Path, kind: str) -> None:
    venv = tmp_path / "mine"
    kept = venv / "thesis.tex" if kind == "folder" else venv
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years")
    process = start(tmp_path, venv)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and kept.read_text() == "years"
    assert said == f"VENV is {venv}, which is there and is no virtual environment; name a folder that may be made, or remove it.\n"


def test_one_that_is_broken_or_an_empty_folder_is_made_anew(tmp_path: Path) -> None:
    for name, files in (("broken", ["pyvenv.cfg", "rest"]), ("empty", [])):
        (tmp_path / name).mkdir()
        for each in files:
            (tmp_path / name / each).touch()
        process = start(tmp_path, tmp_path / name)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said
        assert not (tmp_path / name / "rest").exists()
