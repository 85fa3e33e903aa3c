"""tools/convert_hf.py: exit codes, sentences, signals; and the memory of a conversion."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from mka_megatron.conversion.importing import import_model
from mka_megatron.files import manifest
from tests.helpers.model_directories import contents, write_directory
from tests.helpers.synthetic_model import write_model

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "convert_hf.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192}
LARGE = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 65536}


@pytest.fixture
def tool(capsys, monkeypatch):
    """The command line in this process: arguments -> (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("convert_hf", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handlers = {number: signal.getsignal(number) for number in module.SIGNALS}
    verbosity = transformers.utils.logging.get_verbosity()

    def run(*arguments):
        capsys.readouterr()
        code = module.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    yield run
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_import_verify_and_strip(tool, tmp_path):
    x, ours = write_directory(tmp_path / "x", "qwen2-tied", True), tmp_path / "ours"
    assert tool("import", x, ours, "--seed", 3, "routing.scope=group") == (0, f"wrote {ours}\n", "")
    assert (ours / "modeling_mka.py").is_file() and (ours / "configuration_mka.py").is_file()
    assert json.loads((ours / "config.json").read_text())["mka"]["routing"]["scope"] == "group"
    manifest.verify(ours)
    for options in ((), ("--exact",), ("--prompt", "w1 w2 w3")):
        code, out, _ = tool("verify", x, ours, "--json", *options)
        figures = json.loads(out)
        assert code == 0 and figures["equal"] and figures["top1"] == 1 and figures["max_kl"] < 1e-6 and figures["positions"] > 0
    assert tool("strip", ours, tmp_path / "plain")[0] == 0
    assert contents(tmp_path / "plain") == contents(x)
    other = write_directory(tmp_path / "z", "qwen2", True)
    code, out, _ = tool("verify", other, ours)
    assert code == 1 and "NOT equal" in out


def test_one_sentence_and_exit_code_2(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    x = write_directory(tmp_path / "x")
    for arguments, words in (
        (("import", x, x), "not empty"), (("strip", x, tmp_path / "y"), "nothing to strip"),
        (("import", tmp_path / "none", tmp_path / "y"), "does not exist"), (("export", x, tmp_path / "y"), "manifest.json"),
        (("import", "owner/model", tmp_path / "y"), "the network"), (("import", x, tmp_path / "y", "routing.scope=word"), "routing.scope"),
        (("verify", x, tmp_path / "none"), "does not exist"), (("import", x, tmp_path / "y", "--seed", -1), "--seed"),
        (("export", x, tmp_path / "y", "--shard-gb", "nan"), "--shard-gb"),
    ):
        code, out, error = tool(*arguments)
        assert (code, out) == (2, "") and words in error and error.count("\n") == 1 and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


SLOW = "import os, runpy, sys, time\ncopy = os.copy_file_range\n" \
    "def slow(*a):\n    print('copying', flush=True); time.sleep(0.2); return copy(*a)\n" \
    "os.copy_file_range = slow\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(number, tmp_path):
    write_model(tmp_path / "x", 2, SMALL, shards=3)
    import_model(tmp_path / "x", tmp_path / "ours")
    before = contents(tmp_path / "ours")
    command = [sys.executable, "-c", SLOW, str(TOOL), "strip", str(tmp_path / "ours"), str(tmp_path / "plain")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "copying\n"
    assert len(list(tmp_path.iterdir())) == 3  # the temporary directory is there
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number and error.strip() == "Interrupted: nothing was written."
    assert {path.name for path in tmp_path.iterdir()} == {"x", "ours"}
    assert contents(tmp_path / "ours") == before


MEASURED = "import resource, sys\nfrom pathlib import Path\nfrom mka_megatron.conversion.importing import import_model\n" \
    "from mka_megatron.conversion.stripping import strip_model\nfor name in sys.argv[2:]:\n    path = Path(sys.argv[1])\n" \
    "    import_model(path / name, path / f'{name}-ours')\n    strip_model(path / f'{name}-ours', path / f'{name}-plain')\n" \
    "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"


def test_memory_does_not_depend_on_the_model(tmp_path):
    """350 MB of weights, the largest tensor 134 MB, after a model of 7 MB in the same process."""
    total = write_model(tmp_path / "large", 1, LARGE, shards=2)
    write_model(tmp_path / "small", 1, {**SMALL, "vocab_size": 512})
    assert total > 320e6
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path), "small", "large"], env=ENVIRONMENT, capture_output=True,
                          text=True, check=True, timeout=600)
    small, large = map(int, done.stdout.split())
    assert large <= 2 * 65536 * 1024 * 2 + 2**30
    assert large - small < 16 << 20
