"""Qwen2, Qwen3 and Llama with memory levels: transformers' own models whose self-attention is ours.

`import mka_megatron.hf` makes AutoModelForCausalLM know them. No S x S mask is built: transformers returns a
four-dimensional mask as it is, so its models are given an empty one, and ours reads the documents from the caller's.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from mka_megatron.config.variants import needs_chunks
from mka_megatron.hf.attention import MKAAttention
from mka_megatron.hf.cache import MKACache, adopted
from mka_megatron.hf.configuration import MKALlamaConfig, MKAQwen2Config, MKAQwen3Config, run_config
from mka_megatron.hf.inputs import Slots, Step, Whole
from mka_megatron.hf.layout import Layout, documents_of, in_chunks
from mka_megatron.hf.route import Gate, Route
from mka_megatron.memory.chunks import Chunks


class _Initialized(PreTrainedModel):
    """First values of our tensors that a checkpoint lacks."""

    embed_tokens: nn.Embedding
    rotary_emb: Any
    layers: Any

    _can_compile_fullgraph = False
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Gate):
            module.initialize(self.config.initializer_range)
        elif isinstance(module, (Route, MKAAttention)):
            module.initialize()
        else:
            super()._init_weights(module)


class _Decoder(_Initialized):
    """A base model with our attention; precedes transformers' class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        replace_attention(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_columns: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' own, with the differences of :func:`mka_megatron.hf.layout.documents_of`.

        Args:
            past_key_values: an MKACache, or an empty DynamicCache, which becomes one. What is remembered has no
                gradient: it is made without one.
            use_cache: None: as the config says, but not where gradients are on or documents are packed.
            prompt_columns: columns of the prompt, at whose end the open chunk is closed; None: with a cache it ends
                before the first pass of one column, without one there is no such end.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions is true: the attention never holds its weights; leave it out.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["full_attention"]
        packed = attention_mask is None and _begins_again(position_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled() and not packed
        if past_key_values is None and not use_cache:
            inputs: Whole | Step = self._whole(inputs_embeds, attention_mask, position_ids, prompt_columns)
        elif self.training and torch.is_grad_enabled():
            raise ValueError("a cache has no gradients: leave past_key_values and use_cache out of training.")
        elif packed:
            raise ValueError("position_ids begin again within a row: packed documents have no cache; pass use_cache=False.")
        else:
            past_key_values = adopted(past_key_values, self.config)
            inputs = self._step(inputs_embeds, attention_mask, past_key_values, prompt_columns)
        with torch.no_grad() if past_key_values is not None else nullcontext():
            return super().forward(
                attention_mask=inputs_embeds.new_empty(1, 1, 1, 0),
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=past_key_values is not None,
                mka_inputs=inputs,
                **kwargs,
            )

    def _whole(
        self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None, prompt_columns: int | None
    ) -> Whole:
        run = run_config(self.config)
        documents, chunks = documents_of(mask, position_ids, *hidden.shape[:2]), None
        size = run.memory_hierarchy.l1.chunk_size
        layout = in_chunks(documents, size, prompt_columns) if needs_chunks(run) else Layout(documents, None)
        layout = layout.to(hidden.device)
        if needs_chunks(run):
            chunks = Chunks.of(layout.documents, size)
        return Whole(layout, Slots.of(layout.documents, chunks, self.rotary_emb, hidden))

    def _step(self, hidden: Tensor, mask: Tensor | None, cache: MKACache, prompt_columns: int | None) -> Step:
        columns = hidden.shape[1]
        if mask is not None and (mask.dim() != 2 or mask.shape[1] < columns):
            raise ValueError(f"attention_mask has shape {list(mask.shape)}: with a cache give [batch, columns so far], 0 on "
                             "padding.")
        valid = None if mask is None else mask[:, -columns:].to(hidden.device, torch.bool)
        if valid is not None and bool(valid.all()):
            valid = None
        cache.begin(hidden, valid, prompt_columns)
        return Step.of(cache.memory, self.rotary_emb, hidden)


_MANIFEST = "mka_manifest.json"
"""As files.manifest.NAME, which does not travel with a model."""


class _CausalLM(_Initialized, GenerationMixin):
    """A language model over our base model; precedes transformers' class."""

    _is_stateful = True  # no assisted generation: nothing remembered can be taken back

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.model)
        replace_attention(self.model)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers' own, with the code that loads the directory where this package is not installed.

        A manifest of what was imported or exported there before is removed: it lists other files.
        """
        main = kwargs.get("is_main_process", True)
        if main:
            (Path(save_directory) / _MANIFEST).unlink(missing_ok=True)
        super().save_pretrained(save_directory, **kwargs)
        if not self.is_remote_code() and main:
            importlib.import_module("mka_megatron.hf.remote").write_remote_code(Path(save_directory))

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        mask = model_kwargs.get("attention_mask")
        # generate drops a mask of ones, and keeps its length here
        model_kwargs["prompt_columns"] = generation_config._mask_length if mask is None else mask.shape[1]
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind}: memory levels grow and have tiers of their own; leave it out, "
                             "and give cache_config={'dram_gib': ..., 'ssd_path': ...} to keep pages off the device.")
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1 and generation_config.use_cache:
            raise ValueError("device_map spreads the model over devices: its cache lies on one; load it on one, or pass "
                             "use_cache=False.")
        given = model_kwargs.get("past_key_values")
        if given is not None:
            model_kwargs["past_key_values"] = adopted(given, self.config)
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = MKACache(self.config, **(generation_config.cache_config or {}))


class MKAQwen2Model(_Decoder, Qwen2Model):
    """Qwen2 and Qwen2.5 without a head."""

    config_class = MKAQwen2Config


class MKAQwen2ForCausalLM(_CausalLM, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""

    config_class = MKAQwen2Config


class MKAQwen3Model(_Decoder, Qwen3Model):
    """Qwen3 without a head."""

    config_class = MKAQwen3Config


class MKAQwen3ForCausalLM(_CausalLM, Qwen3ForCausalLM):
    """Qwen3."""

    config_class = MKAQwen3Config


class MKALlamaModel(_Decoder, LlamaModel):
    """Llama without a head."""

    config_class = MKALlamaConfig


class MKALlamaForCausalLM(_CausalLM, LlamaForCausalLM):
    """Llama 3."""

    config_class = MKALlamaConfig


OURS: dict[type, type] = {
    Qwen2Model: MKAQwen2Model,
    Qwen3Model: MKAQwen3Model,
    LlamaModel: MKALlamaModel,
    Qwen2ForCausalLM: MKAQwen2ForCausalLM,
    Qwen3ForCausalLM: MKAQwen3ForCausalLM,
    LlamaForCausalLM: MKALlamaForCausalLM,
}
"""transformers' classes -> ours."""


def _begins_again(position_ids: Tensor | None) -> bool:
    return position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def adopt(model: PreTrainedModel) -> None:
    """Turn a model of transformers, whose config is already one of ours, into ours; its attention is left alone."""
    model.__class__ = OURS[type(model)]
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # by class: what output_hidden_states finds


def replace_attention(model: PreTrainedModel) -> None:
    """Our attention in every layer of a base model, on the projections that are there."""
    run = run_config(model.config)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.self_attn = MKAAttention(layer.self_attn, run).train(layer.training)
