"""A Qwen2-shaped checkpoint of any size, written as bytes with the standard library; random weights of no use.

    python tests/helpers/synthetic_model.py DIRECTORY --layers 28      # Qwen2.5-7B's shape: 15.2 GB in 4 shards
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
from pathlib import Path

QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064}
_BLOCK = 64 << 20


def write_model(directory: Path, layers: int, shape: dict[str, int] = QWEN_7B, shards: int = 4) -> int:
    """Write config.json, the index and bf16 shards; returns the bytes of the weights."""
    directory.mkdir(parents=True)
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    tensors: list[tuple[str, list[int]]] = [("model.embed_tokens.weight", [shape["vocab_size"], hidden])]
    for layer in range(layers):
        sizes = {"self_attn.q_proj.weight": [hidden, hidden], "self_attn.q_proj.bias": [hidden],
                 "self_attn.k_proj.weight": [keys, hidden], "self_attn.k_proj.bias": [keys],
                 "self_attn.v_proj.weight": [keys, hidden], "self_attn.v_proj.bias": [keys],
                 "self_attn.o_proj.weight": [hidden, hidden], "mlp.gate_proj.weight": [ffn, hidden],
                 "mlp.up_proj.weight": [ffn, hidden], "mlp.down_proj.weight": [hidden, ffn],
                 "input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        tensors += [(f"model.layers.{layer}.{name}", size) for name, size in sizes.items()]
    tensors += [("model.norm.weight", [hidden]), ("lm_head.weight", [shape["vocab_size"], hidden])]
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": layers,
              "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
              "tie_word_embeddings": False, "hidden_act": "silu", **shape}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    block, per_shard, total, file_of = _finite_block(), -(-len(tensors) // shards), 0, {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = tensors[shard * per_shard : (shard + 1) * per_shard]
        file_of |= {tensor: name for tensor, _ in part}
        total += _write_shard(directory / name, part, block)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _finite_block() -> bytes:
    """Random bf16 with exponents below the largest."""
    block = bytearray(random.Random(0).randbytes(_BLOCK))  # noqa: S311
    block[1::2] = block[1::2].translate(bytes(b & 0xBF for b in range(256)))
    return bytes(block)


def _write_shard(path: Path, tensors: list[tuple[str, list[int]]], block: bytes) -> int:
    entries, position = {}, 0
    for name, shape in tensors:
        size = 2
        for extent in shape:
            size *= extent
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for begin in range(0, position, _BLOCK):
            file.write(block[: min(_BLOCK, position - begin)])
        file.flush()
        os.fsync(file.fileno())
    return position


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    print(f"{write_model(args.directory, args.layers) / 1e9:.2f} GB")
