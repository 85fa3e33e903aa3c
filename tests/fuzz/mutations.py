"""Edits that make another configuration of a shipped one: of its text, and of its keys and values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import yaml

from mka_megatron.config.fields import item_type, sections, type_hints
from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.config.schema import Config

Tree = dict[Any, Any]

FIELDS = {root: [field for _, _, own in sections(root) for field in own if "[]" not in field.key] for root in (Config, FineTuneConfig)}
KEYS = sorted({field.key for fields in FIELDS.values() for field in fields})
SECTIONS = sorted(name for name, hint in type_hints(Config).items() if item_type(hint) is None)
OLD_KEYS = ("hbm_enabled", "dram_staging", "ssd_tier_path")
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 16, 64, 128, 1000003, 2**31 - 1, 2**31, -(2**63), 2**64, 10**25, 10**310,
    0.5, -2.5, 1e-30, 1e300, -0.0, float("nan"), float("inf"), float("-inf"), "", " ", "x", "none", "auto", "gqa", "mla",
    "blockmka", "block", "score", "hash", "cpu", "nvme", "ssd", "yarn", "1e-3", "0x10", "9" * 500, "\x07", "a\nb", "\u202e",
    "\u0000", "\ud800", "é", "数", "../base.yaml", "/", "/dev/zero", "a" * 5000, "hf:", "2024-01-31", "12:30:45", "~", "=", "<<",
    [], [1, 2], ["a"], [[1]], [None], [{"path": "q"}], [{"path": "q", "weight": float("nan")}], list(range(300)),
    {}, {"a": 1}, {"path": "q"}, {1: 2}, {None: None}, {"a.b": {"c": []}}, {True: False}, {1.5: "x"},
]  # fmt: skip
"""Values of every type and of odd sizes; a few are right for some key."""

SCALARS = [
    "0x1F", "017", "0o17", "1_000", "1:30", "1e5", "1e-3", "1e999", "-1e999", "1.e3", ".5", "+.inf", ".nan", "-0", "9" * 5000,
    "0x" + "f" * 6000, "yes", "no", "on", "OFF", "y", "~", "null", "=", "2024-01-31", "2024-01-31T00:00:00Z", "2024-99-99",
    "!!int x", "!!int ''", "!!float ''", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!binary '*'", "!!set {a}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!python/tuple [1, 2]", "!local x", "!<tag:example,2000:x> y", "&a 3", "*a", "&a [*a]", "{<<: {steps: 3}}", "[" * 3000,
    "{a: " * 1500, "[" * 400 + "]" * 400, "- " * 1200 + "x", "|\n  text", ">-\n  text", "'open", '"open', '"\\ud800"',
    '"\\x00"', '"\\e"', '"\\q"', "@x", "`x`", "%x", "a: b: c", "? a", "{a, b}", "[a: b]", "{? [a] : b}", "a #b", "#", ",", "}",
]  # fmt: skip
"""YAML as somebody might write it after a colon, right and wrong."""


def retune(tree: Tree, rng: random.Random, root: type) -> None:
    """Give a key of `root` a value of its type, in place."""
    _put(tree, *plausible(root, rng))


def edit_tree(tree: Tree, rng: random.Random, donor: Tree) -> None:
    """One edit somewhere in `tree`, in place; values may come from `donor`."""
    node = tree
    while below := [key for key, value in node.items() if isinstance(value, dict) and value]:
        if rng.random() < 0.3:
            break
        node = node[rng.choice(below)]
    keys = list(node)
    kind = rng.choice(["value", "value", "delete", "misspell", "known", "unknown", "move", "donor", "swap", "wrap"])
    if kind == "known" or not keys:
        _put(tree, rng.choice(KEYS), rng.choice(VALUES))
    elif kind == "unknown":
        node[rng.choice(["zzz", "base", "model", *OLD_KEYS, "", "a.b", "é", "a" * 3000, "\n", 3, None])] = rng.choice(VALUES)
    elif kind == "value":
        node[rng.choice(keys)] = rng.choice(VALUES)
    elif kind == "delete":
        del node[rng.choice(keys)]
    elif kind == "misspell":
        key = rng.choice(keys)
        value, text = node.pop(key), str(key)
        at = rng.randrange(len(text) + 1)
        node[text[:at] + rng.choice("xs_.- ") + text[at + rng.randrange(2):]] = value
    elif kind == "move":
        key = rng.choice(keys)
        tree[key] = node.pop(key)
    elif kind == "donor":
        _put(tree, rng.choice(KEYS), _somewhere(donor, rng))
    elif kind == "swap":
        first, second = rng.choice(keys), rng.choice(keys)
        node[first], node[second] = node[second], node[first]
    else:
        key = rng.choice(keys)
        node[key] = rng.choice([[node[key]], {key: node[key]}, str(node[key])])


def plausible(root: type, rng: random.Random) -> tuple[str, Any]:
    """A key of `root` and a value of its type."""
    field = rng.choice(FIELDS[root])
    kind, options = field.kind, []
    for word in ("integers", "integer", "number", "string", "mappings", "true or false"):
        if word in kind:
            options += _OF_KIND[word]
            kind = kind.replace(word, "")
    words = kind.replace(" or ", ", ").split(", ")
    options += [None if word == "null" else int(word) if word.isdigit() else word for word in words if word.strip() and "list of" not in word]
    return field.key, rng.choice(options)


_OF_KIND: dict[str, list[Any]] = {
    "integers": [[], [1, 2]],
    "integer": [0, 1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1000, 1024, 4096, 65536, 262144],
    "number": [0, 0.0, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1, 2.5, 64.0, 1e4],
    "string": ["x", "runs/x", "none", "auto"],
    "mappings": [[], ["x"], "x", [{"path": "x", "weight": 2}]],
    "true or false": [True, False],
}


def _put(tree: Tree, key: str, value: Any) -> None:
    *parents, last = key.replace("[]", "").split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def _somewhere(tree: Tree, rng: random.Random) -> Any:
    value: Any = tree
    while isinstance(value, dict) and value and rng.random() < 0.8:
        value = value[rng.choice(list(value))]
    return value


def written(tree: Tree, rng: random.Random) -> str:
    """`tree` as YAML, in block or flow style."""
    style: dict[str, Any] = {"allow_unicode": rng.random() < 0.5, "default_flow_style": rng.choice([None, True, False]), "width": 10**6}
    try:
        return yaml.dump(tree, Dumper=yaml.CSafeDumper, **style)
    except UnicodeEncodeError:
        return yaml.dump(tree, Dumper=yaml.SafeDumper, **style)


def _lines(change: Callable[[list[str], int, random.Random], None]) -> Callable[[str, random.Random], str]:
    def edit(text: str, rng: random.Random) -> str:
        lines = text.split("\n")
        change(lines, rng.randrange(len(lines)), rng)
        return "\n".join(lines)

    return edit


def _replace_value(lines: list[str], at: int, rng: random.Random) -> None:
    if ":" in lines[at]:
        lines[at] = f"{lines[at].split(':')[0]}: {rng.choice(SCALARS)}"


def _set(lines: list[str], at: int, new: str) -> None:
    lines[at] = new


def _characters(text: str, rng: random.Random) -> str:
    out = list(text) or [" "]
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(len(out))] = rng.choice("{}[]:&*!|>%@`\t\"'#,?-\x00\x85\u2028é\n 9\ufeff\ud800")
    return "".join(out)


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _wrapped(text: str, rng: random.Random) -> str:
    return rng.choice([_prefix, _suffix])(text, rng)


def _prefix(text: str, rng: random.Random) -> str:
    return rng.choice(["\ufeff", "---\n", "%YAML 1.1\n---\n", "%YAML 9.9\n---\n", "%TAG ! x\n---\n", "\t", " ", "- ", "x: 1\n",
                       "...\n", "# c\n", "!!map\n", "&all\n"]) + text  # fmt: skip


def _suffix(text: str, rng: random.Random) -> str:
    bomb = "\n".join([f"{a}: &{a} [{', '.join([f'*{b}'] * 9)}]" for a, b in zip("bcdefghi", "abcdefgh", strict=True)])
    return text + rng.choice(["\n---\nmodel: {}\n", "\n...\njunk", "\na: &a [x]\n" + bomb, "\n<<: {steps: 3}\n", "\n\t\n", "\n}\n",
                              "\nmodel: &m {num_layers: 2}\ntraining: *m\n", "\n? [a]\n: b\n", "\n" + "x" * 70000, "\n" * 3000,
                              "\nz: [" + "[]," * 30000 + "]"])  # fmt: skip


TEXT_EDITS: list[Callable[[str, random.Random], str]] = [
    _lines(_replace_value),
    _lines(_replace_value),
    _lines(lambda lines, at, rng: lines.insert(at, lines[rng.randrange(len(lines))])),
    _lines(lambda lines, at, rng: lines.pop(at)),
    _lines(lambda lines, at, rng: _set(lines, at, " " * rng.randint(1, 5) + lines[at])),
    _lines(lambda lines, at, rng: _set(lines, at, lines[at].lstrip(" "))),
    _lines(lambda lines, at, rng: _set(lines, at, "\t" + lines[at].strip())),
    _characters,
    _cut,
    _wrapped,
]


def encoded(text: str, rng: random.Random) -> bytes:
    """The bytes of a file: UTF-8, now and then something else."""
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(30)
    if kind == 0:
        return text.encode("utf-16", "surrogatepass")
    if kind == 1:
        return data.replace(b"\n", b"\r\n")
    if kind == 2:
        at = rng.randrange(len(data) + 1)
        return data[:at] + bytes(rng.randrange(256) for _ in range(5)) + data[at:]
    return data
