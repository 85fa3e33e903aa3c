"""FLOPs, cache bytes and attention kernels of real model shapes by formula, for every attention type.

    python tools/shapes.py                                  # Qwen2.5-7B and 14B, Llama-3.1-8B, DeepSeek-V3 at 128K
    python tools/shapes.py --context 32768,262144 --model configs/model/qwen2.5-7b.yaml --json out.json

The FLOPs are those of training's utilisation (MFU): forward and backward, nothing recomputed. Numbers in the cache have 2
bytes; GB are 10^9 bytes. mka, fastmka: three levels. blockmka: chunks of 128, a window of 2048, 8 recalled (the paper's R).
mla on other models' shapes: DeepSeek's ranks. gqa on DeepSeek-V3, which has none: 8 key/value heads. Kernels are a
layer's where scores, softmax and values are one each; a fused attention is one in place of three. No model is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config

MODELS = Path(__file__).resolve().parents[1] / "configs" / "model"
NAMES = ("qwen2.5-7b", "qwen2.5-14b", "llama-3.1-8b", "deepseek-v3")
LEVELS = "memory_hierarchy={l1: {chunk_size: 128}, l3: {enabled: true, recalled_chunks: 8}}"
DEEPSEEK = "attention.mla={q_lora_rank: 1536, kv_lora_rank: 512, qk_nope_head_dim: 128, qk_rope_head_dim: 64, v_head_dim: 128}"
TYPES: dict[str, tuple[str, ...]] = {
    "mha": (), "mqa": (), "gqa": (), "mla": (DEEPSEEK,), "mka": (LEVELS,), "fastmka": (LEVELS,),
    "blockmka": (LEVELS, "memory_hierarchy.l1.window=2048"),
}  # fmt: skip
GROUPS = "model.num_kv_heads=8"  # where a model has as many key/value heads as query heads


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="files of configs/model (default: the four)")
    parser.add_argument("--context", default="131072", help="tokens, with commas (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(argv)
    lengths = arguments.context.split(",")
    if not all(length.isdigit() and int(length) for length in lengths):
        parser.error(f"--context is {arguments.context!r}: give numbers separated by commas")
    try:
        found = [row(path, name, int(length)) for path in arguments.model or [MODELS / f"{name}.yaml" for name in NAMES]
                 for length in lengths for name in TYPES]  # fmt: skip
    except ConfigError as error:
        parser.error(str(error))
    print(HEAD)
    for figures in found:
        print(line(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def row(path: Path, name: str, context: int) -> dict[str, Any]:
    """The figures of an attention type on a model's shape. Raises ConfigError."""
    from mka_megatron.benchmark.costs import costs

    overrides = ["data.pad_documents_to_chunks=true", f"attention.variant={name}", *TYPES[name]]
    model = load_config(path, overrides).model
    if model.num_kv_heads == model.num_attention_heads and name != "mha":
        overrides.append(GROUPS)
    config = load_config(path, overrides)
    found = costs(config, config.model.vocab_size or 0, context)
    kernels = {"unfused_kernels": found.unfused_kernels}
    return {"model": path.stem, "attention": name, "context": context} | dataclasses.asdict(found) | kernels


HEAD = (
    "| model | attention | tokens | weights, 10⁹ | training GFLOP/token | prompt attention PFLOP | decode attention GFLOP "
    "| cache on the device, GB | in pages, GB | kernels |\n| --- | --- |" + " --: |" * 8
)


def line(row: dict[str, Any]) -> str:
    """A line under HEAD."""
    return (
        f"| {row['model']} | {row['attention']} | {row['context']:,} | {row['weights'] / 1e9:.2f} | {row['training_flops'] / 1e9:.1f} "
        f"| {row['prompt_attention_flops'] / 1e15:.3f} | {row['decode_attention_flops'] / 1e9:.2f} "
        f"| {row['device_bytes'] / 1e9:.2f} | {row['paged_bytes'] / 1e9:.2f} | {row['unfused_kernels']} |"
    )


if __name__ == "__main__":
    sys.exit(main())
