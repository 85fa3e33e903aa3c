"""Model FLOPs by attention variant: pure functions of the configuration.

Counted are the matrix multiplications (2 FLOPs per multiply-add): projections, MLP, gate, output
layer and the two attention products over exactly the (query, key) pairs that the core visits. Not counted: embedding look-up,
norms, RoPE, the O(S) memory scan and mix, softmax, and recomputation, so that utilisation is of the
model's work. Backward is twice forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config, MemoryConfig
from mka_megatron.config.variants import block_core

Spans = Iterable[tuple[int, int, int]]

_MULTIPLY_ADD = 2
_FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one model: what a token costs, and what a (query, key) pair costs on top."""

    per_token: int
    per_pair: int
    pairs: Callable[[Spans], int]
    """(query, key) pairs of documents given as (row, begin, end) tokens."""

    def forward(self, tokens: int, pairs: int) -> int:
        """FLOPs of a forward pass over `tokens` tokens that attend over `pairs` (query, key) pairs."""
        return tokens * self.per_token + pairs * self.per_pair

    def training(self, tokens: int, pairs: int) -> int:
        """FLOPs of forward and backward."""
        return _FORWARD_AND_BACKWARD * self.forward(tokens, pairs)

    def training_per_token(self, sequence_length: int) -> float:
        """Forward and backward FLOPs per token of one unbroken document of `sequence_length` tokens."""
        pairs = self.pairs([(0, 0, sequence_length)])
        return self.training(sequence_length, pairs) / sequence_length


def causal_pairs(spans: Spans) -> int:
    """(query, key) pairs of causal attention within documents given as (row, begin, end) tokens."""
    return sum((end - begin) * (end - begin + 1) // 2 for _, begin, end in spans)


def block_pairs(spans: Spans, memory: MemoryConfig) -> int:
    """The same of the block core: the window, a summary per chunk before it, and the tokens of recalled chunks."""
    size, window = memory.l1.chunk_size, (memory.l1.window or 0) // memory.l1.chunk_size
    recalled = memory.l3.recalled_chunks if memory.l3.enabled else 0

    def keys(chunks: int) -> int:
        """Keys of earlier chunks that one query of each of the first `chunks` chunks sees."""
        past = max(0, chunks - window + 1)
        return (_capped_sum(chunks, window - 1) + _capped_sum(past, recalled)) * size + memory.l2.enabled * _capped_sum(past, past)

    pairs = 0
    for _, begin, end in spans:
        whole, rest = divmod(end - begin, size)
        pairs += keys(whole) * size + (keys(whole + 1) - keys(whole)) * rest  # of earlier chunks
        pairs += whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2  # of its own
    return pairs


def _capped_sum(count: int, most: int) -> int:
    """0 + 1 + ... + (count - 1), each term at most `most`."""
    below = min(count, most)
    return below * (below - 1) // 2 + (count - below) * most


def weights(config: Config, vocab_size: int) -> int:
    """Weights of the matrix multiplications that a token passes: projections, gates, MLP, output layer."""
    model = config.model
    variant = VARIANTS[config.attention.variant]
    projections = _attention(config)[0]
    for routed in (variant.levels(config), variant.core_levels(config)):
        if routed > 1:
            projections += _gate(config, variant.kv_heads(model), routed)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    return model.num_layers * (projections + mlp) + model.hidden_size * vocab_size


def model_flops(config: Config, vocab_size: int) -> ModelFlops:
    """Forward FLOPs of the configured model with an output layer of `vocab_size` rows."""
    variant = VARIANTS[config.attention.variant]
    passes = variant.levels(config) if variant.attends_each_level else 1
    return ModelFlops(
        per_token=_MULTIPLY_ADD * weights(config, vocab_size),
        per_pair=_MULTIPLY_ADD * config.model.num_layers * passes * _attention(config)[1],
        pairs=partial(block_pairs, memory=config.memory_hierarchy) if block_core(config) else causal_pairs,
    )


def _attention(config: Config) -> tuple[int, int]:
    """Projection weights of a layer, and channels of its two attention products, all heads together."""
    variant = VARIANTS[config.attention.variant]
    return _latent(config) if variant.projection == "latent" else _grouped(config, variant.kv_heads(config.model))


def _grouped(config: Config, kv_heads: int) -> tuple[int, int]:
    """The same for heads in groups."""
    model = config.model
    query = model.num_attention_heads * model.head_dim
    key_value = 2 * kv_heads * model.head_dim
    return model.hidden_size * (2 * query + key_value), 2 * query


def _latent(config: Config) -> tuple[int, int]:
    """The same for latent KV: down- and up-projections through the ranks (DeepSeek-V2, section 2.1)."""
    model, mla = config.model, config.attention.mla
    heads = model.num_attention_heads
    query_channels = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    value_channels = heads * mla.v_head_dim
    if mla.q_lora_rank is None:
        query = model.hidden_size * query_channels
    else:
        query = mla.q_lora_rank * (model.hidden_size + query_channels)
    down = model.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * (heads * mla.qk_nope_head_dim + value_channels)
    output = value_channels * model.hidden_size
    return query + down + up + output, query_channels + value_channels


def _gate(config: Config, kv_heads: int, levels: int) -> int:
    """Weights of a layer's gate MLP: one over all heads (token), or one per KV head (group)."""
    model, routing = config.model, config.routing
    routes = kv_heads if routing.scope == "group" else 1
    if routing.gate_input == "x":
        return routing.gate_hidden_size * (model.hidden_size + routes * levels)
    # Per KV head: from its own queries. Per token: from all queries.
    query_channels = model.num_attention_heads * model.head_dim
    return routing.gate_hidden_size * (query_channels + routes * levels)
