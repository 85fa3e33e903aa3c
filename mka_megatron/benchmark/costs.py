"""What a token costs at a given context, by formula: FLOPs (those of the MFU figure), cache bytes, attention kernels.

Nothing is built: the shapes may be of models that no machine at hand could hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core, recalls
from mka_megatron.planning.flops import model_flops, weights

_UNFUSED = 3  # kernels of an attention that is not fused: scores, softmax, values


@dataclass(frozen=True)
class Costs:
    """Of one model at one context length, one row."""

    weights: int
    """Of matrix multiplications that a token passes; the embedding's only where it is the output layer."""
    training_flops: float
    """Forward and backward, per token of a row of this length."""
    prompt_attention_flops: int
    """Both attention products over the whole prompt, forward."""
    decode_attention_flops: int
    """The same of the token after it."""
    device_bytes: int
    """Keys and values (or latents), summaries and recalled chunks that must be on the device to make a token."""
    paged_bytes: int
    """Chunks that may wait in DRAM or on an SSD."""
    attention_passes: int
    """Attentions of a layer."""

    @property
    def unfused_kernels(self) -> int:
        """Launches of a layer's attentions where scores, softmax and values are a kernel each."""
        return _UNFUSED * self.attention_passes


def costs(config: Config, vocab_size: int, context: int, itemsize: int = 2) -> Costs:
    """The costs of `config` with `context` tokens; `itemsize`: bytes of a number in the cache."""
    variant = VARIANTS[config.attention.variant]
    flops = model_flops(config, vocab_size)
    device, paged = cache_bytes(config, context, itemsize)
    before, after = (flops.pairs([(0, 0, tokens)]) for tokens in (context, context + 1))
    return Costs(
        weights=weights(config, vocab_size),
        training_flops=flops.training_per_token(context),
        prompt_attention_flops=before * flops.per_pair,
        decode_attention_flops=(after - before) * flops.per_pair,
        device_bytes=device,
        paged_bytes=paged,
        attention_passes=variant.levels(config) if variant.attends_each_level else 1,
    )


def cache_bytes(config: Config, context: int, itemsize: int) -> tuple[int, int]:
    """(on the device, in pages) of a row of `context` tokens, all layers; running averages and codes left out.

    Dense core: keys and values of every token (mla: its latent and rotary key; mka: of every level that is attended), and
    for L3 a mean key and value per complete chunk. Block core: the window's keys and values, a mean key and value per
    chunk before it, and the recalled chunks; every chunk before the window has a page besides.
    """
    model, memory, variant = config.model, config.memory_hierarchy, VARIANTS[config.attention.variant]
    vector = 2 * model.head_dim * variant.kv_heads(model)
    if variant.projection == "latent":
        vector = config.attention.mla.kv_lora_rank + config.attention.mla.qk_rope_head_dim
    vector *= itemsize * model.num_layers
    size = memory.l1.chunk_size
    if not block_core(config):
        passes = variant.levels(config) if variant.attends_each_level else 1
        means = context // size if recalls(config) else 0
        return vector * (passes * context + means), 0
    chunks, window = -(-context // size), (memory.l1.window or 0) // size
    past = max(0, chunks - window)
    near = context - past * size
    recalled = min(memory.l3.recalled_chunks, past) * size if recalls(config) else 0
    return vector * (near + past + recalled), vector * past * size if recalls(config) else 0
