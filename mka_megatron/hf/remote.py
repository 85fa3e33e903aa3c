"""The code that travels with a model directory, for machines without this package (trust_remote_code=True).

transformers copies a directory's modules one by one and follows imports of the form `from .name import x` only, so the
modules that the model needs become flat files of one folder: `mka_megatron.attention.fastmka` is
`mka_attention_fastmka.py`. Their text is this package's own, imports aside.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

PACKAGE = "mka_megatron"
ENTRIES = {f"{PACKAGE}.hf.configuration": "configuration_mka", f"{PACKAGE}.hf.modeling": "modeling_mka"}
"""What config.json names -> its file."""
STAND_INS = {
    f"{PACKAGE}.config.typed": f"{PACKAGE}.config.plain",
    f"{PACKAGE}.memory.tiers.checksum": f"{PACKAGE}.memory.tiers.plain_checksum",
}
"""Modules that need a package which transformers does not bring -> what does their work there."""
_SOURCES = Path(__file__).parents[1]


def write_remote_code(directory: Path) -> None:
    """Write the flat modules into the model directory `directory`, and into its config.json the entry that names them.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: its architecture is none of ours.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ("MKAQwen2ForCausalLM", "MKAQwen3ForCausalLM", "MKALlamaForCausalLM"):
        raise ValueError(f"architectures is {architecture} in {path}: only our models have code to travel with them.")
    for name, text in flat_modules().items():
        (directory / f"{name}.py").write_text(text, encoding="utf-8")
    auto_map = {
        "AutoConfig": f"configuration_mka.{architecture.removesuffix('ForCausalLM')}Config",
        "AutoModelForCausalLM": f"modeling_mka.{architecture}",
    }
    if config.get("auto_map") != auto_map:
        path.write_text(json.dumps(config | {"auto_map": auto_map}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def flat_modules() -> dict[str, str]:
    """File name without .py -> text, of everything that the model's code imports of this package."""
    found: dict[str, str] = {}
    wanted = list(ENTRIES)
    while wanted:
        module = wanted.pop()
        if _flat(module) not in found:
            found[_flat(module)], needed = _flattened(module)
            wanted += needed
    return found


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's text with its imports of this package rewritten, and the modules they name."""
    text = _file(module).read_text(encoding="utf-8")
    lines, needed = text.splitlines(keepends=True), []
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom | ast.Import)]
    for node in sorted(imports, key=lambda each: each.lineno, reverse=True):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
                raise ValueError(f"{module}, line {node.lineno}: write `from {PACKAGE}... import ...`.")
            continue
        if node.level or not (node.module or "").startswith(PACKAGE):
            continue
        new, modules = _rewritten(node)
        needed += modules
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in new]
    return "".join(lines), needed


def _rewritten(node: ast.ImportFrom) -> tuple[list[str], list[str]]:
    """`from package.a import b`: lines for the flat folder, and the modules needed; b may be a module or a name."""
    source = node.module or ""
    lines, names, needed = [], [], []
    for alias in node.names:
        inner = f"{source}.{alias.name}"
        if _is_module(inner):
            needed.append(STAND_INS.get(inner, inner))
            # transformers does not see the second form, so the first one names the file to it
            lines.append(f"from .{_flat(inner)} import __name__ as _{alias.name}")
            lines.append(f"from . import {_flat(inner)} as {alias.asname or alias.name}")
        else:
            names.append(alias.name if alias.asname is None else f"{alias.name} as {alias.asname}")
    if names:
        needed.append(STAND_INS.get(source, source))
        lines.append(f"from .{_flat(source)} import {', '.join(names)}")
    return lines, needed


def _flat(module: str) -> str:
    module = STAND_INS.get(module, module)
    return ENTRIES.get(module, "mka_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_"))


def _file(module: str) -> Path:
    path = _SOURCES.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_module(module: str) -> bool:
    path = _SOURCES.joinpath(*module.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()
