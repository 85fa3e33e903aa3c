"""What is varied of MKA, one thing at a time: studies, each a base and a row per choice."""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.benchmark.cells import Cell, Row
from mka_megatron.benchmark.model import BenchmarkModel
from mka_megatron.benchmark.settings import contender
from mka_megatron.config.errors import ConfigError
from mka_megatron.inference.measure import Plan
from mka_megatron.inference.measure import measure as measure_generation

L2, L3 = "memory_hierarchy.l2", "memory_hierarchy.l3"
RECALL = (f"{L3}={{enabled: true, recalled_chunks: 2}}",)


@dataclass(frozen=True)
class Study:
    """One thing varied. The first row is what the others are compared with."""

    attention_type: str
    rows: dict[str, tuple[str, ...]]
    """Overrides of each choice."""
    shared: tuple[str, ...] = ()
    """Of all of them."""


def _values(key: str, *values: object) -> dict[str, tuple[str, ...]]:
    name = key.rpartition(".")[2].replace("_", " ")
    return {f"{name} {value}": (f"{key}={value}",) for value in values}


def _tiers() -> dict[str, tuple[str, ...]]:
    return {
        "L1": (f"{L2}.enabled=false", f"{L3}.enabled=false"),
        "L1+L2": (f"{L3}.enabled=false",),
        "L1+L3": (f"{L2}.enabled=false", *RECALL),
        "L1+L2+L3": RECALL,
    }


STUDIES: dict[str, Study] = {
    "tiers": Study("fastmka", _tiers()),
    "block-tiers": Study("blockmka", _tiers()),
    "routing": Study("fastmka", _values("routing.mode", "soft", "fixed", "top1", "top2"), RECALL),
    "scope": Study("fastmka", _values("routing.scope", "token", "group") | _values("routing.gate_input", "x")),
    "summary": Study(
        "fastmka",
        {
            "ema, decay by channel": (),
            "ema, decay by head": (f"{L2}.decay=head",),
            "ema, fixed decays": (f"{L2}.decay=fixed",),
            "mean": (f"{L2}.summary=mean",),
        },
    ),
    "decay": Study(
        "fastmka",
        {
            f"spans {low} to {high}": (f"{L2}.min_span={low}", f"{L2}.max_span={high}")
            for low, high in ((2, 100), (2, 16), (2, 400), (10, 10), (1.2, 4))
        },
    ),
    "fusion": Study("fastmka", _values("attention.fuse", "kv", "k", "v")),
    # the gate's weights start equal: with blend beta, L1's share of the fused keys starts at 1 - beta / 2
    "start": Study(
        "fastmka",
        {f"lambda1 from {1 - beta / 2:.2f}": (f"routing.beta_init={beta}",) for beta in (1.0, 1.46, 0.5, 0.0)},
        ("attention.fuse=k",),
    ),
    "hash": Study("blockmka", _values(f"{L3}.hash_bits", 64, 128, 256, 512) | {"exact": (f"{L3}.selection=exact",)}),
    "recalled": Study("blockmka", _values(f"{L3}.recalled_chunks", 2, 1, 4)),
    "window": Study("blockmka", _values("memory_hierarchy.l1.window", 128, 64, 256)),
    # rows are single documents here, for padding to chunks would change with them
    "chunk": Study(
        "blockmka",
        _values("memory_hierarchy.l1.chunk_size", 64, 32, 128),
        ("data.reset_at_documents=false", "data.pad_documents_to_chunks=false"),
    ),
}


def cells(name: str, seeds: tuple[int, ...], overrides: list[str], world_size: int) -> list[Cell]:
    """The runs of a study, all choices of a seed before the next seed. Raises ConfigError."""
    if name not in STUDIES:
        raise ConfigError(f"study {name!r} does not exist; choose of {', '.join(STUDIES)}.")
    study = STUDIES[name]
    return [
        Cell(row, seed, contender(study.attention_type, overrides=[*study.shared, *own, *overrides], seed=seed, world_size=world_size))
        for seed in seeds
        for row, own in study.rows.items()
    ]  # fmt: skip


DECODE_PROMPT = 256
_DECODE = Plan(warmup=3, iterations=24, prefill_seconds=0.0)


def decode(model: BenchmarkModel, name: str) -> Row:
    """Milliseconds (median) of a generated token after a prompt of DECODE_PROMPT, one row at a time."""
    figures = measure_generation(model.module.eval(), model.config, model.topology, 1, DECODE_PROMPT, _DECODE)
    return {"decode_ms_per_token": figures["ms_per_token"]}
