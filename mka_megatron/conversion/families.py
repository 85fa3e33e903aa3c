"""The tensors of the plain models that are extended: Qwen2/2.5, Qwen3 and Llama, whose names are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.hf_sections import BASE_TYPES
from mka_megatron.config.schema import ModelConfig
from mka_megatron.files.header import Stored
from mka_megatron.files.source import CONFIG, Source

HEAD = "lm_head.weight"
FLOATS = ("BF16", "F16", "F32", "F64")
_ADDED = re.compile(r"model\.layers\.\d+\.self_attn\.(route\..+|planes)")
_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_added(name: str) -> bool:
    """A tensor that an import adds to the plain model's."""
    return _ADDED.fullmatch(name) is not None


def expected(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a plain model's tensors, the head of a tied one left out."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    vocabulary = (model.vocab_size or 0, hidden)
    yield "model.embed_tokens.weight", vocabulary
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            if model.qkv_bias:
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
            if model.qk_norm and name != "v":
                yield f"{prefix}self_attn.{name}_norm.weight", (model.head_dim,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, ffn)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not model.tie_embeddings:
        yield HEAD, vocabulary


def check_config(config: dict[str, Any], origin: str) -> None:
    """Refuse a plain model's config.json that names another type than its architecture, own code or quantised weights."""
    names = config.get("architectures")
    known = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    if known not in BASE_TYPES:
        raise ConfigError(f"architectures is {show(names)} in {origin}: only one of {', '.join(BASE_TYPES)} is supported; "
                          "choose another model.")
    if config.get("model_type") != BASE_TYPES[known]:
        raise ConfigError(f"model_type is {show(config.get('model_type'))} in {origin}: for {known} it must be "
                          f"{BASE_TYPES[known]}; copy the model again.")
    for key, what in (("auto_map", "models with code of their own"), ("quantization_config", "quantised weights")):
        if config.get(key) is not None:
            raise ConfigError(f"{key} is {show(config[key])} in {origin}: {what} are not supported; choose another model.")


def check_tensors(source: Source, model: ModelConfig) -> str:
    """The weights in `source`, apart from what an import adds, are those of `model` in one floating-point dtype.

    Returns:
        That dtype, as safetensors names it.

    Raises:
        ConfigError: naming the first tensor that is missing, too many, or has another shape or dtype.
    """
    tensors = {name: tensor for name, tensor in source.tensors.items() if not is_added(name)}
    rest = dict(tensors)
    for name, shape in expected(model):  # lazily: the number of layers is only claimed
        found = rest.pop(name, None)
        if found is None:
            raise ConfigError(f"{source.path} has no tensor {name}, and its {CONFIG} calls for it; copy the model again.")
        _check_shape(source, name, found, shape)
    head = rest.pop(HEAD, None)
    if head is not None:
        _check_shape(source, HEAD, head, (model.vocab_size or 0, model.hidden_size))
    rest = {name: tensor for name, tensor in rest.items() if not _FREQUENCIES.fullmatch(name)}
    if rest:
        raise ConfigError(f"{source.path} has the tensor {show(min(rest))}, which its {CONFIG} has no place for; copy the "
                          "model again.")
    return _one_dtype(source, {name: tensor for name, tensor in tensors.items() if not _FREQUENCIES.fullmatch(name)})


def _check_shape(source: Source, name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ConfigError(f"tensor {name} has the shape {show(list(tensor.shape))} in {source.path}, and its {CONFIG} calls "
                          f"for {show(list(shape))}; copy the model again.")


def _one_dtype(source: Source, tensors: dict[str, Stored]) -> str:
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ConfigError(f"tensor {name} is {tensor.dtype} in {source.path}: only {', '.join(FLOATS)} are supported; "
                              "choose another model.")
        if tensor.dtype != dtype:
            raise ConfigError(f"tensor {name} is {tensor.dtype} in {source.path} and others are {dtype}; save the model in "
                              "one dtype.")
    return dtype
